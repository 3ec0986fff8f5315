"""What is asked, and what a right answer is: a user's JSONL file or the families that ship.

A line of a file is one JSON object:

| field | value |
|---|---|
| `prompt` | text, which is asked as a chat's user, or a list of `{"role": ..., "content": ...}` |
| `reference` or `references` | a right answer, or a list of them; assertions for `program` |
| `scorer` | a name of `cascade.lab.scoring` |
| `id` | the line's number if absent |
| `family` | results are kept apart by it; the file's name if absent |
| `system` | comes before the prompt |
| `max_tokens` | of the answer, 256 if absent |
| `completion` | true lets the text of `prompt` be continued instead of answered |
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    model_validator,
)

from cascade.errors import InvalidMeasurement
from cascade.evaluation.scoring import Scorer
from cascade.evaluation.tasks import ALL_LEVELS, Family, held_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

FAMILIES = "families"

_FAMILY_TOKENS = 96

_SHOWN_LINES = 10

_SHOWN_CHARACTERS = 60

_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a conversation."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question and what is right."""

    id: str  # of its family
    family: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    scorer: Scorer
    max_tokens: int = 256
    completion: bool = False  # the one message is text to continue

    @property
    def name(self) -> str:
        """Return what no other item of the workload is called."""
        return f"{self.family}/{self.id}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Items in order; `name` is what was asked for."""

    name: str
    items: tuple[Item, ...]

    @cached_property
    def digest(self) -> str:
        """Return what changes with any item."""
        told = json.dumps([asdict(item) for item in self.items], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()

    @property
    def families(self) -> tuple[str, ...]:
        """Return the families, in the order in which they first come."""
        return tuple(dict.fromkeys(item.family for item in self.items))


def load(name: str, *, count: int | None = None, seed: int = 0) -> Workload:
    """Return a workload.

    Args:
        name: `families` for all that ship, one family's name, or the path of a JSONL file.
        count: Items of each family; 100, or the whole file, if absent.
        seed: Of the draw of held-out items.

    Raises:
        InvalidMeasurement: There is none of that name, or the file has lines that are none.
    """
    if name == FAMILIES or name in set(Family):
        chosen = tuple(Family) if name == FAMILIES else (Family(name),)
        return shipped(chosen, name=name, count=100 if count is None else count, seed=seed)
    workload = read(Path(name))
    if count is None:
        return workload
    kept = [
        item
        for family in workload.families
        for item in [item for item in workload.items if item.family == family][:count]
    ]
    return Workload(name=workload.name, items=tuple(kept))


def shipped(families: Sequence[Family], *, name: str, count: int, seed: int = 0) -> Workload:
    """Return `count` held-out items of each family, of all levels.

    Raises:
        InvalidMeasurement: A family has fewer.
    """
    items: list[Item] = []
    for family in families:
        try:
            drawn = held_out(family, count=count, seed=seed, levels=ALL_LEVELS)
        except ValueError as error:
            raise InvalidMeasurement(f"--count is {count}: {error}") from error
        items.extend(
            Item(
                id=str(number),
                family=family.value,
                messages=(Message(role="user", content=item.prompt),),
                references=item.references,
                scorer=Scorer(item.scorer.value),
                max_tokens=_FAMILY_TOKENS,
            )
            for number, item in enumerate(drawn, start=1)
        )
    return Workload(name=name, items=tuple(items))


def read(path: Path) -> Workload:
    """Return the workload of a JSONL file; empty lines are stepped over.

    Raises:
        InvalidMeasurement: No file, no items, or broken lines, each named.
    """
    items: list[Item] = []
    problems: list[str] = []
    for number, line in _lines(path):
        try:
            items.append(_Line.model_validate_json(line).item(str(number), family=path.stem))
        except ValidationError as error:
            problems.append(f"line {number}: {_told(error)}")
    problems = problems or _doubles(items)
    if problems:
        more = len(problems) - _SHOWN_LINES
        rest = [f"and {more} more"] if more > 0 else []
        raise InvalidMeasurement("\n  ".join([f"{path}:", *problems[:_SHOWN_LINES], *rest]))
    if not items:
        raise InvalidMeasurement(f"{path} is empty; it needs a JSON object on each line, {_SHAPE}")
    return Workload(name=str(path), items=tuple(items))


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        data = path.read_bytes()
    except OSError as error:
        known = ", ".join((FAMILIES, *Family))
        raise InvalidMeasurement(
            f"{path} cannot be read ({error.strerror}); give the path of a JSONL file, or one of"
            f" {known}"
        ) from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InvalidMeasurement(
            f"{path}, line {number}: byte 0x{data[error.start]:02x} is no UTF-8; save it as UTF-8"
        ) from error
    lines = enumerate(text.split("\n"), start=1)
    return [(number, line) for number, line in lines if line.strip()]


def _doubles(items: Sequence[Item]) -> list[str]:
    seen: set[str] = set()
    problems: list[str] = []
    for item in items:
        if item.name in seen:
            problems.append(f"`id` {item.id!r} comes twice in family {item.family}; wanted once")
        seen.add(item.name)
    return problems


_SHAPE = '{"prompt": "2 + 2?", "reference": "4", "scorer": "number"}'

_Role = Literal["system", "developer", "user", "assistant"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Turn(_Strict):
    role: _Role
    content: str


def _kind(prompt: object) -> str:
    return "messages" if isinstance(prompt, list) else "text"


_Prompt = Annotated[
    Annotated[_Text, Tag("text")] | Annotated[list[_Turn], Field(min_length=1), Tag("messages")],
    Discriminator(_kind),
]


class _Line(_Strict):
    """A line as people type it."""

    prompt: _Prompt
    scorer: Scorer
    reference: str | None = None
    references: Annotated[list[str], Field(min_length=1)] | None = None
    id: _Text | None = None
    family: _Text | None = None
    system: str | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 256
    completion: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> _Line:
        if (self.reference is None) == (self.references is None):
            both = "none of them" if self.reference is None else "both"
            raise ValueError(f"wanted `reference` or `references`, got {both}")
        if self.completion and (not isinstance(self.prompt, str) or self.system is not None):
            raise ValueError("`completion` wants a `prompt` that is text, and no `system`")
        return self

    def item(self, number: str, *, family: str) -> Item:
        turns = (
            [_Turn(role="user", content=self.prompt)]
            if isinstance(self.prompt, str)
            else (self.prompt)
        )
        system = [] if self.system is None else [_Turn(role="system", content=self.system)]
        return Item(
            id=self.id or number,
            family=self.family or family,
            messages=tuple(
                Message(role=turn.role, content=turn.content) for turn in [*system, *turns]
            ),
            references=tuple(
                [self.reference] if self.reference is not None else self.references or ()
            ),
            scorer=self.scorer,
            max_tokens=self.max_tokens,
            completion=self.completion,
        )


def _told(error: ValidationError) -> str:
    """Return all that is wrong with one line: what, wanted and got."""
    return "; ".join(dict.fromkeys(_problem(found) for found in error.errors(include_url=False)))


def _problem(found: ErrorDetails) -> str:
    place = ".".join(str(part) for part in found["loc"])
    if not place:
        whole = f": {_shown(found['input'])}" if found["type"] != "value_error" else ""
        return found["msg"].removeprefix("Value error, ") + whole
    match found["type"]:
        case "missing":
            return f"`{place}` is missing; an item looks like {_SHAPE}"
        case "extra_forbidden":
            return f"`{place}` is unknown; wanted one of {', '.join(_Line.model_fields)}"
        case "enum":
            return f"`{place}` is {_shown(found['input'])}; wanted one of {', '.join(Scorer)}"
        case _:
            return f"`{place}` is {_shown(found['input'])}; {found['msg'].lower()}"


def _shown(value: Any) -> str:
    told = json.dumps(value, ensure_ascii=False, default=str)
    return told if len(told) <= _SHOWN_CHARACTERS else told[:_SHOWN_CHARACTERS] + "..."
