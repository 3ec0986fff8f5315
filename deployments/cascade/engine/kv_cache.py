"""The sequences of sessions and their KV slots: prefix reuse, growth, branches and eviction."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING

from cascade.engine.kv_pool import KVRangeAllocator
from cascade.engine.stats import PassShare

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from cascade.engine.kv_pool import KVPool, KVRange
    from cascade.engine.source_cache import Source
    from cascade.types import SessionId

_MIN_PREFIX = 8  # tokens below which reuse costs more than it saves


@dataclass(slots=True, kw_only=True, eq=False)
class CachedSequence:
    """The tokens of a session; the first `cached` of them have their states in the pool.

    States computed for one RoPE length are not valid for another (see `RopeLengths`).
    """

    session: SessionId | None  # None if released
    parent: SessionId | None = None  # of a branch
    tokens: list[int] = field(default_factory=list)
    cached: int = 0
    rope_length: int = 0
    kv_range: KVRange | None = None
    source: Source | None = None  # of an encoder-decoder; states belong to it
    reused: int = 0  # tokens found in the cache when the session opened
    reused_source: int = 0  # the source's, if it was encoded then
    last_used: int = 0  # tick
    share: PassShare = field(default_factory=PassShare)  # a branch has its parent's

    def rewrite(self, *, base: int, tokens: Sequence[int], rope_length: int) -> None:
        """Keep `base` tokens and append `tokens`; tokens that do not change stay cached.

        Args:
            base: Tokens to keep.
            tokens: Tokens that replace the rest.
            rope_length: RoPE length of the result.
        """
        same = common_prefix(self.tokens[base:], tokens)
        self.cached = min(self.cached, base + same) if rope_length == self.rope_length else 0
        self.tokens[base:] = tokens
        self.rope_length = rope_length


def common_prefix(left: Sequence[int], right: Sequence[int]) -> int:
    """Return the length of the longest common prefix."""
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
    """All sequences with tokens: live ones of open sessions, and idle ones kept for prefix reuse.

    Args:
        pool: Stores the states.
        capacity: Slots of the pool that sequences may use.
        prefix_reuse: Start sequences from the longest cached prefix.
        max_idle: Most idle sequences to keep.
    """

    def __init__(self, *, pool: KVPool, capacity: int, prefix_reuse: bool, max_idle: int) -> None:
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
        return sum(sequence.parent is None for sequence in list(self._live.values()))

    @property
    def num_branches(self) -> int:
        """Return the number of branches; safe from any thread."""
        return len(self._live) - len(self)

    @property
    def capacity(self) -> int:
        """Return the capacity in tokens."""
        return self._allocator.capacity

    @property
    def used_tokens(self) -> int:
        """Return the number of allocated slots."""
        return self._allocator.used

    @property
    def live_tokens(self) -> int:
        """Return how many of those open sessions hold; safe from any thread."""
        live = list(self._live.values())
        return sum(one.kv_range.size for one in live if one.kv_range and one.parent is None)

    def find(self, session: SessionId) -> CachedSequence | None:
        """Return the live sequence of `session`."""
        return self._live.get(session)

    def least_recent(self) -> list[CachedSequence]:
        """Return the live sequences, branches first, each least recently used first."""
        return sorted(self._live.values(), key=lambda one: (one.parent is None, one.last_used))

    def open(
        self,
        session: SessionId,
        *,
        tokens: Sequence[int],
        rope_length: int = 0,
        source: Source | None = None,
    ) -> CachedSequence:
        """Create a sequence that starts from the longest cached prefix of its tokens.

        Args:
            session: Its session.
            tokens: Its tokens.
            rope_length: RoPE length of the tokens.
            source: What the encoder reads; only sequences with the same have a common prefix.
        """
        sequence = self._reuse(tokens, rope_length=rope_length, source=source)
        sequence = sequence or CachedSequence(session=None)
        sequence.session, sequence.source, sequence.reused_source = session, source, 0
        sequence.share = PassShare()
        sequence.tokens = list(tokens)
        sequence.rope_length = rope_length
        sequence.reused = sequence.cached
        self._live[session] = sequence
        self.touch(sequence)
        self.prefix_hits += sequence.reused > 0
        self.prefix_tokens += sequence.reused
        return sequence

    def branch(self, session: SessionId, *, parent: SessionId, base: int) -> CachedSequence | None:
        """Create a branch with the first `base` tokens of a live sequence and their states.

        Args:
            session: Name of the branch.
            parent: The session to copy from.
            base: Tokens to copy.

        Returns:
            None if those tokens are not cached, or evicting idle sequences does not make space.
        """
        source = self._live.get(parent)
        if source is None or source.cached < base:
            return None
        # At least one more token follows, which differs from the parent's.
        sequence = self._fork(source, length=base, tokens=base + 1, victims=self._evict_idle())
        if sequence is None:
            return None
        sequence.session, sequence.parent = session, parent
        sequence.tokens, sequence.source = source.tokens[:base], source.source
        sequence.share = source.share
        self._live[session] = sequence
        self.touch(sequence)
        return sequence

    def branches(self, parent: SessionId) -> list[SessionId]:
        """Return the branches of a session."""
        return [name for name, sequence in self._live.items() if sequence.parent == parent]

    def adopt(self, session: SessionId, *, branch: SessionId) -> None:
        """Replace the sequence of a session by that of its branch."""
        sequence, old = self._live.pop(branch), self._live[session]
        self.drop(old)
        sequence.session, sequence.parent = session, None
        sequence.reused, sequence.reused_source = old.reused, old.reused_source
        self._live[session] = sequence

    def release(self, session: SessionId) -> None:
        """End a session; its states stay for prefix reuse until their space is needed.

        Those of a branch do not stay: nearly all of them are its parent's too.
        """
        sequence = self._live.pop(session, None)
        if sequence is None:
            return
        sequence.session = None
        reusable = self._prefix_reuse and sequence.parent is None
        if sequence.cached < _MIN_PREFIX or not reusable:
            self.drop(sequence)
            return
        del sequence.tokens[sequence.cached :]
        self._idle.append(sequence)
        while len(self._idle) > self._max_idle:
            self.drop(self._idle.pop(0))

    def touch(self, sequence: CachedSequence) -> None:
        """Mark `sequence` as the most recently used."""
        self._tick += 1
        sequence.last_used = self._tick

    def drop(self, sequence: CachedSequence) -> None:
        """Free the slots of `sequence`; its tokens stay known."""
        sequence.cached = 0
        if sequence.kv_range is None:
            return
        self._allocator.release(sequence.kv_range)
        sequence.kv_range = None

    def reserve(
        self, sequence: CachedSequence, *, tokens: int, victims: Iterable[CachedSequence]
    ) -> bool:
        """Make sure that `sequence` has slots for `tokens`; False if that is not possible.

        Idle sequences are evicted first, then `victims`. Last, the sequence drops its own states
        to be recomputed elsewhere, unless it is a branch.

        Args:
            sequence: A live sequence.
            tokens: Slots that it needs.
            victims: Sequences that may lose their slots, in this order.
        """
        old = sequence.kv_range
        if old is not None and old.size >= tokens:
            return True
        own = () if sequence.parent is not None else (sequence,)
        victims = chain(self._evict_idle(), victims, own)
        kv_range = self._allocate(tokens, victims=victims, sequence=sequence)
        if kv_range is None:
            return False
        if sequence.kv_range is not None and old is not None and old.start != kv_range.start:
            self._pool.copy(source=old.start, target=kv_range.start, count=sequence.cached)
            self._allocator.release(old)
        sequence.kv_range = kv_range
        return True

    def _allocate(
        self,
        tokens: int,
        *,
        victims: Iterable[CachedSequence],
        sequence: CachedSequence | None = None,
    ) -> KVRange | None:
        """Return a range for `tokens`, that of `sequence` grown if possible.

        Victims lose their slots one by one until there is such a range.
        """
        for victim in chain((None,), victims):
            if victim is not None:
                if victim.kv_range is None:
                    continue
                evicted = victim.session is not None and victim.parent is None
                self.preemptions += evicted and victim is not sequence
                self.drop(victim)
            old = sequence and sequence.kv_range
            kv_range = old and self._allocator.extend(old, tokens)
            kv_range = kv_range or self._allocator.allocate(tokens)
            if kv_range is not None:
                return kv_range
        return None

    def _evict_idle(self) -> Iterator[CachedSequence]:
        while self._idle:
            yield self._idle.pop(0)

    def _reuse(
        self, tokens: Sequence[int], *, rope_length: int, source: Source | None
    ) -> CachedSequence | None:
        """Return a sequence with the longest cached prefix: an idle one, or a copy."""
        best, longest, known = None, _MIN_PREFIX - 1, list(tokens)
        for sequence in chain(self._idle, self._live.values()) if self._prefix_reuse else ():
            if sequence.rope_length != rope_length or sequence.cached <= longest:
                continue
            if sequence.source != source:
                continue
            if sequence.tokens[: longest + 1] != known[: longest + 1]:
                continue
            length = common_prefix(sequence.tokens[: sequence.cached], known)
            if length > longest:
                best, longest = sequence, length
        if best is None:
            return None
        if best.session is None and 2 * longest >= best.cached:
            self._idle.remove(best)
            best.cached = longest
            return best
        return self._fork(best, length=longest, tokens=len(tokens), victims=())

    def _fork(
        self,
        source: CachedSequence,
        *,
        length: int,
        tokens: int,
        victims: Iterable[CachedSequence],
    ) -> CachedSequence | None:
        """Copy the first `length` states of `source` to a range for `tokens`, if there is space."""
        if source.kv_range is None:
            return None
        kv_range = self._allocate(tokens, victims=victims)
        if kv_range is None:
            return None
        self._pool.copy(source=source.kv_range.start, target=kv_range.start, count=length)
        return CachedSequence(
            session=None, cached=length, rope_length=source.rope_length, kv_range=kv_range
        )
