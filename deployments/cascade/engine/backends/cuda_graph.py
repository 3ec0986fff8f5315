"""The captured path: a step of one token a session, replayed as a CUDA graph.

A drafter's step takes a GPU less time than Python needs to launch its kernels. A graph is launched
at once, but it is a recording: shapes and addresses are those it was captured with. So sessions and
keys are rounded up to a bucket, its inputs lie in one tensor that is overwritten, and sessions that
fill the bucket up read and write scratch rows. All other passes run as on the flat path.

Shapes: `N` sessions of a bucket, `K` keys of its longest, the rest as in `attention`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor
from torch.nn.functional import pad

from cascade.engine.attention import attend, running
from cascade.engine.backends.mask_probe import Unsuited
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import Segment
from cascade.engine.kv_allocator import SMALLEST
from cascade.engine.rope import RopeLengths

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

    from cascade.engine.attention import Form

    # MOVED

# Runs on the inputs that lie where they were captured; may return the same memory each time.
Replay: TypeAlias = Callable[[], Tensor]

# Makes one of a function that has static shapes and reads no number of a device.
Recorder: TypeAlias = Callable[[Replay], Replay]

_WARM_UPS = 3  # libraries choose kernels and take workspaces in the first runs

_capturing = threading.Lock()  # a process can capture one graph at a time


def recorder(device: torch.device) -> Recorder:
    """Return what makes recordings on `device`."""
    return _Graphs(device) if device.type == "cuda" else _again


class _Graphs:
    """Makes graphs that share the memory of what they compute on the way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        usual = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # The outer context gives the stream back also where a capture cannot be ended.
        with _capturing, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(usual)
            for _ in range(_WARM_UPS):
                run()
            with torch.cuda.graph(
                graph,
                pool=self._memory,
                stream=self._stream,
                capture_error_mode="thread_local",  # other engines of the process go on
            ):
                found = run()
        usual.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


def _again(run: Replay) -> Replay:
    """Return the function itself."""
    return run


log = logging.getLogger(__name__)

MOST_SESSIONS = 64  # more keep the device busy by themselves; their padding fits the scratch rows

MOST_KEYS = 2**17  # of all sessions: a layer's are copied where FlashAttention does not serve


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Shapes that one recording serves."""

    sessions: int
    keys: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """A recording and its inputs."""

    inputs_5N: Tensor
    replay: Replay


class CudaGraphRunner(VarlenRunner):
    """The flat path, with recordings for passes that have one wanted token of every session.

    Args:
        model: as for the flat path.
        deterministic: refused, since padding changes the batch.
        record: how recordings are made; None is a CUDA graph on a GPU, and elsewhere the function
            itself.

    Raises:
        Unsuited: if the model's attention is not ours to replace.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        deterministic: bool = False,
        record: Recorder | None = None,
    ) -> None:
        if deterministic:
            raise Unsuited("its rows depend on the batch they are padded to")
        super().__init__(model)
        self._record = record or recorder(self.device)
        self._steps: dict[Bucket, _Step | None] = {}  # None: runs on the flat path
        self._recordable = True

    @property
    def recorded(self) -> set[Bucket]:
        """Return the shapes that are replayed by now."""
        return {bucket for bucket, step in self._steps.items() if step}

    def resize(self, *, rows: int) -> None:
        """Replace the pool by an empty one of `rows` rows, and some scratch."""
        self._steps.clear()  # they know the old pool's addresses
        super().resize(rows=rows)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' rows and return the wanted logits `[N, V]`, in segment order."""
        bucket = self._bucket(segments)
        step = None if bucket is None else self._step(bucket)
        if step is None:
            return super().forward(segments)
        padding = self._padding(step.inputs_5N.shape[1] - len(segments))
        step.inputs_5N.copy_(self._columns([*segments, *padding]), non_blocking=True)
        # The next replay overwrites what this one returns.
        return step.replay()[: len(segments)].clone()

    def _bucket(self, segments: Sequence[Segment]) -> Bucket | None:
        """Return the shapes for a pass, or None if it is not one token of every session."""
        # RoPE that follows the longest position reads it back from the device.
        if self.regimes != RopeLengths() or any(s.count != 1 or s.rows != 1 for s in segments):
            return None
        sessions = _power(len(segments))
        keys = min(_power(max(SMALLEST, *(s.length for s in segments))), self.pool.rows)
        if sessions > MOST_SESSIONS or sessions * keys > MOST_KEYS:
            return None
        return Bucket(sessions=sessions, keys=keys)

    def _step(self, bucket: Bucket) -> _Step | None:
        if bucket not in self._steps:
            self._steps[bucket] = self._made(bucket) if self._recordable else None
        return self._steps[bucket]

    def _made(self, bucket: Bucket) -> _Step | None:
        """Return a recording made over scratch rows, or None if the model cannot be recorded."""
        inputs_5N = self._columns(self._padding(bucket.sessions)).to(self.device)
        try:
            replay = self._record(lambda: self._run(inputs_5N, keys=bucket.keys))
        # Model code may do what no graph can hold in any way; the flat path serves it as well.
        except Exception:
            log.warning(
                "%s was not captured for %s; what is not captured yet runs on the flat path",
                type(self.model).__name__,
                bucket,
                exc_info=True,
            )
            self._recordable = False
            return None
        return _Step(inputs_5N=inputs_5N, replay=replay)

    def _run(self, inputs_5N: Tensor, *, keys: int) -> Tensor:
        """Run a bucket. This is what is recorded: nothing in it depends on a number of `inputs`."""
        batch = StaticBatch(inputs_5N, keys=keys, rows=self.pool.rows)
        with running(self._reading(batch, batch.attend)):
            return self.model(
                input_ids=batch.ids_T[None], position_ids=batch.positions_T[None], use_cache=False
            ).logits[0]

    def _padding(self, count: int) -> list[Segment]:
        """Return sessions of one token, each in a scratch row of its own."""
        rows = range(self._scratch, self._scratch + count)
        return [Segment(start=row, past=0, tokens=(0,), rows=1) for row in rows]

    def _columns(self, segments: Sequence[Segment]) -> Tensor:
        """Return `[5, N]` on the host: token, position, new row, first row, keys of each session.

        It is a new tensor each pass: a copy may still be reading that of the pass before, and
        torch keeps pinned memory until it has been read.
        """
        columns = [
            (s.tokens[0], s.positions[0], s.new_rows[0], s.start, s.length) for s in segments
        ]
        return torch.tensor(list(zip(*columns, strict=True)), pin_memory=self.device.type == "cuda")


