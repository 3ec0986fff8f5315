"""The settings that an evaluation compares: curves, each with a dial whose values are its points.

| curve | dial | request |
|---|---|---|
| a kind of `cascade.rules` | `alpha`; ensemble `weight`, typical `epsilon` | mode cascade |
| `lossy`, `lossy_solved` | `alpha`, with beta one or solved | mode speculative |
| `token_cascade` | `alpha` of chow | mode token_cascade |
| `sequence_cascade` | least mean log-probability of an accepted draft | mode sequence_cascade |
| `lossless`, `expert_only`, `drafter_only` | none | in every grid |

In mode cascade a block of the grid may have other rules for some phases of an answer: `phases`
maps `thinking`, `answer` or `tool` to a rule with its dial, such as `lossless` or `token_v3 0.9`.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cascade.errors import InvalidMeasurement, wanted
from cascade.rules import Rule
from cascade.types import Bonus, Mode, Phase

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

EXPERT, DRAFTER, LOSSLESS = "expert_only", "drafter_only", "lossless"

TOKEN_CASCADE, SEQUENCE_CASCADE = Mode.TOKEN_CASCADE.value, Mode.SEQUENCE_CASCADE.value

LOSSY, LOSSY_SOLVED = "lossy", "lossy_solved"

BASELINES = (EXPERT, DRAFTER, LOSSLESS)

_SPECULATIVE = (LOSSLESS, LOSSY, LOSSY_SOLVED)

_KINDS = [
    str(field.default)
    for rule in get_args(Rule)
    for field in dataclasses.fields(rule)
    if field.name == "kind"
]

RULES = tuple(kind for kind in _KINDS if kind not in (LOSSLESS, LOSSY))

CURVES = (*RULES, LOSSY, LOSSY_SOLVED, TOKEN_CASCADE, SEQUENCE_CASCADE)

_OF_PHASES = (*RULES, *_SPECULATIVE)

_DIAL_FIELDS = {"ensemble": "weight", "typical": "epsilon"}

_RULE_ADAPTER: TypeAdapter[Rule] = TypeAdapter(Annotated[Rule, Field(discriminator="kind")])

DRAFT_TOKENS = 5

DEFAULT_CURVES: dict[str, list[float]] = {
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

"""The curves of an evaluation that names none, each with its dials."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """One way to ask the server."""

    curve: str
    temperature: float
    dial: float | None = None  # None for baselines
    draft_tokens: int | None = None  # None in modes without blocks
    bonus: Bonus | None = None  # None: the server's
    phases: tuple[tuple[Phase, str], ...] = ()  # the rules of phases that have others

    @property
    def name(self) -> str:
        """Return the curve with its dial, as tables show it."""
        name = self.curve if self.dial is None else f"{self.curve} {self.dial:g}"
        return ", ".join([name, *(f"{phase} {rule}" for phase, rule in self.phases)])

    @property
    def key(self) -> str:
        """Return a name that is unique in a grid and usable as a file name."""
        parts = (
            self.curve,
            None if self.dial is None else f"{self.dial:g}",
            f"t{self.temperature:g}",
            None if self.draft_tokens is None else f"d{self.draft_tokens}",
            None if self.bonus is None else self.bonus.value,
            *(f"{phase}-{rule.replace(' ', '-')}" for phase, rule in self.phases),
        )
        return "_".join(part for part in parts if part is not None)

    @property
    def mode(self) -> Mode:
        """Return the mode of the request."""
        if self.curve in _SPECULATIVE:
            return Mode.SPECULATIVE
        return Mode.CASCADE if self.curve in RULES else Mode(self.curve)

    @property
    def rule(self) -> dict[str, Any] | None:
        """Return the rule of the request, or None in modes without one."""
        if self.curve in (LOSSY, LOSSY_SOLVED):
            beta = "one" if self.curve == LOSSY else "solved"
            return {"kind": LOSSY, "alpha": self.dial, "beta": beta}
        if self.curve == TOKEN_CASCADE:
            return {"kind": "chow", "alpha": self.dial}
        if self.curve in RULES:
            return {"kind": self.curve, _DIAL_FIELDS.get(self.curve, "alpha"): self.dial}
        return {"kind": LOSSLESS} if self.curve == LOSSLESS else None

    def options(self) -> dict[str, Any]:
        """Return the `cascade` object of the request.

        Blocks are judged with the maximal coupling, which rejects least and is the papers'; for a
        request with a seed the server would choose another.
        """
        options = {
            "mode": self.mode.value,
            "coupling": "maximal",
            "rule": self.rule,
            "phases": {phase: _rule_named(rule) for phase, rule in self.phases} or None,
            "draft_tokens": self.draft_tokens,
            "bonus": self.bonus,
            "patience": {"confidence": "mean", "threshold": self.dial}
            if self.curve == SEQUENCE_CASCADE
            else None,
        }
        return {name: value for name, value in options.items() if value is not None}


def _rule_named(name: str) -> dict[str, Any] | None:
    """Return the rule of a curve with its dial, as tables show it."""
    curve, _, dial = name.partition(" ")
    return Setting(curve=curve, dial=float(dial) if dial else None, temperature=0).rule


class GridBlock(BaseModel):
    """Curves to evaluate at each of some temperatures and draft lengths."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperatures: Annotated[list[Annotated[float, Field(ge=0, le=2)]], Field(min_length=1)] = Field(
        default=[0.0]
    )
    draft_tokens: Annotated[list[Annotated[int, Field(ge=1, le=32)]], Field(min_length=1)] = Field(
        default=[DRAFT_TOKENS]
    )
    curves: dict[str, list[float]] = DEFAULT_CURVES
    bonus: Bonus | None = None
    phases: dict[Phase, str] = Field(default={})

    def settings(self) -> list[Setting]:
        """Return the settings, baselines first.

        Raises:
            InvalidMeasurement: There is no such curve, or its rule refuses a dial.
        """
        points = [
            (curve, dial)
            for curve, dials in ({name: [None] for name in BASELINES} | self.curves).items()
            for dial in dials
        ]
        settings = [
            Setting(
                curve=curve, dial=dial, temperature=temperature, draft_tokens=length,
                bonus=self.bonus, phases=tuple(self.phases.items()),
            )
            for temperature, length in itertools.product(self.temperatures, self.draft_tokens)
            for curve, dial in points
        ]  # fmt: skip
        return list(dict.fromkeys(validated(setting) for setting in settings))


