"""What an evaluation tries: settings of the server, in curves that a dial moves along.

| curve | dial | request |
|---|---|---|
| a kind of `decoding.rules` | `alpha`; ensemble `weight`, typical `epsilon` | mode cascade |
| `lossy`, `lossy_solved` | `alpha`, with beta one or solved | mode speculative |
| `token_cascade` | `alpha` of chow | mode token_cascade |
| `sequence_cascade` | least mean log-probability of a draft that stands | mode sequence_cascade |
| `lossless`, `expert_only`, `drafter_only` | none | always among the settings |
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cascade.errors import InvalidMeasurement
from cascade.rules import Rule
from cascade.types import Bonus, Mode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

EXPERT, DRAFTER, LOSSLESS = "expert_only", "drafter_only", "lossless"

TOKEN_CASCADE, SEQUENCE_CASCADE = Mode.TOKEN_CASCADE.value, Mode.SEQUENCE_CASCADE.value

LOSSY, LOSSY_SOLVED = "lossy", "lossy_solved"

BASELINES = (EXPERT, DRAFTER, LOSSLESS)

_DRAFTS = (LOSSLESS, LOSSY, LOSSY_SOLVED)  # mode speculative

_KINDS = [
    str(field.default)
    for rule in get_args(Rule)
    for field in dataclasses.fields(rule)
    if field.name == "kind"
]

RULES = tuple(kind for kind in _KINDS if kind not in (LOSSLESS, LOSSY))

CURVES = (*RULES, LOSSY, LOSSY_SOLVED, TOKEN_CASCADE, SEQUENCE_CASCADE)

_DIALS = {"ensemble": "weight", "typical": "epsilon"}

_RULE: TypeAdapter[Rule] = TypeAdapter(Annotated[Rule, Field(discriminator="kind")])

DRAFT_TOKENS = 5

USUAL: dict[str, list[float]] = {
    "chow": [0.05, 0.2, 0.4, 0.6],
    "diff": [0.05, 0.2, 0.4, 0.6],
    "opt": [0.05, 0.2, 0.4, 0.6],
    "token_v1": [0.1, 0.3, 0.5, 0.7],
    "token_v2": [0.1, 0.3, 0.5, 0.7],
    "token_v3": [0.5, 0.8, 0.9, 0.97],
    LOSSY: [0.2, 0.5, 0.8],
    LOSSY_SOLVED: [0.2, 0.5, 0.8],
    TOKEN_CASCADE: [0.05, 0.2, 0.4, 0.6],
    SEQUENCE_CASCADE: [-0.02, -0.1, -0.3],
}

"""The curves of an evaluation that names none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to ask the server."""

    curve: str
    temperature: float
    dial: float | None = None  # of the curve; None for baselines
    draft_tokens: int | None = None  # None where nobody judges blocks
    bonus: Bonus | None = None  # None: the server's

    @property
    def name(self) -> str:
        """Return the curve with its dial, as tables say it."""
        return self.curve if self.dial is None else f"{self.curve} {self.dial:g}"

    @property
    def key(self) -> str:
        """Return what no other setting of a grid is called; it is fit for a file's name."""
        parts = [self.curve, *([] if self.dial is None else [f"{self.dial:g}"])]
        parts.append(f"t{self.temperature:g}")
        parts += [] if self.draft_tokens is None else [f"d{self.draft_tokens}"]
        return "_".join([*parts, *([] if self.bonus is None else [self.bonus.value])])

    @property
    def mode(self) -> Mode:
        """Return the mode of the request."""
        if self.curve in _DRAFTS:
            return Mode.SPECULATIVE
        return Mode.CASCADE if self.curve in RULES else Mode(self.curve)

    @property
    def rule(self) -> dict[str, Any] | None:
        """Return the rule of the request, in modes that have one."""
        if self.curve in (LOSSY, LOSSY_SOLVED):
            beta = "one" if self.curve == LOSSY else "solved"
            return {"kind": LOSSY, "alpha": self.dial, "beta": beta}
        if self.curve == TOKEN_CASCADE:
            return {"kind": "chow", "alpha": self.dial}
        if self.curve in RULES:
            return {"kind": self.curve, _DIALS.get(self.curve, "alpha"): self.dial}
        return {"kind": LOSSLESS} if self.curve == LOSSLESS else None

    def options(self) -> dict[str, Any]:
        """Return the `cascade` object of the request.

        Blocks are judged under the maximal coupling, which refuses least and is the papers'; with a
        seed in the request the server would choose another.
        """
        told: dict[str, Any] = {"mode": self.mode.value, "coupling": "maximal"}
        if self.curve == SEQUENCE_CASCADE:
            told["patience"] = {"confidence": "mean", "threshold": self.dial}
        optional = {"rule": self.rule, "draft_tokens": self.draft_tokens, "bonus": self.bonus}
        return told | {name: value for name, value in optional.items() if value is not None}


