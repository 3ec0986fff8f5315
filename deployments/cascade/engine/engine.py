"""The engine: one model, one cache, one thread that turns waiting steps into forward passes."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, TypeAlias

import torch

from cascade.engine import threads
from cascade.engine.backends import select
from cascade.engine.batch import Segment
from cascade.engine.kv_allocator import capacity_tokens
from cascade.engine.kv_cache import KVCacheManager
from cascade.engine.preemption import Preemptor
from cascade.engine.request import ForwardRequest, LogitsHandler, LogitsOutput
from cascade.engine.scheduler import ScheduledStep, Scheduler, StepChunk
from cascade.engine.settings import EngineSettings, step_tokens
from cascade.engine.stats import BusyMeter, EngineStats, ForwardPass
from cascade.engine.threads import IdleCores
from cascade.errors import (
    CascadeError,
    ContextTooLong,
    Internal,
    InvalidRequest,
    Overloaded,
    Unavailable,
)
from cascade.sampling import tensor_ops

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from cascade.engine.backends.base import Runner
    from cascade.engine.kv_cache import CachedSequence
    from cascade.engine.model_loader import LoadedModel
    from cascade.types import SessionId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Release:
    session: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class _Adopt:
    session: SessionId
    branch: SessionId


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stop:
    pass


_Message: TypeAlias = ForwardRequest | _Release | _Adopt | _Stop


class Engine:
    """Runs steps of many sessions through one model.

    `submit`, `release`, `adopt`, `spare`, `cached_tokens` and `stats` may be called from any thread
    and never wait. The head is called on the engine's own thread.

    Raises:
        UnsupportedModel: if the model cannot be served exactly.
    """

    def __init__(
        self,
        model: LoadedModel,
        *,
        handler: LogitsHandler,
        settings: EngineSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        settings = settings or EngineSettings()
        self._head = handler
        self._settings = settings
        self.runner, capacity = _prepare(model, settings)
        self._columns = min(settings.vocabulary or model.vocabulary, model.vocabulary)
        device = model.model.device
        self._empty_0V = torch.empty((0, self._columns), dtype=model.model.dtype, device=device)
        self.limit_tokens = min(capacity, model.context_length or capacity)
        self._store = KVCacheManager(
            pool=self.runner.pool,
            capacity=capacity,
            prefix_reuse=settings.prefix_reuse,
            max_idle=settings.max_sessions,
        )
        self._budget = step_tokens(settings, device=device.type)
        self._scheduler = Scheduler(budget=self._budget)
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._clock = clock
        self._meter = BusyMeter(clock=clock)
        self._idle_cores = IdleCores(clock=clock) if device.type == "cpu" else None
        self.current_pass = (
            ForwardPass()
        )  # the pass whose rows the head has; read on the engine's thread
        self._planned_s: float | None = None  # when what runs now was planned
        self._passes = 0
        self._reads = 0
        self._tokens = 0
        self._turns = 0
        self._backlog = 0
        self._queued_tokens = 0
        self._waits = 0
        self._waited_s = 0.0

    def start(self) -> None:
        """Begin to run steps."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after the pass it is in; waiting steps fail with `Unavailable`."""
        self._inbox.put(_Stop())
        if self._thread.ident is not None:
            self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; it ends by `stop` alone, unless the engine has a defect."""
        return self._thread.is_alive()

    @property
    def working_s(self) -> float:
        """Return for how long the present plan has been run, 0 while there is none."""
        planned_s = self._planned_s
        return 0.0 if planned_s is None else self._clock() - planned_s

    def submit(self, request: ForwardRequest) -> None:
        """Queue a step. A session has at most one that is not finished."""
        request.submitted_s = self._clock()
        self._inbox.put(request)

    def release(self, session: SessionId) -> None:
        """End a session: its waiting step is dropped unheard, its cache becomes reusable.

        Its branches end with it.
        """
        self._inbox.put(_Release(session=session))

    def adopt(self, session: SessionId, *, branch: SessionId) -> None:
        """Let a session go on as its branch, which ends as such.

        The session's waiting step is dropped unheard; that of the branch becomes the session's.
        Steps that follow must be submitted: those that a head returns would come before.
        """
        self._inbox.put(_Adopt(session=session, branch=branch))

    @property
    def spare(self) -> float:
        """Return the share of the time that is idle of late; 0 while anything waits for a pass.

        On a CPU it is 0 too unless a whole core is left to this engine: what is done in advance
        must not slow those who share the machine.
        """
        busy = self._meter.share()
        crowded = self._idle_cores is not None and not self._idle_cores.leave_one(busy=busy)
        waits = len(self._scheduler) or not self._inbox.empty()
        return 0.0 if waits or crowded else 1.0 - busy

    def cached_tokens(self, session: SessionId) -> int:
        """Return how many tokens were found in the cache when `session` began."""
        sequence = self._store.find(session)
        return sequence.reused if sequence else 0

    def stats(self) -> EngineStats:
        """Return the present figures."""
        return EngineStats(
            busy=self._meter.share(),
            busy_s=self._meter.busy_s,
            passes=self._passes,
            reads=self._reads,
            tokens=self._tokens,
            turns=self._turns,
            budget_tokens=self._budget,
            queued_tokens=self._queued_tokens,
            waits=self._waits,
            waited_s=self._waited_s,
            waiting=len(self._scheduler) + self._inbox.qsize(),
            sessions=len(self._store),
            branches=self._store.branched,
            cache_tokens_used=self._store.used,
            cache_tokens_live=self._store.live,
            cache_tokens_capacity=self._store.capacity,
            prefix_hits=self._store.prefix_hits,
            prefix_tokens=self._store.prefix_tokens,
            preemptions=self._store.preemptions,
        )

    def step(self) -> bool:
        """Take in what was submitted and run one plan; the thread repeats this until it is False.

        Waits for a message where there is nothing to run. Without `start`, a caller may turn the
        engine itself.
        """
        with torch.inference_mode():
            if not self._receive():
                return False
            self._cycle()
        return True

    def _run(self) -> None:
        threads.apply(threads=self._settings.threads)
        try:
            while self.step():
                pass
        finally:
            self._give_up()

    def _give_up(self) -> None:
        """Fail all that waits, so that nobody waits for a thread that has ended."""
        stopped = Unavailable("The engine has stopped")
        for job in list(self._scheduler):
            self._abandon(job, stopped)
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, ForwardRequest):
                self._fail(message, stopped)

    def _receive(self) -> bool:
        """Take in messages, waiting for one where there is nothing to run; False to stop."""
        for message in self._messages():
            match message:
                case _Stop():
                    return False
                case _Release(session=session):
                    for name in (*self._store.branches(session), session):
                        self._scheduler.remove(name)
                        self._store.release(name)
                case _Adopt(session=session, branch=branch):
                    self._replace(session, branch)
                case ForwardRequest():
                    self._accept(message)
        return True

    def _messages(self) -> Iterator[_Message]:
        if not len(self._scheduler):
            message = self._inbox.get()
            self._meter.note(busy=False)
            yield message
        while True:
            try:
                yield self._inbox.get_nowait()
            except Empty:
                return

    def _accept(self, step: ForwardRequest) -> None:
        """Put a step's tokens into its sequence and the step in the queue, or fail it."""
        try:
            sequence = self._admit(step)
        except CascadeError as error:
            self._fail(step, error)
            return
        # Logits are not kept: wanted rows run again even where their tokens are cached.
        sequence.cached = min(sequence.cached, len(sequence.tokens) - step.num_logits)
        sequence.reused = min(sequence.reused, sequence.cached)
        whole = self.runner.regimes.dynamic and sequence.regime > 0
        job = self._scheduler.add(step, sequence=sequence, whole=whole)
        if not job.remaining:
            self._deliver([(job, 0)], self._empty_0V)

    def _replace(self, session: SessionId, branch: SessionId) -> None:
        """Let a session go on as its branch, unless it was released meanwhile, both with it."""
        if self._store.find(branch) is None:
            return
        self._scheduler.remove(session)
        self._store.adopt(session, branch=branch)
        self._scheduler.rename(branch, to=session)

    def _admit(self, step: ForwardRequest) -> CachedSequence:
        sequence = self._store.find(step.session)
        if sequence is None and step.parent is not None:
            sequence = self._store.branch(step.session, trunk=step.parent, base=step.base)
            if sequence is None:
                raise _no_room()
        known = len(sequence.tokens) if sequence else 0
        self._check(step, known=known)
        regime = self.runner.regimes.of(step.base + len(step.tokens))
        if sequence is None:
            return self._store.open(step.session, tokens=step.tokens, regime=regime)
        sequence.rewrite(base=step.base, tokens=step.tokens, regime=regime)
        self._store.touch(sequence)
        return sequence

    def _check(self, step: ForwardRequest, *, known: int) -> None:
        length = step.base + len(step.tokens)
        if self._scheduler.find(step.session):
            raise Internal(f"Session {step.session} has a step in flight; wait until it is done")
        if not 0 <= step.base <= known:
            raise InvalidRequest(
                f"Session {step.session} has {known} tokens here, so {step.base} cannot be kept; "
                "send it from the start"
            )
        if not 0 <= step.num_logits <= length or not length:
            raise InvalidRequest(f"A step of {length} tokens cannot give {step.num_logits} rows")
        if length > self.limit_tokens:
            raise ContextTooLong(
                f"The session would have {length} tokens; this model's cache and context hold "
                f"{self.limit_tokens}"
            )
        if not known and len(self._store) >= self._settings.max_sessions:
            raise Overloaded(f"All {self._settings.max_sessions} sessions of this replica are open")

    def _cycle(self) -> None:
        """Run what the scheduler plans, pass by pass, and let the owner publish."""
        if not len(self._scheduler):
            return
        self._planned_s = self._clock()
        self._backlog = sum(job.remaining for job in self._scheduler)
        slices = self._plan()
        self._begin(slices)
        for places in self.runner.split([_segment(piece) for piece in slices]):
            self._pass([slices[place] for place in places])
        self._meter.note(busy=True)
        self._planned_s = None

    def _begin(self, slices: Sequence[StepChunk]) -> None:
        """Count the wait of the steps that run for the first time."""
        now_s = self._clock()
        for step in (piece.job.step for piece in slices):
            if step.submitted_s is not None:
                self._waits += 1
                self._waited_s += now_s - step.submitted_s
                step.submitted_s = None

    def _plan(self) -> list[StepChunk]:
        room = Preemptor(store=self._store, scheduler=self._scheduler)
        slices = self._scheduler.plan(reserve=room.reserve)
        for job in room.stunted:
            self._abandon(job, _no_room())
        # Neighbours in the pool are read together, so passes follow the pool's order.
        return sorted(slices, key=_row)

    def _pass(self, slices: list[StepChunk]) -> None:
        """Run one forward pass; what goes wrong in it concerns its own steps alone."""
        segments = [_segment(piece) for piece in slices]
        tokens = sum(piece.count for piece in slices)
        self.current_pass = ForwardPass(began_s=self._clock(), tokens=tokens, sessions=len(slices))
        try:
            logits_NV = self.runner.forward(segments)[:, : self._columns]
        # A pass may fail in the model or on the device in any way; the others' passes go on.
        except Exception as error:
            log.exception("A forward pass of %d sessions failed", len(slices))
            for piece in slices:
                self._abandon(piece.job, error)
            return
        self._passes += 1
        self._tokens += tokens
        self._turns += len(slices)
        self._queued_tokens += self._backlog
        for piece in slices:
            piece.job.sequence.cached += piece.count
        done = [(p.job, s.rows) for p, s in zip(slices, segments, strict=True)]
        self._deliver([(job, rows) for job, rows in done if rows or not job.remaining], logits_NV)

    def _deliver(self, done: Sequence[tuple[ScheduledStep, int]], logits_NV: Tensor) -> None:
        """Give the head its rows and queue the steps that follow."""
        ready = [_ready(job, rows) for job, rows in done]
        for job, rows in done:
            job.delivered += rows
            if not job.remaining:
                self._scheduler.remove(job.step.session)
        if not ready:
            return
        try:
            follow = self._finish(ready, logits_NV)
        # The head is another part's code; its defect must not end every session of the replica.
        except Exception as error:
            log.exception("The head failed on %d steps", len(ready))
            for job, _ in done:
                self._abandon(job, error)
            return
        for step in follow:
            self._accept(step)

    def _finish(self, ready: Sequence[LogitsOutput], logits_NV: Tensor) -> Sequence[ForwardRequest]:
        before = tensor_ops.reads()
        try:
            return self._head.finish(ready, logits_NV)
        finally:
            self._reads += tensor_ops.reads() - before

    def _abandon(self, job: ScheduledStep, error: Exception) -> None:
        self._scheduler.remove(job.step.session)
        self._fail(job.step, error)

    def _fail(self, step: ForwardRequest, error: Exception) -> None:
        try:
            self._head.fail(step, error)
        # As in `_deliver`.
        except Exception:
            log.exception("The head failed to hear of a failure")


