"""Deferral rules as messages; the bounds are those that `decoding.rules` annotates."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import TYPE_CHECKING, Any, TypeAlias, get_args, get_type_hints

from annotated_types import Ge, GroupedMetadata, Gt, Le, Lt, Predicate

from cascade.decoding.rules import Rule
from cascade.errors import InvalidRequest
from cascade.v1 import tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

Bound: TypeAlias = Ge | Gt | Le | Lt | Predicate


def _knobs(kind: type[Rule]) -> tuple[Field[Any], ...]:
    return tuple(knob for knob in fields(kind) if knob.name != "kind")


def _name(kind: type[Rule]) -> str:
    return next(str(knob.default) for knob in fields(kind) if knob.name == "kind")


def _bounds(metadata: Iterable[object]) -> Iterator[Bound]:
    for entry in metadata:
        if isinstance(entry, GroupedMetadata):
            yield from _bounds(entry)
        elif isinstance(entry, Ge | Gt | Le | Lt | Predicate):
            yield entry


_KINDS: dict[str, type[Rule]] = {_name(kind): kind for kind in get_args(Rule)}
_BOUNDS: dict[tuple[str, str], tuple[Bound, ...]] = {
    (name, knob): tuple(_bounds(getattr(hint, "__metadata__", ())))
    for name, kind in _KINDS.items()
    for knob, hint in get_type_hints(kind, include_extras=True).items()
}
_BETAS = {"one": tokens_pb2.LOSSY_BETA_ONE, "solved": tokens_pb2.LOSSY_BETA_SOLVED}
_BETA_NAMES: dict[int, str] = {
    tokens_pb2.LOSSY_BETA_UNSPECIFIED: "one",
    tokens_pb2.LOSSY_BETA_ONE: "one",
    tokens_pb2.LOSSY_BETA_SOLVED: "solved",
}


def encode_rule(rule: Rule, to: tokens_pb2.Rule) -> None:
    """Write the rule into the message."""
    message = getattr(to, rule.kind)
    message.SetInParent()
    for knob in _knobs(type(rule)):
        value = getattr(rule, knob.name)
        setattr(message, knob.name, _BETAS[value] if knob.name == "beta" else value)


def decode_rule(message: tokens_pb2.Rule) -> Rule:
    """Return the rule; raises InvalidRequest if a knob is missing or out of its bounds."""
    name = message.WhichOneof("kind")
    if name is None:
        raise InvalidRequest("`rule` has no kind; set exactly one", param="rule")
    kind = _KINDS[name]
    arguments = {knob.name: _argument(name, knob, getattr(message, name)) for knob in _knobs(kind)}
    return kind(**arguments)


def _argument(name: str, knob: Field[Any], message: Any) -> Any:
    if knob.name == "beta":
        return _beta(message.beta)
    if message.HasField(knob.name):
        value = getattr(message, knob.name)
        _check(value, name, knob.name)
        return value
    if knob.default is MISSING:
        raise InvalidRequest(f"`rule.{name}.{knob.name}` is missing", param="rule")
    return knob.default


def _beta(value: int) -> str:
    if value not in _BETA_NAMES:
        raise InvalidRequest(
            f"`rule.lossy.beta` is {value}; it must be LOSSY_BETA_ONE or LOSSY_BETA_SOLVED",
            param="rule",
        )
    return _BETA_NAMES[value]


def _check(value: float, name: str, knob: str) -> None:
    for bound in _BOUNDS[name, knob]:
        if not _holds(value, bound):
            raise InvalidRequest(
                f"`rule.{name}.{knob}` is {value}; it must obey {bound}", param="rule"
            )


def _holds(value: Any, bound: Bound) -> bool:
    match bound:
        case Ge(ge=low):
            return value >= low
        case Gt(gt=low):
            return value > low
        case Le(le=high):
            return value <= high
        case Lt(lt=high):
            return value < high
        case Predicate(func=holds):
            return bool(holds(value))
