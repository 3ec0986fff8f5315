"""Parses a body, and turns pydantic's errors into errors that name the field."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, TypeVar, get_args

from pydantic import ValidationError

from cascade.api import schema
from cascade.errors import InvalidRequest, UnsupportedParameter
from cascade.rules import Rule

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

B = TypeVar("B", bound=schema.Body)

_FIELDS = schema.fields() | {
    field.name for rule in get_args(Rule) for field in dataclasses.fields(rule)
}

_UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})

_EXPECTED = {
    "prompt": "it must be a string, a list of strings, a list of token ids or a list of such lists,"
    " and none of them empty"
}

_MAX_VALUE_LENGTH = 80

_MAX_REASONS = 4


def parse(data: bytes, kind: type[B]) -> B:
    """Return the body.

    Raises:
        InvalidRequest: The bytes are not a JSON object of this kind; `param` names the first
            wrong field.
        UnsupportedParameter: A field is unknown, or requests what this server does not implement.
    """
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise invalid_request(error) from None


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Return our error for the first wrong field that pydantic found."""
    details = error.errors(include_url=False, include_context=False)
    if not details[0]["loc"]:
        return InvalidRequest(f"The body is invalid: {details[0]['msg']}")
    detail = _deepest(details)
    field = str(detail["loc"][0])
    if field in schema.UNSUPPORTED:
        return UnsupportedParameter(f"`{field}` is not supported here; leave it out", param=field)
    if detail["type"] in _UNKNOWN and len(detail["loc"]) == 1:
        return UnsupportedParameter(f"`{field}` is unknown here; leave it out", param=field)
    param = _param(detail)
    if detail["type"] == "missing":
        return InvalidRequest(f"`{param}` is missing", param=param)
    reasons = dict.fromkeys(other["msg"] for other in details if _param(other) == param)
    expected = _EXPECTED.get(param) or "; or ".join(list(reasons)[:_MAX_REASONS])
    value = repr(detail["input"])
    if len(value) > _MAX_VALUE_LENGTH:
        value = f"{value[:_MAX_VALUE_LENGTH]}..."
    return InvalidRequest(f"`{param}` is {value}: {expected}", param=param)


def _deepest(details: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return the innermost error of the first wrong field: its union member came closest."""
    field = details[0]["loc"][0]
    if field in _EXPECTED:
        return {**details[0], "loc": (field,)}
    return max((one for one in details if one["loc"][0] == field), key=lambda one: len(one["loc"]))


def _param(detail: ErrorDetails) -> str:
    """Return the path of a field as OpenAI writes it: `messages[0].content`."""
    *path, last = detail["loc"]
    parts = [part for part in path if isinstance(part, int) or part in _FIELDS]
    if detail["type"] in _UNKNOWN or isinstance(last, int) or last in _FIELDS:
        parts.append(last)
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")
