"""Bytes of a body to its type, or an error that names the field."""

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

_NAMES = schema.fields() | {
    field.name for rule in get_args(Rule) for field in dataclasses.fields(rule)
}

_UNKNOWN = frozenset({"extra_forbidden", "unexpected_keyword_argument"})

_WANTED = {
    "prompt": "it must be a string, a list of strings, a list of token ids or a list of such lists,"
    " and nothing of it empty"
}

_SHOWN_CHARACTERS = 80

_SHOWN_REASONS = 4


def parse(data: bytes, kind: type[B]) -> B:
    """Return the body that `data` says.

    Raises:
        InvalidRequest: The bytes are no JSON object of this kind; `param` names the first bad
            field.
        UnsupportedParameter: A field is unknown, or asks for what this server does not do.
    """
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise refusal(error) from None


def refusal(error: ValidationError) -> InvalidRequest:
    """Return the error of ours that says what pydantic found first."""
    details = error.errors(include_url=False, include_context=False)
    if not details[0]["loc"]:
        return InvalidRequest(f"The body is not what it should be: {details[0]['msg']}")
    detail = _deepest(details)
    field = str(detail["loc"][0])
    if field in schema.UNSUPPORTED:
        return UnsupportedParameter(f"`{field}` is not supported here; leave it out", param=field)
    if detail["type"] in _UNKNOWN and len(detail["loc"]) == 1:
        return UnsupportedParameter(f"`{field}` is unknown here; leave it out", param=field)
    return _invalid(detail, details)


def _invalid(detail: ErrorDetails, details: Sequence[ErrorDetails]) -> InvalidRequest:
    param = _param(detail)
    if detail["type"] == "missing":
        return InvalidRequest(f"`{param}` is missing", param=param)
    reasons = dict.fromkeys(other["msg"] for other in details if _param(other) == param)
    wanted = _WANTED.get(param) or "; or ".join(list(reasons)[:_SHOWN_REASONS])
    return InvalidRequest(f"`{param}` is {_shown(detail['input'])}: {wanted}", param=param)


def _deepest(details: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return what is wrong furthest inside the first bad field: where a union came closest."""
    field = details[0]["loc"][0]
    if field in _WANTED:
        return {**details[0], "loc": (field,)}
    return max((one for one in details if one["loc"][0] == field), key=lambda one: len(one["loc"]))


def _param(detail: ErrorDetails) -> str:
    """Return the path of a field as OpenAI writes it: `messages[0].content`."""
    *path, last = detail["loc"]
    unknown = detail["type"] in _UNKNOWN
    parts = [part for part in path if isinstance(part, int) or part in _NAMES]
    if unknown or isinstance(last, int) or last in _NAMES:
        parts.append(last)
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else f"{text[:_SHOWN_CHARACTERS]}..."
