"""Workloads: items to ask with their right answers, from a JSONL file or the shipped families.

A line of a file is one JSON object:

| field | value |
|---|---|
| `prompt` | text, sent as a chat's user message, or a list of `{"role": ..., "content": ...}` |
| `reference` or `references` | a right answer, or a list of them; assertions for `program` |
| `scorer` | one of `cascade.evaluation.scoring` |
| `id` | the line's number if absent |
| `family` | results are reported for each family; the file's name if absent |
| `system` | a system message before the prompt |
| `max_tokens` | of the answer, 256 if absent |
| `completion` | true continues the text of `prompt` instead of answering it |
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
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

from cascade.errors import InvalidMeasurement, wanted
from cascade.evaluation.tasks import Scorer, TaskFamily, held_out

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

FAMILIES = "families"

_FAMILY_TOKENS = 96

_MAX_PROBLEMS = 10  # shown of a broken file

_MAX_CHARACTERS = 60  # shown of a broken value

_EXAMPLE = '{"prompt": "2 + 2?", "reference": "4", "scorer": "number"}'

_Text = Annotated[str, Field(min_length=1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One message of a chat."""

    role: str
    content: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question and its right answers."""

    id: str  # of its family
    family: str
    messages: tuple[Message, ...]
    references: tuple[str, ...]
    scorer: Scorer
    max_tokens: int = 256
    completion: bool = False  # whether the only message is text to continue

    @property
    def name(self) -> str:
        """Return a name that is unique in the workload."""
        return f"{self.family}/{self.id}"


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Items in order; `name` is as given to `load`."""

    name: str
    items: tuple[Item, ...]

    @cached_property
    def digest(self) -> str:
        """Return a hash of all items."""
        items = json.dumps([asdict(item) for item in self.items], sort_keys=True)
        return hashlib.sha256(items.encode()).hexdigest()

    @property
    def families(self) -> tuple[str, ...]:
        """Return the families, in order of first appearance."""
        return tuple(dict.fromkeys(item.family for item in self.items))


def load(name: str, *, count: int | None = None, seed: int = 0) -> Workload:
    """Return a workload.

    Args:
        name: `families` for all that ship, names of some, separated by commas, or the path of a
            JSONL file.
        count: Items of each family; 100, or the whole file, if absent.
        seed: Of the draw of held-out items.

    Raises:
        InvalidMeasurement: There is no such workload, the file has invalid lines, or a family has
            fewer items.
    """
    names = name.split(",")
    if name == FAMILIES or set(names) <= set(TaskFamily):
        families = tuple(TaskFamily) if name == FAMILIES else [TaskFamily(one) for one in names]
        size = 100 if count is None else count
        items = [
            item
            for family in dict.fromkeys(families)
            for item in _held_out(family, count=size, seed=seed)
        ]
        return Workload(name=name, items=tuple(items))
    workload = read(Path(name))
    if count is None:
        return workload
    kept = [
        item
        for family in workload.families
        for item in [item for item in workload.items if item.family == family][:count]
    ]
    return Workload(name=workload.name, items=tuple(kept))


def _held_out(family: TaskFamily, *, count: int, seed: int) -> list[Item]:
    try:
        items = held_out(family, count=count, seed=seed)
    except ValueError as error:
        raise InvalidMeasurement(f"--count is {count}: {error}") from error
    return [
        Item(
            id=str(number),
            family=family.value,
            messages=(Message(role="user", content=item.prompt),),
            references=item.references,
            scorer=item.scorer,
            max_tokens=_FAMILY_TOKENS,
        )
        for number, item in enumerate(items, start=1)
    ]


def read(path: Path) -> Workload:
    """Return the workload of a JSONL file; empty lines are skipped.

    Raises:
        InvalidMeasurement: The file cannot be read, is empty or has invalid lines.
    """
    items: list[Item] = []
    problems: list[str] = []
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if line.strip():
            try:
                items.append(
                    _WorkloadLine.model_validate_json(line).item(str(number), family=path.stem)
                )
            except ValidationError as error:
                found = map(_describe, error.errors(include_url=False))
                problems.append(f"line {number}: {'; '.join(dict.fromkeys(found))}")
    ids = Counter((item.id, item.family) for item in items)
    problems = problems or [
        f"`id` {id_!r} comes twice in family {family}; wanted once"
        for (id_, family), count in ids.items()
        if count > 1
    ]
    if problems:
        more = len(problems) - _MAX_PROBLEMS
        rest = [f"and {more} more"] if more > 0 else []
        raise InvalidMeasurement("\n  ".join([f"{path}:", *problems[:_MAX_PROBLEMS], *rest]))
    if not items:
        raise InvalidMeasurement(
            f"{path} is empty; it needs a JSON object on each line, {_EXAMPLE}"
        )
    return Workload(name=str(path), items=tuple(items))


def _read_text(path: Path) -> str:
    try:
        data = path.read_bytes()
    except OSError as error:
        known = ", ".join((FAMILIES, *TaskFamily))
        raise InvalidMeasurement(
            f"{path} cannot be read ({error.strerror}); give the path of a JSONL file, or one of"
            f" {known}"
        ) from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise InvalidMeasurement(
            f"{path}, line {number}: byte 0x{data[error.start]:02x} is no UTF-8; save it as UTF-8"
        ) from error


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Message(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str


_Prompt = Annotated[
    Annotated[_Text, Tag("text")] | Annotated[list[_Message], Field(min_length=1), Tag("messages")],
    Discriminator(lambda prompt: "messages" if isinstance(prompt, list) else "text"),
]


class _WorkloadLine(_Strict):
    """A line of a file."""

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
    def _check(self) -> _WorkloadLine:
        if (self.reference is None) == (self.references is None):
            given = "none of them" if self.reference is None else "both"
            raise ValueError(f"wanted `reference` or `references`, got {given}")
        if self.completion and (not isinstance(self.prompt, str) or self.system is not None):
            raise ValueError("`completion` wants a `prompt` that is text, and no `system`")
        return self

    def item(self, number: str, *, family: str) -> Item:
        messages = [] if self.system is None else [Message(role="system", content=self.system)]
        if isinstance(self.prompt, str):
            messages.append(Message(role="user", content=self.prompt))
        else:
            messages += [Message(role=one.role, content=one.content) for one in self.prompt]
        return Item(
            id=self.id or number,
            family=self.family or family,
            messages=tuple(messages),
            references=tuple(self.references or [self.reference or ""]),
            scorer=self.scorer,
            max_tokens=self.max_tokens,
            completion=self.completion,
        )


def _describe(error: ErrorDetails) -> str:
    """Return what is wrong with a line: the field, what was expected and what was given."""
    field = ".".join(str(part) for part in error["loc"])
    given = _shorten(error["input"])
    match error["type"]:
        case "value_error" if not field:
            return error["msg"].removeprefix("Value error, ")
        case _ if not field:
            return f"{error['msg']}: {given}"
        case "missing":
            return f"`{field}` is missing; an item looks like {_EXAMPLE}"
        case "extra_forbidden":
            return f"`{field}` is unknown; {wanted(field, _WorkloadLine.model_fields)}"
        case "enum":
            return f"`{field}` is {given}; {wanted(error['input'], Scorer)}"
        case _:
            return f"`{field}` is {given}; {error['msg'].replace('Input should', 'it must')}"


def _shorten(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= _MAX_CHARACTERS else text[:_MAX_CHARACTERS] + "..."
