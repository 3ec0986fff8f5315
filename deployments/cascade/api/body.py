"""The base of the bodies that clients send, and the errors of invalid ones."""

from __future__ import annotations

import re
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic_core import PydanticCustomError

from cascade.errors import InvalidRequest, UnsupportedParameter, wanted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from pydantic import GetCoreSchemaHandler
    from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails

B = TypeVar("B", bound="Body")

Json: TypeAlias = dict[str, Any]

# Unknown fields of a whole body may be null.
_UNKNOWN = {"extra_forbidden", "none_required", "unexpected_keyword_argument"}

_QUOTED = re.compile(r"'([^']*)'")

_NO_TEXT = re.compile(r"(input_)?(image|audio|video|file)")

_MAX_VALUE_LENGTH = 80  # characters of a wrong value in an error

_MAX_REASONS = 4  # of one error

_MAX_NAMES = 24  # that an error lists; a body has twice as many fields

_MAX_DETAILS = 64  # of pydantic's, that an error is made of

# The names and objects of a body. Each that is wrong takes pydantic 40 us, and a name 5 bytes.
_MAX_NODES = 2**15
_LARGE_BYTES = 2**16  # a smaller body cannot have many
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)  # the last may lack its end


def _fail_fast(schema: Any) -> None:
    """Let lists have one error each: for a million wrong items pydantic needs minutes."""
    if isinstance(schema, list):
        for one in schema:
            _fail_fast(one)
    elif isinstance(schema, dict):
        if schema.get("type") in ("list", "tuple", "set"):  # a field may have this name
            schema["fail_fast"] = True
        for one in schema.values():
            _fail_fast(one)


class Body(BaseModel):
    """Base of every body and its objects: frozen, without unknown fields or NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
    unsupported: ClassVar[frozenset[str]] = frozenset()
    """Fields that are known, and not implemented."""
    expected: ClassVar[dict[str, str]] = {}
    """What values of some fields must be, where the union of their types says it badly."""

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: type[BaseModel], handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        """Return the schema, whose lists have one error each."""
        schema = handler(source)
        _fail_fast(schema)
        return schema


def text_alone(kind: object) -> object:
    """Return the type of a part of a message.

    Raises:
        ValueError: It is an image, sound, a video or a file, which no model here is given.
    """
    if isinstance(kind, str) and _NO_TEXT.match(kind):
        raise ValueError(
            f"{kind!r} is no text, and this server gives models text alone, also those that read "
            "images or sound; leave it out"
        )
    return kind


def parse(data: bytes, kind: type[B]) -> B:
    """Return the body.

    Raises:
        InvalidRequest: The bytes are not a JSON object of this kind; `param` names the first
            wrong field.
        UnsupportedParameter: A field is unknown, or requests what this server does not implement.
    """
    if len(data) >= _LARGE_BYTES:
        _check_nodes(data)
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise invalid_request(error, kind) from None


def _check_nodes(data: bytes) -> None:
    """Raise InvalidRequest if a JSON text has more names and objects than a request needs."""
    bare = _STRING.sub(b"", data)
    count = sum(map(bare.count, (b":", b"{", b"[")))
    if count > _MAX_NODES:
        raise InvalidRequest(
            f"The body has {count} names, objects and lists; this server reads up to {_MAX_NODES}"
        )


def invalid_request(error: ValidationError, kind: type[Body]) -> InvalidRequest:
    """Return our error for the first wrong field that pydantic found in a body of this kind."""
    details = error.errors(include_url=False)[:_MAX_DETAILS]
    if not details[0]["loc"]:
        return InvalidRequest(f"The body is invalid: {details[0]['msg']}")
    detail = _closest(details)
    field = str(detail["loc"][0])
    if field in kind.unsupported and field not in kind.__annotations__:
        return UnsupportedParameter(f"`{field}` is not supported here; leave it out", param=field)
    if field in kind.expected:
        text = f"`{field}` is {_shorten(details[0]['input'])}: {kind.expected[field]}"
        return InvalidRequest(text, param=field)
    problem = _problem(detail, kind)
    similar = [one for one in (_problem(one, kind) for one in details) if one.path == problem.path]
    reasons = list(dict.fromkeys(one.reason for one in similar))[:_MAX_REASONS]
    text = f"`{problem.path}` {problem.finding}{'; or '.join(reasons)}"
    if detail["type"] in _UNKNOWN and len(detail["loc"]) == 1:
        return UnsupportedParameter(text, param=field)
    return InvalidRequest(text, param=problem.path)


def renamed(error: InvalidRequest, path: Callable[[str], str]) -> InvalidRequest:
    """Return the error with other names of its fields; `path` gives that of each."""
    message = re.sub("`([^`]+)`", lambda match: f"`{path(match[1])}`", error.message)
    return type(error)(message, param=error.param and path(error.param))


def in_plain_words(error: ValidationError, kind: type[BaseModel]) -> ValidationError:
    """Return the errors of settings of this kind in our words; they follow the name of a place."""
    lines: list[InitErrorDetails] = []
    for detail in error.errors(include_url=False):
        problem = _problem(detail, kind)
        text = f"{problem.finding}{problem.reason}"
        ours = PydanticCustomError("invalid_setting", "{text}", {"text": text})
        lines.append({"type": ours, "loc": detail["loc"], "input": detail["input"]})
    return ValidationError.from_exception_data(error.title, lines, hide_input=True)


def _closest(details: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return the innermost error of the first wrong field: its union member came closest.

    What is missing because its name is mistyped comes after the mistyped name.
    """
    first = min(details, key=lambda one: one["type"] == "missing")
    same = [one for one in details if one["loc"][0] == first["loc"][0]]
    rank = {"missing": 0} | dict.fromkeys(_UNKNOWN, 2)
    return max(same, key=lambda one: (len(one["loc"]), rank.get(one["type"], 1)))


