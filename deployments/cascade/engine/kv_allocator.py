"""The size of the KV cache and the allocation of contiguous slot ranges in it."""

from __future__ import annotations

import bisect
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from cascade.engine.settings import EngineSettings

MIN_RANGE = 128

_UNIT = 1024

_CPU_BYTES = 2**30

_CPU_SHARE = 0.25  # of the free memory

_ACCELERATOR_SHARE = 0.8

_UNBOUNDED_CONTEXT = 8192


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRange:
    """Slots `start .. start + size` of the pool."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """Return the slot after the last."""
        return self.start + self.size


def size_class(tokens: int) -> int:
    """Return the slots of a range for `tokens`: 128, 256, 512, then multiples of 1024.

    With few sizes, sessions often lie at equal distances, and attention reads a run of such
    sessions as one strided view.
    """
    size = MIN_RANGE
    while size < min(tokens, _UNIT):
        size *= 2
    return size if size >= tokens else -(-tokens // _UNIT) * _UNIT


class KVRangeAllocator:
    """First-fit allocation from a sorted list of free ranges; free neighbours are merged."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []  # (start, size), ascending, never adjacent

    @property
    def used(self) -> int:
        """Return the number of allocated slots."""
        return self.capacity - sum(size for _, size in self._free)

    def allocate(self, tokens: int) -> KVRange | None:
        """Return a range of at least `tokens` slots, or None if no free range is long enough."""
        needed = size_class(tokens)
        for index, (start, size) in enumerate(self._free):
            if size >= needed:
                self._take(index, needed)
                return KVRange(start=start, size=needed)
        return None

    def extend(self, kv_range: KVRange, tokens: int) -> KVRange | None:
        """Return the range grown in place to `tokens` slots, or None if the next are not free."""
        more = size_class(tokens) - kv_range.size
        index = bisect.bisect_left(self._free, (kv_range.end, 0))
        if index == len(self._free) or self._free[index][0] != kv_range.end:
            return None
        if self._free[index][1] < more:
            return None
        self._take(index, more)
        return KVRange(start=kv_range.start, size=kv_range.size + more)

    def release(self, kv_range: KVRange) -> None:
        """Free `kv_range`."""
        start, size = kv_range.start, kv_range.size
        index = bisect.bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == kv_range.end:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start, before = self._free.pop(index)
            size += before
        self._free.insert(index, (start, size))

    def _take(self, index: int, count: int) -> None:
        start, size = self._free.pop(index)
        if size > count:
            self._free.insert(index, (start + count, size - count))


def capacity_tokens(
    settings: EngineSettings,
    *,
    device: torch.device,
    bytes_per_token: int,
    context_length: int | None,
) -> int:
    """Return the cache's size in tokens: as set, else what fits memory and sessions can use.

    Args:
        settings: The engine's settings.
        device: The device that holds the cache.
        bytes_per_token: Memory of one token in all layers.
        context_length: The model's limit in tokens; None if unknown.
    """
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
