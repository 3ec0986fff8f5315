"""The tokens of one forward pass, and how attention reads their sessions from the pool.

Shapes: `T` tokens of the pass, `N` sessions of a group, `Q` queries and `K` keys of its longest
session, `G` query heads per key head.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.attention.varlen import varlen_attn

from cascade.sampling.tensor_ops import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# Longer blocks keep the device busy alone; padding them to one length would waste more than a call.
SHORT_QUERIES = 32

# torch 2.11 lacks it: there each pass on a GPU copies the keys of its sessions.
IN_PLACE = "seqused_k" in inspect.signature(varlen_attn).parameters


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """New tokens of one session, and their place in the pool."""

    start: int  # first slot of the session's range
    past: int  # tokens that are cached before this pass
    tokens: Sequence[int]
    num_logits: int = 0  # return the logits of the last so many tokens
    rope_length: int = 0  # length that RoPE frequencies are computed for; 0 for the usual ones
    first_position: int | None = None  # of the first token; None if it equals `past`
    source: range | None = None  # slots of what an encoder-decoder's cross-attention reads

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
        first = self.past if self.first_position is None else self.first_position
        return range(first, first + len(self.tokens))

    @property
    def new_slots(self) -> range:
        """Return the slot of each new token."""
        return range(self.start + self.past, self.start + self.length)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Sessions at equal distances in the pool, read by one attention call without a copy."""

    first: int  # tokens `first .. last` of the pass
    last: int
    start: int  # first key slot of the first session
    stride: int  # slots from one session to the next
    queries: tuple[int, ...]  # per session
    keys: tuple[int, ...]

    @property
    def size(self) -> int:
        """Return N."""
        return len(self.queries)

    @property
    def uniform(self) -> bool:
        """Whether all sessions have Q queries."""
        return len(set(self.queries)) == 1

    def view(self, states_JRD: Tensor) -> Tensor:
        """Return the group's states in a pool, `[N, J, K, D]`, without a copy."""
        heads, _, size = states_JRD.shape
        head_stride, slot_stride, _ = states_JRD.stride()
        return states_JRD.as_strided(
            (self.size, heads, max(self.keys), size),
            (self.stride * slot_stride, head_stride, slot_stride, 1),
            states_JRD.storage_offset() + self.start * slot_stride,
        )


class Extents(NamedTuple):
    """Where each session's queries and keys are: int32 tensors, and the longest of each."""

    query_offsets: Tensor  # [N + 1], in the pass
    key_starts: Tensor  # [N + 1], in the pool; the last says nothing
    key_counts: Tensor  # [N]
    max_queries: int
    max_keys: int
    key_slots: Tensor | None = None  # [K], of all sessions in turn, where keys are copied


