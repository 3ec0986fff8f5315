"""Sequences and the part of each that is cached; prefix reuse, growth, eviction."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from cascade.engine.kv_allocator import KVRange, KVRangeAllocator

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cascade.engine.kv_pool import Pool
    from cascade.types import SessionId

# Shorter prefixes cost less to compute than to look after.
_LEAST_REUSE = 8


@dataclass(slots=True, kw_only=True, eq=False)
class CachedSequence:
    """All tokens of a session, of which the first `cached` have rows in the pool.

    Rows computed under one RoPE regime are of no use in another (see `rope`).
    """

    session: SessionId | None  # None when idle
    trunk: SessionId | None = None  # of a branch
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    regime: int = 0
    extent: KVRange | None = None
    reused: int = 0  # tokens found in the cache when the session opened
    used: int = 0  # tick of the last use

    def rewrite(self, *, base: int, tokens: Sequence[int], regime: int) -> None:
        """Keep `base` tokens and append `tokens`; rows of tokens that stay the same stay cached."""
        same = common_prefix(self.tokens[base:], tokens)
        self.cached = min(self.cached, base + same) if regime == self.regime else 0
        self.tokens[base:] = tokens
        self.regime = regime


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens both begin with."""
    low, high = 0, min(len(left), len(right))
    left, right = list(left[:high]), list(right[:high])
    while low < high:
        middle = (low + high + 1) // 2
        if left[low:middle] == right[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


class KVCacheManager:
    """Every sequence that has tokens, live and idle, and the extents they hold."""

    def __init__(self, *, pool: Pool, capacity: int, prefix_reuse: bool, max_idle: int) -> None:
        self._pool = pool
        self._allocator = KVRangeAllocator(capacity=capacity)
        self._live: dict[SessionId, CachedSequence] = {}
        self._idle: list[CachedSequence] = []  # least recently used first
        self._max_idle = max_idle if prefix_reuse else 0
        self._prefix_reuse = prefix_reuse
        self._tick = 0
        self.prefix_hits = 0
        self.prefix_tokens = 0
        self.preemptions = 0

    def __len__(self) -> int:
        return sum(sequence.trunk is None for sequence in list(self._live.values()))

    @property
    def branched(self) -> int:
        """Return the number of branches; any thread may ask."""
        return len(self._live) - len(self)

    @property
    def capacity(self) -> int:
        """Return the tokens the cache holds at most."""
        return self._allocator.capacity

    @property
    def used(self) -> int:
        """Return the tokens that extents are given out for."""
        return self._allocator.used

    @property
    def live(self) -> int:
        """Return the tokens of open sessions among them; any thread may ask."""
        own = [sequence for sequence in list(self._live.values()) if sequence.trunk is None]
        return sum(sequence.extent.size for sequence in own if sequence.extent is not None)

    def find(self, session: SessionId) -> CachedSequence | None:
        """Return the live sequence of `session`."""
        return self._live.get(session)

    def least_recent(self) -> list[CachedSequence]:
        """Return the live sequences, branches first, then the one that rested longest."""
        return sorted(self._live.values(), key=_worth)

    def open(self, session: SessionId, *, tokens: Sequence[int], regime: int = 0) -> CachedSequence:
        """Begin a sequence with `tokens`, its cache started from the longest known prefix."""
        sequence = self._reuse(tokens, regime=regime) or CachedSequence(session=None)
        sequence.session = session
        sequence.tokens = list(tokens)
        sequence.regime = regime
        sequence.reused = sequence.cached
        self._live[session] = sequence
        self.touch(sequence)
        self.prefix_hits += sequence.reused > 0
        self.prefix_tokens += sequence.reused
        return sequence

    def branch(self, session: SessionId, *, trunk: SessionId, base: int) -> CachedSequence | None:
        """Begin a sequence with the first `base` tokens and rows of a live one.

        Returns None where those rows are not there, or idle sequences do not make room for a copy.
        """
        source = self._live.get(trunk)
        if source is None or source.cached < base:
            return None
        # The token that parts it from its trunk, at least, is still to come.
        sequence = self._fork(source, length=base, room=base + 1, victims=self._evict_idle())
        if sequence is None:
            return None
        sequence.session, sequence.trunk = session, trunk
        sequence.tokens = source.tokens[:base]
        self._live[session] = sequence
        self.touch(sequence)
        return sequence

    def branches(self, trunk: SessionId) -> list[SessionId]:
        """Return the branches of a session."""
        return [name for name, sequence in self._live.items() if sequence.trunk == trunk]

    def adopt(self, session: SessionId, *, branch: SessionId) -> None:
        """Let a session go on with the tokens and rows of its branch, which is one no more."""
        sequence, old = self._live.pop(branch), self._live[session]
        self.drop(old)
        sequence.session, sequence.trunk, sequence.reused = session, None, old.reused
        self._live[session] = sequence

    def release(self, session: SessionId) -> None:
        """End a session; its rows stay for a prompt that begins like it until room is needed.

        Those of a branch do not: nearly all of them are its trunk's too.
        """
        sequence = self._live.pop(session, None)
        if sequence is None:
            return
        sequence.session = None
        reusable = self._prefix_reuse and sequence.trunk is None
        if sequence.cached < _LEAST_REUSE or not reusable:
            self.drop(sequence)
            return
        del sequence.tokens[sequence.cached :]
        self._idle.append(sequence)
        while len(self._idle) > self._max_idle:
            self.drop(self._idle.pop(0))

    def touch(self, sequence: CachedSequence) -> None:
        """Note that `sequence` is used now."""
        self._tick += 1
        sequence.used = self._tick

    def drop(self, sequence: CachedSequence) -> None:
        """Forget the rows of `sequence`, not its tokens."""
        sequence.cached = 0
        if sequence.extent is None:
            return
        self._allocator.release(sequence.extent)
        sequence.extent = None

    def reserve(
        self, sequence: CachedSequence, *, tokens: int, victims: Iterable[CachedSequence]
    ) -> bool:
        """Give `sequence` an extent for `tokens`; False if even its victims do not make room.

        Idle sequences go first, then `victims` in their order; last, the sequence moves by being
        computed again, unless it is a branch.
        """
        if sequence.extent is not None and sequence.extent.size >= tokens:
            return True
        for extent in self._attempts(sequence, tokens, victims):
            if extent is not None:
                self._move(sequence, extent)
                return True
        return False

    def _attempts(
        self, sequence: CachedSequence, tokens: int, victims: Iterable[CachedSequence]
    ) -> Iterator[KVRange | None]:
        yield self._place(sequence, tokens)
        for victim in chain(self._evict_idle(), victims):
            if victim.extent is None or victim is sequence:
                continue
            self.preemptions += victim.session is not None and victim.trunk is None
            self.drop(victim)
            yield self._place(sequence, tokens)
        if sequence.extent is not None and sequence.trunk is None:
            self.drop(sequence)
            yield self._place(sequence, tokens)

    def _evict_idle(self) -> Iterator[CachedSequence]:
        while self._idle:
            yield self._idle.pop(0)

    def _place(self, sequence: CachedSequence, tokens: int) -> KVRange | None:
        if sequence.extent is not None:
            grown = self._allocator.extend(sequence.extent, tokens)
            if grown is not None:
                return grown
        return self._allocator.allocate(tokens)

    def _move(self, sequence: CachedSequence, extent: KVRange) -> None:
        old = sequence.extent
        sequence.extent = extent
        if old is None or old.start == extent.start:
            return
        self._pool.copy(source=old.start, target=extent.start, count=sequence.cached)
        self._allocator.release(old)

    def _reuse(self, tokens: Sequence[int], *, regime: int) -> CachedSequence | None:
        best, length = self._longest(tokens, regime=regime)
        if best is None:
            return None
        if best.session is None and 2 * length >= best.cached:
            self._idle.remove(best)
            best.cached = length
            return best
        return self._fork(best, length=length, room=len(tokens), victims=())

    def _longest(self, tokens: Sequence[int], *, regime: int) -> tuple[CachedSequence | None, int]:
        best, longest, known = None, _LEAST_REUSE - 1, list(tokens)
        if not self._prefix_reuse:
            return None, 0
        for sequence in chain(self._idle, self._live.values()):
            if sequence.regime != regime or sequence.cached <= longest:
                continue
            if sequence.tokens[: longest + 1] != known[: longest + 1]:
                continue
            length = common_prefix(sequence.tokens[: sequence.cached], known)
            if length > longest:
                best, longest = sequence, length
        return best, longest

    def _fork(
        self,
        source: CachedSequence,
        *,
        length: int,
        room: int,
        victims: Iterable[CachedSequence],
    ) -> CachedSequence | None:
        """Copy the first rows of `source`, if there is room for a copy, or `victims` make it."""
        if source.extent is None:
            return None
        extent, rest = self._allocator.allocate(room), iter(victims)
        while extent is None and (victim := next(rest, None)):
            self.drop(victim)
            extent = self._allocator.allocate(room)
        if extent is None:
            return None
        self._pool.copy(source=source.extent.start, target=extent.start, count=length)
        return CachedSequence(session=None, cached=length, regime=source.regime, extent=extent)


def _worth(sequence: CachedSequence) -> tuple[bool, int]:
    return sequence.trunk is None, sequence.used
