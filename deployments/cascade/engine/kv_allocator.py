"""How many tokens the KV cache of an engine holds."""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cascade.engine.settings import EngineSettings

SMALLEST = 128

_UNIT = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRange:
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


class KVRangeAllocator:
    """First fit over a sorted list of free stretches; neighbours merge when they come back."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []  # (start, size), ascending, never adjacent

    @property
    def used(self) -> int:
        """Return the rows that are given out."""
        return self.capacity - sum(size for _, size in self._free)

    def allocate(self, tokens: int) -> KVRange | None:
        """Return an extent of at least `tokens` rows, or None if no free stretch is long enough."""
        wanted = size_class(tokens)
        for place, (start, size) in enumerate(self._free):
            if size >= wanted:
                self._take(place, wanted)
                return KVRange(start=start, size=wanted)
        return None

    def extend(self, extent: KVRange, tokens: int) -> KVRange | None:
        """Return `extent` grown in place to `tokens` rows, or None if what follows is not free."""
        more = size_class(tokens) - extent.size
        place = bisect.bisect_left(self._free, (extent.end, 0))
        if place == len(self._free) or self._free[place][0] != extent.end:
            return None
        if self._free[place][1] < more:
            return None
        self._take(place, more)
        return KVRange(start=extent.start, size=extent.size + more)

    def release(self, extent: KVRange) -> None:
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


_CPU_BYTES = 2**30

_CPU_SHARE = 0.25  # of the memory that is free

_ACCELERATOR_SHARE = 0.8

_UNBOUNDED_CONTEXT = 8192


def capacity_tokens(
    settings: EngineSettings,
    *,
    device: torch.device,
    bytes_per_token: int,
    context_length: int | None,
) -> int:
    """Return the cache's size: as set, else what memory allows and the sessions can use."""
    if settings.cache_tokens:
        return size_class(settings.cache_tokens)
    budget = settings.cache_bytes or _free_bytes(device)
    useful = settings.max_sessions * size_class(context_length or _UNBOUNDED_CONTEXT)
    return size_class(max(1, min(budget // max(bytes_per_token, 1), useful)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _ACCELERATOR_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_BYTES, int(free * _CPU_SHARE))