class RaggedBatch:
    """Segments end to end, with everything that attention needs, built once per pass.

    Args:
        segments: The segments.
        device: The model's device.
        num_slots: Slots of the pool.
        deterministic: The attention of a token does not depend on the batch.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        device: torch.device,
        num_slots: int,
        deterministic: bool = False,
    ) -> None:
        self.segments = segments
        self.device = device
        self._num_slots = num_slots
        self._deterministic = deterministic
        self._offsets = [0, *accumulate(segment.count for segment in segments)]
        # Deterministic attention reads every token as if it ran by itself.
        self._read_as = segments
        if deterministic:
            pasts = [(s.start, past) for s in segments for past in range(s.past, s.length)]
            self._read_as = [Segment(start=start, past=past, tokens=(0,)) for start, past in pasts]
        self.ids_T = self._tensor([token for s in segments for token in s.tokens])
        self.positions_T = self._tensor([position for s in segments for position in s.positions])
        self.slots_T = self._tensor([slot for s in segments for slot in s.new_slots])
        self._groups: dict[int | None, list[Group]] = {}
        self._masks: dict[tuple[int, int | None, torch.dtype], Tensor | None] = {}
        self._gathers: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    @property
    def all_logits(self) -> bool:
        """Whether the logits of every token are requested."""
        return all(segment.num_logits == segment.count for segment in self.segments)

    def logit_indices(self) -> Tensor:
        """Return `[N]`, the indices in the pass of the tokens whose logits are requested."""
        ends = zip(self.segments, self._offsets[1:], strict=True)
        return self._tensor([i for s, end in ends for i in range(end - s.num_logits, end)])

    @cached_property
    def extents(self) -> Extents:
        """Where each session's queries and keys are."""
        keys = [segment.length for segment in self.segments]
        starts = [segment.start for segment in self.segments]
        return Extents(
            query_offsets=self._tensor(self._offsets, torch.int32),
            key_starts=self._tensor([*starts, 0], torch.int32),
            key_counts=self._tensor(keys, torch.int32),
            max_queries=max(segment.count for segment in self.segments),
            max_keys=max(keys),
            key_slots=None if IN_PLACE else self.key_slots,
        )

    @cached_property
    def key_slots(self) -> Tensor:
        """Return the slots of all sessions' keys in turn, int32."""
        slots = [range(segment.start, segment.start + segment.length) for segment in self.segments]
        return self._tensor(list(chain.from_iterable(slots)), torch.int32)

    def groups(self, window: int | None) -> list[Group]:
        """Return how a layer that sees `window` tokens back (None: all) reads the sessions."""
        if window not in self._groups:
            self._groups[window] = [self._group(run, window) for run in self._runs(window)]
        return self._groups[window]

    def mask(self, group: Group, window: int | None, dtype: torch.dtype) -> Tensor | None:
        """Return the additive mask `[N, 1, 1, Q, K]`, or None if every query sees every key.

        Args:
            group: A group of this batch.
            window: Tokens that the layer sees back; None for all.
            dtype: Type of the mask.
        """
        key = (group.first, window, dtype)
        if key not in self._masks:
            self._masks[key] = _mask(group, window, dtype, self.device)
        return self._masks[key]

    def gather(self, group: Group) -> tuple[Tensor, Tensor]:
        """Return indices `[N * Q]` that pad each session to Q queries, and those that undo it."""
        key = (group.first, group.last)
        if key not in self._gathers:
            longest = max(group.queries)
            padded: list[int] = []
            valid: list[int] = []
            first = 0
            for index, count in enumerate(group.queries):
                valid.extend(range(index * longest, index * longest + count))
                padded.extend(first + min(query, count - 1) for query in range(longest))
                first += count
            self._gathers[key] = self._tensor(padded), self._tensor(valid)
        return self._gathers[key]

    def _runs(self, window: int | None) -> list[range]:
        """Split the segments into runs that one strided view can read."""
        runs = [range(1)]
        for index in range(1, len(self._read_as)):
            joined = range(runs[-1].start, index + 1)
            if self._fits_one_view(joined, window):
                runs[-1] = joined
            else:
                runs.append(range(index, index + 1))
        return runs

    def _fits_one_view(self, run: range, window: int | None) -> bool:
        if self._deterministic:
            return False
        segments = self._read_as[run.start : run.stop]
        last = segments[-1]
        stride = segments[1].start - segments[0].start
        keys = [segment.length for segment in segments]
        if stride <= 0 or last.start - segments[-2].start != stride:
            return False
        if max(segment.count for segment in segments) > SHORT_QUERIES:
            return False
        if last.start + max(keys) > self._num_slots or len(keys) * max(keys) > 2 * sum(keys):
            return False
        return window is None or max(keys) <= 4 * window

    def _group(self, run: range, window: int | None) -> Group:
        segments = self._read_as[run.start : run.stop]
        skipped = 0
        if len(segments) == 1 and window is not None:
            skipped = max(0, segments[0].past - window + 1)
        return Group(
            first=run.start if self._deterministic else self._offsets[run.start],
            last=run.stop if self._deterministic else self._offsets[run.stop],
            start=segments[0].start + skipped,
            stride=segments[1].start - segments[0].start if len(segments) > 1 else 0,
            queries=tuple(segment.count for segment in segments),
            keys=tuple(segment.length - skipped for segment in segments),
        )

    def _tensor(self, values: list[int], dtype: torch.dtype = torch.int64) -> Tensor:
        return upload(values, self.device, dtype=dtype)


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


def partition(segments: Sequence[Segment], *, isolate_long: bool) -> list[list[int]]:
    """Return the indices of segments that may share a forward pass, pass by pass.

    Segments of different RoPE lengths never do. `isolate_long` runs each long segment alone, for
    batches where all would be padded to the longest.
    """
    passes: dict[tuple[int, int], list[int]] = {}
    for index, segment in enumerate(segments):
        alone = isolate_long and segment.count > SHORT_QUERIES
        passes.setdefault((segment.rope_length, 1 + index if alone else 0), []).append(index)
    return list(passes.values())
