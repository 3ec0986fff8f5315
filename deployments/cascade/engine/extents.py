"""Contiguous stretches of the KV cache: one per session, in size classes, first fit."""

from __future__ import annotations

import bisect
from dataclasses import dataclass

SMALLEST = 128
_UNIT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Rows `start .. start + size` of the pool."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """Return the row after the last."""
        return self.start + self.size


def size_class(tokens: int) -> int:
    """Return the rows an extent for `tokens` has: 128, 256, 512, then multiples of 1024.

    Few sizes put sessions at equal distances, which lets attention read a run of them as one view.
    """
    size = SMALLEST
    while size < min(tokens, _UNIT):
        size *= 2
    return size if size >= tokens else -(-tokens // _UNIT) * _UNIT


class ExtentAllocator:
    """First fit over a sorted list of free stretches; neighbours merge when they come back."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []  # (start, size), ascending, never adjacent

    @property
    def used(self) -> int:
        """Return the rows that are given out."""
        return self.capacity - sum(size for _, size in self._free)

    def allocate(self, tokens: int) -> Extent | None:
        """Return an extent of at least `tokens` rows, or None if no free stretch is long enough."""
        wanted = size_class(tokens)
        for place, (start, size) in enumerate(self._free):
            if size >= wanted:
                self._take(place, wanted)
                return Extent(start=start, size=wanted)
        return None

    def extend(self, extent: Extent, tokens: int) -> Extent | None:
        """Return `extent` grown in place to `tokens` rows, or None if what follows is not free."""
        more = size_class(tokens) - extent.size
        place = bisect.bisect_left(self._free, (extent.end, 0))
        if place == len(self._free) or self._free[place][0] != extent.end:
            return None
        if self._free[place][1] < more:
            return None
        self._take(place, more)
        return Extent(start=extent.start, size=extent.size + more)

    def release(self, extent: Extent) -> None:
        """Take `extent` back."""
        start, size = extent.start, extent.size
        place = bisect.bisect_left(self._free, (start, 0))
        if place < len(self._free) and self._free[place][0] == extent.end:
            size += self._free.pop(place)[1]
        if place and sum(self._free[place - 1]) == start:
            place -= 1
            start, before = self._free.pop(place)
            size += before
        self._free.insert(place, (start, size))

    def _take(self, place: int, count: int) -> None:
        start, size = self._free.pop(place)
        if size > count:
            self._free.insert(place, (start + count, size - count))
