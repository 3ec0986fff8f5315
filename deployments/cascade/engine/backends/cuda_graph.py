"""The `captured` path: decode steps of one token per session, replayed as CUDA graphs.

A GPU runs a drafter's step faster than Python can launch its kernels. A graph launches all of them
at once, but with the shapes and addresses it was captured with. So the numbers of sessions and keys
are rounded up to a bucket, the inputs lie in one tensor that is overwritten, and the sessions that
fill up a bucket use scratch slots. All other passes run as on the `flat` path.

Shapes: `N` sessions of a bucket, `K` keys of its longest, the rest as in `attention`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from cascade.engine.attention import attend
from cascade.engine.backends.base import PathUnsupported, RopeLengths
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import Extents, Segment
from cascade.engine.kv_pool import MIN_RANGE

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from cascade.engine.attention import AttentionParams

log = logging.getLogger(__name__)

# Runs on the inputs at the addresses of the capture; may return the same memory each time.
Replay: TypeAlias = Callable[[], Tensor]

# Captures a function that has static shapes and reads no number from the device.
Capture: TypeAlias = Callable[[Replay], Replay]

MAX_SESSIONS = 64  # more keep the device busy anyway; their padding fits the scratch slots
MAX_KEYS = 2**17  # of all sessions: without `varlen_attn`, a layer's keys are copied
_WARM_UPS = 3  # libraries choose kernels and allocate workspaces in the first runs

_capturing = threading.Lock()  # a process can capture one graph at a time


class CudaGraphs:
    """Captures functions as CUDA graphs that share the memory of their intermediate results."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        """Capture `run` and return what replays it."""
        stream = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # The outer context restores the stream even if a capture cannot be ended.
        with _capturing, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(stream)
            for _ in range(_WARM_UPS):
                run()
            with torch.cuda.graph(
                graph,
                pool=self._memory,
                stream=self._stream,
                capture_error_mode="thread_local",  # other engines of the process go on
            ):
                result = run()
        stream.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """The shapes that one graph serves."""

    sessions: int
    keys: int


class CudaGraphRunner(VarlenRunner):
    """The `flat` path, with graphs for passes of one token and its logits per session.

    Args:
        model: As for the `flat` path.
        deterministic: Not supported, since padding changes the batch.
        capture: Captures a function; by default CUDA graphs on a GPU, else the function itself.

    Raises:
        PathUnsupported: The model's attention cannot be replaced.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        deterministic: bool = False,
        capture: Capture | None = None,
    ) -> None:
        if deterministic:
            raise PathUnsupported("its logits depend on the batch that they are padded to")
        super().__init__(model)
        self._capture = capture
        if capture is None and self.device.type == "cuda":
            self._capture = CudaGraphs(self.device)
        self._graphs: dict[Bucket, tuple[Tensor, Replay] | None] = {}  # None: cannot be captured
        self._capturable = True

    @property
    def captured_buckets(self) -> set[Bucket]:
        """Return the buckets that have a graph by now."""
        return {bucket for bucket, graph in self._graphs.items() if graph}

    def resize(self, *, num_slots: int) -> None:
        """Replace the pool, and drop the graphs, which have the old pool's addresses."""
        self._graphs.clear()
        super().resize(num_slots=num_slots)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order."""
        replayed_NV = self._replayed(segments)
        return super().forward(segments) if replayed_NV is None else replayed_NV

    def decode(self, segments: Sequence[Segment], ids_N: Tensor) -> Tensor:
        """Run one token of each session, without reading it; return the logits `[N, V]`."""
        replayed_NV = self._replayed(segments, ids_N)
        return super().decode(segments, ids_N) if replayed_NV is None else replayed_NV

    def _replayed(self, segments: Sequence[Segment], ids_N: Tensor | None = None) -> Tensor | None:
        """Return the logits of a pass by its graph, or None if it has none.

        Args:
            segments: The pass.
            ids_N: Its tokens, on the device; those of the segments if None.
        """
        bucket = self._bucket(segments)
        if bucket and bucket not in self._graphs:
            self._graphs[bucket] = self._capture_bucket(bucket)
        graph = self._graphs[bucket] if bucket else None
        if graph is None:
            return None
        inputs_5N, replay = graph
        padding = self._padding(inputs_5N.shape[1] - len(segments))
        inputs_5N.copy_(self._inputs([*segments, *padding]), non_blocking=True)
        if ids_N is not None:
            inputs_5N[0, : len(segments)] = ids_N
        # The next replay overwrites what this one returns.
        return replay()[: len(segments)].clone()

    def _bucket(self, segments: Sequence[Segment]) -> Bucket | None:
        """Return the bucket of a pass, or None if it is not one token per session."""
        # RoPE that follows the longest position reads it back from the device.
        if self.rope_lengths != RopeLengths():
            return None
        if any(s.count != 1 or s.num_logits != 1 for s in segments):
            return None
        sessions = _power_of_two(len(segments))
        longest = max(MIN_RANGE, *(s.length for s in segments))
        keys = min(_power_of_two(longest), self.pool.num_slots)
        if sessions > MAX_SESSIONS or sessions * keys > MAX_KEYS:
            return None
        return Bucket(sessions=sessions, keys=keys)

    def _capture_bucket(self, bucket: Bucket) -> tuple[Tensor, Replay] | None:
        """Capture a bucket over scratch slots; return its inputs and replay, None if it fails."""
        if not self._capturable:
            return None
        inputs_5N = self._inputs(self._padding(bucket.sessions)).to(self.device)
        try:
            run = partial(self._run, inputs_5N, keys=bucket.keys)
            return inputs_5N, self._capture(run) if self._capture else run
        # Model code may do anything that no graph can hold; the `flat` path serves it as well.
        except Exception:
            log.warning(
                "%s was not captured for %s; buckets without a graph run on the flat path",
                type(self.model).__name__,
                bucket,
                exc_info=True,
            )
            self._capturable = False
            return None

    def _run(self, inputs_5N: Tensor, *, keys: int) -> Tensor:
        """Run a bucket. This is captured: no code in it depends on a value of `inputs_5N`."""
        batch = StaticBatch(inputs_5N, keys=keys, num_slots=self.pool.num_slots)
        with self.running(batch, batch.attend):
            return self.model(
                input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], use_cache=False
            ).logits[0]

    def _padding(self, count: int) -> list[Segment]:
        """Return sessions of one token, each in a scratch slot of its own."""
        slots = range(self._scratch, self._scratch + count)
        return [Segment(start=slot, past=0, tokens=(0,), num_logits=1) for slot in slots]

    def _inputs(self, segments: Sequence[Segment]) -> Tensor:
        """Return `[5, N]` on the host: token, position, new slot, first slot, keys per session.

        It is a new tensor in each pass: a copy may still be reading that of the pass before, and
        torch keeps pinned memory until it has been read.
        """
        columns = [
            (s.tokens[0], s.positions[0], s.new_slots[0], s.start, s.length) for s in segments
        ]
        return torch.tensor(list(zip(*columns, strict=True)), pin_memory=self.device.type == "cuda")


class StaticBatch:
    """One token of each of N sessions, known by tensors only.

    Args:
        inputs_5N: int64; token, position, new slot, first slot and number of keys per session.
        keys: K, at least the largest number of keys.
        num_slots: R.
    """

    def __init__(self, inputs_5N: Tensor, *, keys: int, num_slots: int) -> None:
        self.ids_T, self.positions_T, self.slots_T, self._starts_N, self._counts_N = inputs_5N
        self._keys = keys
        self._last_slot = num_slots - 1
        self._visible: dict[int, tuple[Tensor, Tensor]] = {}

    @cached_property
    def extents(self) -> Extents:
        """Where each session's query and keys are."""
        device = self._starts_N.device
        return Extents(
            query_offsets=torch.arange(len(self.ids_T) + 1, dtype=torch.int32, device=device),
            key_starts=pad(self._starts_N, (0, 1)).int(),
            key_counts=self._counts_N.int(),
            max_queries=1,
            max_keys=self._keys,
        )

    def attend(
        self, query_THD: Tensor, keys_JRD: Tensor, values_JRD: Tensor, params: AttentionParams
    ) -> Tensor:
        """Return the attention `[T, H, D]` of every token, over copies of the states it sees.

        Args:
            query_THD: The queries.
            keys_JRD: Keys of the whole pool.
            values_JRD: Values of the whole pool.
            params: The layer's parameters.
        """
        slots_NK, seen_NK = self._visible_slots(params.window)
        mask = torch.zeros_like(seen_NK, dtype=query_THD.dtype)
        mask = mask.masked_fill_(~seen_NK, float("-inf"))[:, None, None, None]
        keys_NJKD = keys_JRD[:, slots_NK].transpose(0, 1)
        values_NJKD = values_JRD[:, slots_NK].transpose(0, 1)
        return attend(query_THD, keys_NJKD, values_NJKD, mask, params)

    def _visible_slots(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the slots `[N, K]` of a layer's keys, and which of them are the session's.

        A layer with a window reads no more than that, so its K is the window.
        """
        width = min(self._keys, window or self._keys)
        if width not in self._visible:
            index_K = torch.arange(width, device=self._starts_N.device)
            skipped_N = (self._counts_N - width).clamp(min=0)
            slots_NK = (self._starts_N + skipped_N)[:, None] + index_K
            seen_NK = index_K < (self._counts_N - skipped_N)[:, None]
            self._visible[width] = slots_NK.clamp(max=self._last_slot), seen_NK
        return self._visible[width]


def _power_of_two(count: int) -> int:
    """Return the smallest power of two that is at least `count`."""
    return 1 << (count - 1).bit_length()