def _prepare(model: LoadedModel, settings: EngineSettings) -> tuple[Runner, int]:
    """Return the model's runner, warm, and how many tokens its cache holds."""
    runner = select.choose(model.model, settings=settings)
    capacity = capacity_tokens(
        settings,
        device=model.model.device,
        bytes_per_token=runner.pool.bytes_per_token,
        context_length=model.context_length,
    )
    runner.resize(rows=capacity)
    runner.warm()
    if model.owned:
        runner.free_hf_weights()
    return runner, capacity


def _no_room() -> Overloaded:
    return Overloaded("The cache has no room to spare for a branch")


def _segment(piece: StepChunk) -> Segment:
    sequence = piece.job.sequence
    assert sequence.extent is not None, "a planned step has its rows reserved"
    first, last = sequence.cached, sequence.cached + piece.count
    wanted = piece.job.end - piece.job.step.num_logits + piece.job.delivered
    return Segment(
        start=sequence.extent.start,
        past=first,
        tokens=sequence.tokens[first:last],
        rows=max(0, last - max(first, wanted)),
        regime=sequence.regime,
    )


def _ready(job: ScheduledStep, rows: int) -> LogitsOutput:
    return LogitsOutput(
        request=job.step,
        first=job.delivered,
        count=rows,
        position=job.end - job.step.num_logits + job.delivered,
        last=not job.remaining,
    )


def _row(piece: StepChunk) -> int:
    extent = piece.job.sequence.extent
    return extent.start if extent else 0