class Block(BaseModel):
    """Curves to try at each of some temperatures and draft lengths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperatures: Annotated[list[Annotated[float, Field(ge=0, le=2)]], Field(min_length=1)] = Field(
        default=[0.0]
    )
    draft_tokens: Annotated[list[Annotated[int, Field(ge=1, le=32)]], Field(min_length=1)] = Field(
        default=[DRAFT_TOKENS]
    )
    curves: dict[str, list[float]] = USUAL
    bonus: Bonus | None = None

    def settings(self) -> list[Setting]:
        """Return the settings, baselines first.

        Raises:
            InvalidMeasurement: No such curve, or a dial that its rule refuses.
        """
        found: list[Setting] = []
        for temperature, length in itertools.product(self.temperatures, self.draft_tokens):
            dials = {name: [None] for name in BASELINES} | self.curves
            for curve, values in dials.items():
                for dial in values:
                    setting = Setting(
                        curve=curve,
                        dial=dial,
                        temperature=temperature,
                        draft_tokens=length,
                        bonus=self.bonus,
                    )
                    found.append(checked(setting))
        return list(dict.fromkeys(found))


def checked(setting: Setting) -> Setting:
    """Return the setting without what its mode does not read.

    Raises:
        InvalidMeasurement: No such curve, or a dial that its rule refuses.
    """
    if setting.curve not in (*CURVES, *BASELINES):
        raise InvalidMeasurement(
            f"there is no curve `{setting.curve}`; wanted one of {', '.join(CURVES)}"
        )
    if setting.rule is not None:
        try:
            _RULE.validate_python(setting.rule)
        except ValidationError as error:
            wanted = error.errors()[0]["msg"].lower()
            raise InvalidMeasurement(
                f"`{setting.curve}` has no dial {setting.dial}: {wanted}"
            ) from error
    if setting.mode in (Mode.CASCADE, Mode.SPECULATIVE):
        return setting
    return dataclasses.replace(setting, draft_tokens=None, bonus=None)


def read_grid(path: Path) -> list[Setting]:
    """Return the settings of a YAML file: one block, or a list of blocks.

    Raises:
        InvalidMeasurement: The file is none, and why.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidMeasurement(f"the grid {path} cannot be read: {error}") from error
    blocks: list[Any] = document if isinstance(document, list) else [document or {}]
    try:
        parsed = [Block.model_validate(block) for block in blocks]
    except ValidationError as error:
        found = error.errors()[0]
        place = ".".join(str(part) for part in found["loc"]) or "it"
        raise InvalidMeasurement(
            f"the grid {path}: `{place}`: {found['msg'].lower()}; a block has"
            f" {', '.join(Block.model_fields)}"
        ) from error
    return joined(parsed)


def joined(blocks: Sequence[Block]) -> list[Setting]:
    """Return the settings of all blocks, none twice."""
    return list(dict.fromkeys(setting for block in blocks for setting in block.settings()))