class _Problem(NamedTuple):
    path: str  # as OpenAI writes it: `messages[0].role`
    finding: str
    reason: str = ""


def _problem(detail: ErrorDetails, kind: type[BaseModel]) -> _Problem:
    """Return an error of pydantic in our words, with the nearest name where one is mistyped."""
    *outer, last = detail["loc"] or ("",)
    context = detail.get("ctx", {})
    found = f"is {_shorten(detail['input'])}: "
    path, _ = _walk(detail["loc"], kind)
    match detail["type"]:
        case "missing":
            return _Problem(path, "is missing")
        case "union_tag_not_found":
            return _Problem(path, "has no `kind`")
        case "union_tag_invalid":
            tags = wanted(context["tag"], _QUOTED.findall(context["expected_tags"]))
            return _Problem(path, f"has kind {context['tag']!r}: ", tags)
        case "enum" | "literal_error" if len(valid := _QUOTED.findall(context["expected"])) > 1:
            return _Problem(path, found, wanted(detail["input"], valid))
        case unknown if unknown in _UNKNOWN:
            path, names = _walk(outer, kind)
            return _Problem(_join(path, last), "is unknown here; ", _instead(str(last), names))
        case other:
            reason = detail["msg"].removeprefix("Value error, ").replace("Input should", "it must")
            return _Problem(path, "is wrong: " if other == "value_error" else found, reason)


def _instead(name: str, valid: list[str]) -> str:
    """Return what to do about a field that there is not."""
    if not valid or name in valid:
        return "leave it out"
    every, _, meant = wanted(name, valid).partition("; ")
    if len(valid) > _MAX_NAMES:
        return meant or "leave it out"
    return f"{every}; {meant}" if meant else every


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_VALUE_LENGTH else f"{text[:_MAX_VALUE_LENGTH]}..."


def _join(path: str, part: str | int) -> str:
    return f"{path}[{part}]" if isinstance(part, int) else f"{path}.{part}".removeprefix(".")


def _walk(place: Iterable[str | int], kind: type[BaseModel]) -> tuple[str, list[str]]:
    """Return the path of a place that pydantic names, and the fields that there may be.

    Pydantic's place also names the members of unions that it tried; the path does not.
    """
    schema = _schema(kind)

    def members(one: Json) -> list[Json]:
        if "$ref" in one:
            return members(schema["$defs"][one["$ref"].rpartition("/")[2]])
        choices = [*one.get("anyOf", ()), *one.get("oneOf", ())]
        return [member for choice in choices for member in members(choice)] or [one]

    path, here = "", members(schema)
    for part in place:
        fields = [one.get("properties", {}) | {0: one.get("items", {})} for one in here]
        key = 0 if isinstance(part, int) else part
        inside = [member for one in fields if key in one for member in members(one[key])]
        if inside:
            path, here = _join(path, part), inside
        else:
            here = [one for one in here if _kind(one) == part] or here
    names = dict.fromkeys(name for one in here for name in one.get("properties", ()))
    return path, [name for name in names if name != "kind"]


def _kind(schema: Json) -> object:
    return schema.get("properties", {}).get("kind", {}).get("const")


@cache
def _schema(kind: type[BaseModel]) -> Json:
    return kind.model_json_schema()
