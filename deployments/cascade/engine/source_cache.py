"""Which sources of an encoder-decoder are encoded, and where their cross-attention states are.

A source is encoded once for all sessions that read it: branches, choices, and later requests. It
loses its slots when others need them, least recently used first, and is encoded again when one of
its sessions runs next.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

from cascade.engine.kv_pool import KVRangeAllocator

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.engine.kv_pool import KVRange


@dataclass(frozen=True, slots=True)
class Source:
    """What an encoder reads; sources with the same digest are the same."""

    tokens: tuple[int, ...] = field(compare=False)
    digest: bytes

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Source:
        """Return the source with these tokens."""
        data = np.asarray(tokens, np.uint32).tobytes()
        return cls(tuple(tokens), blake2b(data, digest_size=16).digest())


class SourceCache:
    """Slots of the sources that are encoded, or will be in the current cycle.

    Args:
        capacity: Slots of the pool.
        budget: Tokens to encode in a cycle; a longer source has one for itself.
    """

    def __init__(self, *, capacity: int, budget: int) -> None:
        self._allocator = KVRangeAllocator(capacity=capacity)
        self._budget = budget
        self._ranges: dict[Source, KVRange] = {}  # least recently used first
        self._planned: set[Source] = set()  # used by the current cycle
        self._left = budget
        self.waiting: list[Source] = []  # to encode in the current cycle, in this order
        self.hits = 0  # sessions that began with an encoded source
        self.encoded_tokens = 0

    @property
    def capacity(self) -> int:
        """Return the capacity in tokens."""
        return self._allocator.capacity

    @property
    def used_tokens(self) -> int:
        """Return the number of allocated slots."""
        return self._allocator.used

    def __contains__(self, source: Source) -> bool:
        return source in self._ranges

    def slots(self, source: Source) -> range:
        """Return the slots of an encoded source."""
        start = self._ranges[source].start
        return range(start, start + len(source.tokens))

    def begin_cycle(self) -> None:
        """Let all sources lose their slots to those of the cycle that is planned next."""
        self._planned.clear()
        self.waiting.clear()
        self._left = self._budget

    def reserve(self, source: Source) -> bool:
        """Plan the use of a source; False if it has to wait for another cycle to be encoded."""
        if source not in self._ranges:
            count = len(source.tokens)
            if self.waiting and count > self._left:
                return False
            kv_range = self._allocate(count)
            if kv_range is None:
                return False
            self._left -= count
            self._ranges[source] = kv_range
            self.waiting.append(source)
        self._ranges[source] = self._ranges.pop(source)
        self._planned.add(source)
        return True

    def drop(self, source: Source) -> None:
        """Free the slots of a source, whose states are not there or not valid."""
        kv_range = self._ranges.pop(source, None)
        if kv_range is not None:
            self._allocator.release(kv_range)

    def _allocate(self, tokens: int) -> KVRange | None:
        kv_range = self._allocator.allocate(tokens)
        for victim in list(self._ranges):
            if kv_range is not None:
                break
            if victim not in self._planned:
                self.drop(victim)
                kv_range = self._allocator.allocate(tokens)
        return kv_range