class StaticBatch:
    """One token of each of N sessions, known by tensors alone.

    Args:
        inputs_5N: int64; token, position, new row, first row and number of keys of each session.
        keys: K, at least the largest number of keys.
        rows: R.
    """

    def __init__(self, inputs_5N: Tensor, *, keys: int, rows: int) -> None:
        self.ids_T, self.positions_T, self.rows_T, self._starts_N, self._counts_N = inputs_5N
        self._keys = keys
        self._last_row = rows - 1
        self._reads: dict[int, tuple[Tensor, Tensor]] = {}
        self._ragged: tuple[Tensor, Tensor, Tensor, int, int] | None = None

    @property
    def tokens(self) -> int:
        """Return T, which is N."""
        return len(self.ids_T)

    def ragged(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Return query offsets, key starts and key counts as int32, and the longest of each."""
        if self._ragged is None:
            offsets = torch.arange(self.tokens + 1, dtype=torch.int32, device=self._starts_N.device)
            starts = pad(self._starts_N, (0, 1)).int()
            self._ragged = (offsets, starts, self._counts_N.int(), 1, self._keys)
        return self._ragged

    def attend(self, query_THD: Tensor, keys_JRD: Tensor, values_JRD: Tensor, form: Form) -> Tensor:
        """Return the attention `[T, H, D]` of every token, over copies of the rows it sees."""
        rows_NK, seen_NK = self._read(form.window)
        mask = torch.zeros_like(seen_NK, dtype=query_THD.dtype)
        mask = mask.masked_fill_(~seen_NK, float("-inf"))[:, None, None, None]
        keys_NJKD = keys_JRD[:, rows_NK].transpose(0, 1)
        values_NJKD = values_JRD[:, rows_NK].transpose(0, 1)
        return attend(query_THD, keys_NJKD, values_NJKD, mask, form)

    def _read(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Return the rows `[N, K]` that hold a layer's keys, and which of them are the session's.

        A layer with a window reads no more than that, so its K is the window.
        """
        width = min(self._keys, window or self._keys)
        if width not in self._reads:
            places_K = torch.arange(width, device=self._starts_N.device)
            skipped_N = (self._counts_N - width).clamp(min=0)
            rows_NK = (self._starts_N + skipped_N)[:, None] + places_K
            seen_NK = places_K < (self._counts_N - skipped_N)[:, None]
            self._reads[width] = rows_NK.clamp(max=self._last_row), seen_NK
        return self._reads[width]


def _power(count: int) -> int:
    """Return the power of two that holds `count`."""
    return 1 << (count - 1).bit_length()
