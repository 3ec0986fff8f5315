"""Workloads: items to ask with their right answers, from a JSONL file or the shipped families.

A line of a file is one JSON object:

| field | value |
|---|---|
| `prompt` | text, sent as a chat's user message, or a list of `{"role": ..., "content": ...}` |
| `reference` or `references` | a right answer, or a list of them; assertions for `program` |
| `scorer` | one of `cascade.evaluation.scoring` |
| `schema` | with scorer `json`: the JSON schema of the answer; references are JSON values |
| `tools` | with scorer `calls`: in OpenAI's form; a reference is a call or a list of calls |
| `tool_choice` | `required` (if absent) or `auto` |
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
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from cascade.api.schema import Tool
from cascade.errors import InvalidMeasurement, wanted
from cascade.evaluation.structured import check_fits, check_schema, parameters_of
from cascade.evaluation.tasks import (
    Scorer,
    StructuredFamily,
    TaskFamily,
    held_out,
    held_out_structured,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from pydantic_core import ErrorDetails

    from cascade.evaluation.tasks import StructuredItem

Json: TypeAlias = dict[str, Any]

FAMILIES, STRUCTURED = "families", "structured"

_SHIPPED = (*TaskFamily, *StructuredFamily)

_FAMILY_TOKENS = 96

_STRUCTURED_TOKENS = 160

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
    schema: Json | None = None  # of the answer
    tools: tuple[Json, ...] = ()  # that the answer may call
    tool_choice: str = "required"
    has_grammar: bool = True  # False: the request does not hold the answer to schema or tools

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


def load(name: str, *, count: int | None = None, seed: int = 0, free: bool = False) -> Workload:
    """Return a workload.

    Args:
        name: `families` for the six of texts that ship, `structured` for the two of JSON and tool
            calls, names of some, separated by commas, or the path of a JSONL file.
        count: Items of each family; 100, or the whole file, if absent.
        seed: Of the draw of held-out items.
        free: Whether items with a schema or tools come once more without a grammar, in families of
            their own.

    Raises:
        InvalidMeasurement: There is no such workload, the file has invalid lines, or a family has
            fewer items.
    """
    workload = _load(name, count=count, seed=seed)
    if not free:
        return workload
    again = tuple(
        replace(item, has_grammar=False, family=f"{item.family} free")
        for item in workload.items
        if item.schema is not None or item.tools
    )
    if not again:
        raise InvalidMeasurement(
            f"no item of {name} has a `schema` or `tools` to leave out; evaluate it without --free"
        )
    return Workload(name=name, items=(*workload.items, *again))


def _load(name: str, *, count: int | None, seed: int) -> Workload:
    names = {FAMILIES: list(TaskFamily), STRUCTURED: list(StructuredFamily)}.get(
        name, name.split(",")
    )
    if set(names) <= set(_SHIPPED):
        size = 100 if count is None else count
        items = [
            item
            for family in dict.fromkeys(names)
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


def _held_out(family: str, *, count: int, seed: int) -> list[Item]:
    try:
        if family in set(StructuredFamily):
            drawn = held_out_structured(StructuredFamily(family), count=count, seed=seed)
            return [_structured(str(number), family, one) for number, one in enumerate(drawn, 1)]
        items = held_out(TaskFamily(family), count=count, seed=seed)
    except ValueError as error:
        raise InvalidMeasurement(f"--count is {count}: {error}") from error
    return [
        Item(
            id=str(number),
            family=family,
            messages=(Message(role="user", content=item.prompt),),
            references=item.references,
            scorer=item.scorer,
            max_tokens=_FAMILY_TOKENS,
        )
        for number, item in enumerate(items, start=1)
    ]


def _structured(number: str, family: str, item: StructuredItem) -> Item:
    system = () if item.system is None else (Message(role="system", content=item.system),)
    return Item(
        id=number,
        family=family,
        messages=(*system, Message(role="user", content=item.prompt)),
        references=(_to_json([item.right] if item.tools else item.right),),
        scorer=Scorer.CALLS if item.tools else Scorer.JSON,
        max_tokens=_STRUCTURED_TOKENS,
        schema=item.schema,
        tools=item.tools,
    )


def _to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


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
        known = ", ".join((FAMILIES, STRUCTURED, *_SHIPPED))
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


class _RightCall(_Strict):
    """A right call of a tool."""

    name: _Text
    arguments: dict[str, JsonValue] = {}


_CALLS = TypeAdapter(list[_RightCall])


class _WorkloadLine(_Strict):
    """A line of a file."""

    prompt: _Prompt
    scorer: Scorer
    reference: JsonValue = None
    references: Annotated[list[JsonValue], Field(min_length=1)] | None = None
    schema_: dict[str, JsonValue] | None = Field(default=None, alias="schema")
    tools: Annotated[list[dict[str, JsonValue]], Field(min_length=1)] | None = None
    tool_choice: Literal["required", "auto"] = "required"
    id: _Text | None = None
    family: _Text | None = None
    system: str | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 256
    completion: bool = False

    @model_validator(mode="after")
    def _check(self) -> _WorkloadLine:
        given = {"reference", "references"} & self.model_fields_set
        if len(given) != 1:
            raise ValueError(
                f"wanted `reference` or `references`, got {'both' if given else 'none of them'}"
            )
        for scorer, field, value in (
            (Scorer.JSON, "schema", self.schema_),
            (Scorer.CALLS, "tools", self.tools),
        ):
            if (value is not None) != (self.scorer is scorer):
                raise ValueError(f"scorer `{scorer}` and `{field}` go together, got one of them")
        if self.completion and (not isinstance(self.prompt, str) or self.system is not None):
            raise ValueError("`completion` wants a `prompt` that is text, and no `system`")
        if self.completion and (self.schema_ is not None or self.tools is not None):
            raise ValueError("`completion` wants no `schema` and no `tools`; ask as a chat")
        if self.schema_ is not None:
            _check(check_schema, self.schema_, what="`schema` is no JSON schema")
        for tool in self.tools or ():
            _check(_check_tool, tool, what="`tools` has an invalid one")
        for right in self.rights:
            _check(self._check_reference, right, what=f"reference {_shorten(right)}")
        return self

    @property
    def rights(self) -> list[Any]:
        """Return the right answers."""
        return [self.reference] if self.references is None else self.references

    def _check_reference(self, right: Any) -> None:
        if self.schema_ is not None:
            check_fits(right, self.schema_)
        elif self.tools is not None:
            known = {tool["function"]["name"]: parameters_of(tool) for tool in self._tools}
            for call in _CALLS.validate_python(_calls(right)):
                if call.name not in known:
                    raise ValueError(f"no tool `{call.name}`; {wanted(call.name, known)}")
                check_fits(call.arguments, known[call.name])
        elif not isinstance(right, str):
            raise ValueError(f"scorer `{self.scorer}` compares text; put it in quotes")

    @property
    def _tools(self) -> list[dict[str, Any]]:
        return self.tools or []

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
            references=tuple(map(self._text_of, self.rights)),
            scorer=self.scorer,
            max_tokens=self.max_tokens,
            completion=self.completion,
            schema=self.schema_,
            tools=tuple(self._tools),
            tool_choice=self.tool_choice,
        )

    def _text_of(self, right: Any) -> str:
        """Return a right answer as scorers read it."""
        if self.tools is not None:
            calls = [call.model_dump() for call in _CALLS.validate_python(_calls(right))]
            return _to_json(calls)
        return right if self.schema_ is None else _to_json(right)


def _calls(right: Any) -> list[Any]:
    return right if isinstance(right, list) else [right]


def _check_tool(tool: dict[str, Any]) -> None:
    Tool.model_validate(tool)
    check_schema(parameters_of(tool))


def _check(check: Callable[[Any], None], value: Any, *, what: str) -> None:
    """Check a value; what is wrong with it comes after `what` in the error."""
    try:
        check(value)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(map(str, problem["loc"]))
        raise ValueError(f"{what}: `{field}`: {problem['msg']}") from error
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from error


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
