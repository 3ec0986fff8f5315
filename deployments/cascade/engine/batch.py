"""What one forward pass runs, and how attention reads it from the pool.

Shapes: `T` tokens of the pass, `N` sessions of a group, `Q` queries and `K` keys of its longest
session, `G` query heads per key head.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

# Longer blocks fill the machine alone; padding them to one length would waste more than a call.
SHORT_QUERIES = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """New tokens of one session: where its rows are and which logits are wanted.

    `regime` is the length that RoPE frequencies are computed for, 0 for the usual ones. `place` is
    the position of the first token where it is not the number of rows before it.
    """

    start: int  # first row of the session's extent
    past: int  # rows that are valid before this pass
    tokens: Sequence[int]
    rows: int = 0  # logits of the last `rows` tokens are wanted
    regime: int = 0
    place: int | None = None

    @property
    def count(self) -> int:
        """Return the number of new tokens."""
        return len(self.tokens)

    @property
    def length(self) -> int:
        """Return the number of keys after this pass."""
        return self.past + len(self.tokens)

    @property
    def positions(self) -> range:
        """Return the position of each new token."""
        first = self.past if self.place is None else self.place
        return range(first, first + len(self.tokens))

    @property
    def new_rows(self) -> range:
        """Return the pool row of each new token."""
        return range(self.start + self.past, self.start + self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sessions at equal distances in the pool, read by one attention call without a copy."""

    first: int  # tokens `first .. last` of the pass
    last: int
    start: int  # first key row of the first session
    stride: int  # rows from one session to the next
    queries: tuple[int, ...]  # per session
    keys: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return N."""
        return len(self.queries)

    @property
    def even(self) -> bool:
        """Whether all sessions have Q queries."""
        return len(set(self.queries)) == 1

    @property
    def whole(self) -> bool:
        """Whether one session attends to nothing but its own new tokens."""
        return self.size == 1 and self.queries == self.keys


class RaggedBatch:
    """Segments laid end to end in one row, with all that attention needs, built once a pass."""

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        device: torch.device,
        rows: int,
        deterministic: bool = False,
    ) -> None:
        self.segments = segments
        self.device = device
        self._rows = rows
        self._alone = deterministic  # every token is read as if it ran by itself
        self._offsets = [0, *accumulate(segment.count for segment in segments)]
        self.ids_T = self._tensor([token for s in segments for token in s.tokens])
        self.positions_T = self._tensor([place for s in segments for place in s.positions])
        self.rows_T = self._tensor([row for s in segments for row in s.new_rows])
        self._groups: dict[int | None, list[Group]] = {}
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = {}
        self._gathers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._ragged: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    @property
    def tokens(self) -> int:
        """Return T."""
        return self._offsets[-1]

    def wanted(self) -> Tensor:
        """Return `[N]`, the places in the pass of the tokens whose logits are wanted."""
        ends = zip(self.segments, self._offsets[1:], strict=True)
        return self._tensor([i for segment, end in ends for i in range(end - segment.rows, end)])

    def groups(self, window: int | None) -> list[Group]:
        """Return how a layer that sees `window` tokens back (None: all) reads the sessions."""
        if window not in self._groups:
            self._groups[window] = list(
                self._singles(window) if self._alone else self._shared(window)
            )
        return self._groups[window]

    @cached_property
    def all_wanted(self) -> bool:
        """Whether the logits of every token are wanted."""
        return all(segment.rows == segment.count for segment in self.segments)

    def mask(self, group: Group, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return the additive mask `[N, 1, 1, Q, K]`, or None where a query sees every key."""
        key = (group.first, window, dtype)
        if key not in self._masks:
            self._masks[key] = _mask(group, window, dtype, self.device)
        return self._masks[key]

    def gather(self, group: Group) -> tuple[Tensor, Tensor]:
        """Return `[N * Q]`, the group's tokens padded to Q queries each, and the way back."""
        key = (group.first, group.last)
        if key not in self._gathers:
            self._gathers[key] = self._gather(group)
        return self._gathers[key]

    def ragged(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Return query offsets, key starts and key counts as int32, and the longest of each."""
        if self._ragged is None:
            keys = [segment.length for segment in self.segments]
            starts = [segment.start for segment in self.segments]
            self._ragged = (
                self._tensor(self._offsets, torch.int32),
                self._tensor([*starts, 0], torch.int32),
                self._tensor(keys, torch.int32),
                max(segment.count for segment in self.segments),
                max(keys),
            )
        return self._ragged

    def _singles(self, window: int | None) -> Iterator[Group]:
        """Yield a group for each token: the same call whatever else is in the pass."""
        for segment, first in zip(self.segments, self._offsets, strict=False):
            for place, length in enumerate(range(segment.past + 1, segment.length + 1)):
                skipped = 0 if window is None else max(0, length - window)
                yield Group(
                    first=first + place,
                    last=first + place + 1,
                    start=segment.start + skipped,
                    stride=0,
                    queries=(1,),
                    keys=(length - skipped,),
                )

    def _shared(self, window: int | None) -> Iterator[Group]:
        for run in self._runs(window):
            yield self._group(run, window)

    def _runs(self, window: int | None) -> list[range]:
        """Split the segments into runs that one strided view can read."""
        runs = [range(1)]
        for place in range(1, len(self.segments)):
            joined = range(runs[-1].start, place + 1)
            if self._joins(joined, window):
                runs[-1] = joined
            else:
                runs.append(range(place, place + 1))
        return runs

    def _joins(self, run: range, window: int | None) -> bool:
        segments = self.segments[run.start : run.stop]
        last = segments[-1]
        stride = segments[1].start - segments[0].start
        keys = [segment.length for segment in segments]
        if stride <= 0 or last.start - segments[-2].start != stride:
            return False
        if max(segment.count for segment in segments) > SHORT_QUERIES:
            return False
        if last.start + max(keys) > self._rows or len(keys) * max(keys) > 2 * sum(keys):
            return False
        return window is None or max(keys) <= 4 * window

    def _group(self, run: range, window: int | None) -> Group:
        segments = self.segments[run.start : run.stop]
        skipped = 0
        if len(segments) == 1 and window is not None:
            skipped = max(0, segments[0].past - window + 1)
        return Group(
            first=self._offsets[run.start],
            last=self._offsets[run.stop],
            start=segments[0].start + skipped,
            stride=segments[1].start - segments[0].start if len(segments) > 1 else 0,
            queries=tuple(segment.count for segment in segments),
            keys=tuple(segment.length - skipped for segment in segments),
        )

    def _gather(self, group: Group) -> tuple[Tensor, Tensor]:
        longest = max(group.queries)
        padded: list[int] = []
        valid: list[int] = []
        first = 0
        for place, count in enumerate(group.queries):
            valid.extend(range(place * longest, place * longest + count))
            padded.extend(first + min(query, count - 1) for query in range(longest))
            first += count
        return self._tensor(padded), self._tensor(valid)

    def _tensor(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)


def _mask(
    group: Group, window: int | None, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    queries, keys = max(group.queries), max(group.keys)
    if group.size == 1 and queries == 1 and (window is None or keys <= window):
        return None
    keys_N = torch.tensor(group.keys, device=device).view(-1, 1, 1)
    queries_N = torch.tensor(group.queries, device=device).view(-1, 1, 1)
    query_NQ = keys_N - queries_N + torch.arange(queries, device=device).view(1, -1, 1)
    query_NQ = torch.minimum(query_NQ, keys_N - 1)
    key_K = torch.arange(keys, device=device).view(1, 1, -1)
    seen_NQK = key_K <= query_NQ
    if window is not None:
        seen_NQK &= key_K > query_NQ - window
    mask_NQK = torch.zeros(seen_NQK.shape, dtype=dtype, device=device)
    return mask_NQK.masked_fill_(~seen_NQK, float("-inf"))[:, None, None]


def partition(segments: Sequence[Segment], *, by_size: bool) -> Iterator[list[int]]:
    """Yield places of segments that may share a forward pass.

    Segments of different RoPE regimes may not. `by_size` also keeps long blocks apart, where
    every segment would be padded to the longest.
    """
    groups: dict[tuple[int, int], list[int]] = {}
    for place, segment in enumerate(segments):
        long = by_size and segment.count > SHORT_QUERIES
        groups.setdefault((segment.regime, 1 + place if long else 0), []).append(place)
    yield from groups.values()