def validated(setting: Setting) -> Setting:
    """Return the setting without the fields that its mode does not read.

    Raises:
        InvalidMeasurement: There is no such curve, or its rule refuses the dial.
    """
    if setting.curve not in (*CURVES, *BASELINES):
        raise InvalidMeasurement(
            f"there is no curve `{setting.curve}`; {wanted(setting.curve, CURVES)}"
        )
    _check_rule(setting.rule, setting.curve, setting.dial)
    for phase, name in setting.phases:
        curve, _, dial = name.partition(" ")
        if curve not in _OF_PHASES:
            raise InvalidMeasurement(
                f"`phases` has no rule `{name}` for `{phase}`; {wanted(curve, _OF_PHASES)}, with"
                " its dial after a space"
            )
        try:
            rule = _rule_named(name)
        except ValueError as error:
            raise InvalidMeasurement(f"`{curve}` has no dial {dial}; wanted a number") from error
        _check_rule(rule, curve, dial or None)
    if setting.mode is Mode.CASCADE:
        return setting
    if setting.mode is Mode.SPECULATIVE:
        return dataclasses.replace(setting, phases=())
    return dataclasses.replace(setting, draft_tokens=None, bonus=None, phases=())


def _check_rule(rule: dict[str, Any] | None, curve: str, dial: float | str | None) -> None:
    if rule is None:
        return
    try:
        _RULE_ADAPTER.validate_python(rule)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].replace("Input should", "it must")
        raise InvalidMeasurement(f"`{curve}` has no dial {dial}: {reason}") from error


def read_grid(path: Path) -> list[Setting]:
    """Return the settings of a YAML file: one block, or a list of blocks.

    Raises:
        InvalidMeasurement: The file cannot be read, or is not a grid.
    """
    try:
        document = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidMeasurement(f"the grid {path} cannot be read: {error}") from error
    blocks: list[Any] = document if isinstance(document, list) else [document or {}]
    try:
        parsed = [GridBlock.model_validate(block) for block in blocks]
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"]) or "it"
        reason = f": {problem['msg'].lower()}"
        if problem["type"] == "extra_forbidden":
            reason = f" is unknown; {wanted(problem['loc'][-1], GridBlock.model_fields)}"
        raise InvalidMeasurement(
            f"the grid {path}: `{field}`{reason}; a block has {', '.join(GridBlock.model_fields)}"
        ) from error
    return merge_blocks(parsed)


def merge_blocks(blocks: Sequence[GridBlock]) -> list[Setting]:
    """Return the settings of all blocks without duplicates."""
    return list(dict.fromkeys(setting for block in blocks for setting in block.settings()))
