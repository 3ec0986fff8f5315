"""Scores of answers that are JSON, and of tool calls.

| column | 1 means |
|---|---|
| `valid` | the answer ended by itself and fits the schema, or each call is of a tool and fits it |
| `fields` | each field of the right value is there; a share of them is partial |
| `tool` | the tools of the right calls were called, no others |
| `quality` | valid, and exactly the right value or calls |

A field is a value without parts, wherever it is: `{"a": 1, "b": [2, 3]}` has three. Objects may
have their keys in any order, and 1 equals 1.0. The order of calls does not count.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from cascade.evaluation.scoring import Score, import_extra

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

Json: TypeAlias = "dict[str, Any]"
_Path: TypeAlias = "tuple[str | int, ...]"


class ToolCall(NamedTuple):
    """A call as a model made it."""

    name: str
    arguments: str  # JSON, if the model wrote it well


class Right(NamedTuple):
    """A right call."""

    name: str
    arguments: Json


class _Shared(NamedTuple):
    """How much of a right value was found."""

    exact: bool
    fields: int  # that are right
    of: int

    @property
    def share(self) -> float:
        return self.fields / self.of if self.of else float(self.exact)


def score_json(text: str, references: Iterable[str], *, schema: Json, ended: bool) -> Score:
    """Return the score of an answer that should be JSON.

    Args:
        text: The answer.
        references: Right values as JSON, of which the nearest counts.
        schema: What the answer must fit.
        ended: Whether the answer ended by itself.
    """
    value = _parsed(text)
    valid = ended and value is not None and _fits(value[0], schema)
    shared = [
        _compared([] if value is None else value, [json.loads(right)]) for right in references
    ]
    return Score(
        quality=float(valid and any(one.exact for one in shared)),
        valid=float(valid),
        fields=max(one.share for one in shared),
    )


def score_calls(
    calls: Sequence[ToolCall], references: Iterable[str], *, tools: Sequence[Json], ended: bool
) -> Score:
    """Return the score of an answer that should call tools.

    Args:
        calls: That the answer made.
        references: Lists of right calls as JSON, of which the nearest counts.
        tools: As the request had them.
        ended: Whether the answer ended by itself.
    """
    parameters = {tool["function"]["name"]: parameters_of(tool) for tool in tools}
    parsed = [(call.name, _parsed(call.arguments)) for call in calls]
    fit = all(
        name in parameters and value is not None and _fits(value[0], parameters[name])
        for name, value in parsed
    )
    found = [(name, [] if value is None else value) for name, value in parsed]
    scores: list[Score] = []
    for text in references:
        right = [Right(**call) for call in json.loads(text)]
        valid = ended and fit and bool(calls or not right)
        shared = _compared_calls(found, right)
        names = sorted(call.name for call in right) == sorted(call.name for call in calls)
        scores.append(
            Score(
                quality=float(valid and shared.exact),
                valid=float(valid),
                fields=shared.share,
                tool=float(names),
            )
        )
    return max(scores, key=lambda one: (one.quality, one.tool, one.fields))


def parameters_of(tool: Mapping[str, Any]) -> Json:
    """Return the schema of a tool's arguments."""
    return {"type": "object"} | (tool["function"].get("parameters") or {})


def check_schema(schema: Json) -> None:
    """Check a JSON schema.

    Raises:
        ValueError: It is none.
    """
    jsonschema = import_extra("jsonschema")
    try:
        _validator(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise ValueError(error.message) from error


def check_fits(value: Any, schema: Json) -> None:
    """Check a value against a schema.

    Raises:
        ValueError: It does not fit.
    """
    problem = next(_validator(schema).iter_errors(value), None)
    if problem is not None:
        raise ValueError(problem.message)


def _fits(value: Any, schema: Json) -> bool:
    return _validator(schema).is_valid(value)


def _validator(schema: Json) -> Any:
    validators = import_extra("jsonschema").validators
    return validators.validator_for(schema, default=validators.Draft202012Validator)(schema)


def _parsed(text: str) -> list[Any] | None:
    """Return the value of JSON text in a list, or None if it is none."""
    try:
        return [json.loads(text, parse_constant=_refuse)]
    except (ValueError, RecursionError):
        return None


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _compared(found: Sequence[Any], right: Sequence[Any]) -> _Shared:
    """Compare at most one value with the right one."""
    ours, theirs = ({} if not values else _fields(values[0]) for values in (found, right))
    same = sum(path in ours and _same(ours[path], value) for path, value in theirs.items())
    exact = bool(found) and len(ours) == same == len(theirs)
    return _Shared(exact=exact, fields=same, of=len(theirs))


def _compared_calls(found: Sequence[tuple[str, Sequence[Any]]], right: Sequence[Right]) -> _Shared:
    """Compare calls with the right ones, each with the nearest that is left of its name."""
    left, total = list(found), _Shared(exact=len(found) == len(right), fields=0, of=0)
    for call in right:
        shared = [
            (_compared(arguments, [call.arguments]), number)
            for number, (name, arguments) in enumerate(left)
            if name == call.name
        ]
        best, number = max(shared, default=(_compared([], [call.arguments]), None))
        if number is not None:
            del left[number]
        total = _Shared(
            exact=total.exact and best.exact,
            fields=total.fields + best.fields,
            of=total.of + best.of,
        )
    return total


def _fields(value: Any, path: _Path = ()) -> dict[_Path, Any]:
    """Return the values without parts by their paths; an empty object or list is one."""
    parts: Iterable[tuple[str | int, Any]] = ()
    if isinstance(value, dict):
        parts = value.items()
    elif isinstance(value, list):
        parts = enumerate(value)
    found: dict[_Path, Any] = {}
    for key, part in parts:
        found |= _fields(part, (*path, key))
    return found or {path: value}


def _same(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and one == other
