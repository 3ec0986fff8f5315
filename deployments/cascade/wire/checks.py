"""What a decoder demands of a number that came over the wire."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from cascade.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

# A float32 softmax may exceed 1 by its rounding.
LARGEST_PROBABILITY = 1 + 1e-4


def whole(value: int, name: str, *, least: int = 0) -> int:
    """Return the value; raises InvalidRequest if it is below `least`."""
    if value < least:
        raise InvalidRequest(f"`{name}` is {value}; it must be at least {least}", param=name)
    return value


def finite(value: float, name: str) -> float:
    """Return the value; raises InvalidRequest if it is infinite or not a number."""
    if not math.isfinite(value):
        raise InvalidRequest(f"`{name}` is {value}; it must be finite", param=name)
    return value


def within(value: float, name: str, low: float, high: float) -> float:
    """Return the value; raises InvalidRequest unless `low` <= value <= `high`."""
    if not low <= value <= high:
        raise InvalidRequest(f"`{name}` is {value}; it must be {low} to {high}", param=name)
    return value


def probabilities(values: Sequence[float], name: str) -> tuple[float, ...]:
    """Return the values; raises InvalidRequest if one is not a probability."""
    for value in values:
        within(value, name, 0.0, LARGEST_PROBABILITY)
    return tuple(values)


def length(count: int, name: str, *allowed: int) -> None:
    """Raise InvalidRequest unless a list has one of the allowed lengths."""
    if count not in allowed:
        wanted = " or ".join(str(number) for number in sorted(set(allowed)))
        raise InvalidRequest(f"`{name}` has {count} entries; it must have {wanted}", param=name)
