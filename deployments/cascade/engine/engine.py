"""The engine: one model, one KV cache and one thread that turns requests into forward passes."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from functools import partial
from itertools import accumulate, pairwise
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from cascade.engine import encoder_decoder, forward, threads
from cascade.engine.backends import select
from cascade.engine.backends.encoder_decoder import EncoderDecoderRunner
from cascade.engine.batch import Segment
from cascade.engine.kv_cache import KVCacheManager
from cascade.engine.request import ForwardRequest, LogitsHandler, LogitsOutput
from cascade.engine.scheduler import Preemptor, ScheduledStep, Scheduler, StepChunk
from cascade.engine.settings import EngineSettings, step_tokens
from cascade.engine.source_cache import Source, SourceCache
from cascade.engine.stats import BusyMeter, EngineCounters, EngineStats, ForwardPass, IdleCores
from cascade.errors import (
    CascadeError,
    ContextTooLong,
    Internal,
    InvalidLogits,
    InvalidRequest,
    Overloaded,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.forward import Draw
    from cascade.engine.kv_cache import CachedSequence
    from cascade.engine.model_loader import LoadedModel
    from cascade.types import SessionId

log = logging.getLogger(__name__)

_RANKS_S = 10.0  # a pass may wait for another rank without end

# What other threads send: a request, a call to make on the engine's thread, or None to stop it.
_Message: TypeAlias = ForwardRequest | Callable[[], None] | None


class Engine:
    """Runs the requests of many sessions through one model.

    `submit`, `release`, `adopt`, `spare`, `cached_tokens` and `stats` may be called from any thread
    and never block. The logits handler is called on the engine's own thread.

    Args:
        model: The model; if the engine owns it, weights that the runner copied are freed.
        handler: Receives the logits and the failures.
        settings: The defaults if None.
        clock: Seconds, monotonic.

    Raises:
        UnsupportedModel: The model cannot be served exactly.
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
        self._handler = handler
        self._settings = settings
        device = model.model.device
        prepared = threads.run_in_own_thread(select.prepare, model, settings=settings)
        self.runner, capacity = prepared
        self._ranks = model.ranks
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._ended = False  # the thread takes no more messages
        if self._ranks is not None:
            self.runner = self._ranks.lead(self.runner, on_loss=partial(self._inbox.put, None))
        self._columns = model.vocabulary
        self._invalid_logits = InvalidLogits(
            f"After this text the logits of {type(model.model).__name__} are NaN or infinite, so "
            f"no token can be chosen. Check its weights, or serve it in a wider type than "
            f"{str(model.model.dtype).removeprefix('torch.')} (`engine.dtype`)"
        )
        self._empty_0V = torch.empty((0, self._columns), dtype=model.model.dtype, device=device)
        self._budget = step_tokens(settings, device=device.type)
        self._sources: SourceCache | None = None
        self.limit_tokens = min(capacity, model.context_length or capacity)
        self.limit_source = 0  # tokens of the longest; 0 for a decoder-only model
        if isinstance(self.runner, EncoderDecoderRunner):
            lengths = encoder_decoder.lengths(model.model.config, settings)
            self._sources = SourceCache(capacity=self.runner.source_slots, budget=self._budget)
            self.limit_tokens = min(capacity, lengths.answer)
            self.limit_source = min(self._sources.capacity, lengths.source)
        self._cache = KVCacheManager(
            pool=self.runner.pool,
            capacity=capacity,
            prefix_reuse=settings.prefix_reuse,
            max_idle=settings.session_limit,
        )
        self._scheduler = Scheduler(budget=self._budget, linear=device.type == "cpu")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._clock = clock
        self._meter = BusyMeter(clock=clock)
        self._idle_cores = IdleCores(clock=clock) if device.type == "cpu" else None
        self.current_pass = ForwardPass()  # whose logits the handler has; for the engine's thread
        self._pass_began_s, self._pass_tokens = clock(), 0
        self._sharing: list[CachedSequence] = []  # the sequences in the current pass
        # Passes of one token can follow each other without a plan between them. On a CPU each is
        # read; on a GPU tokens are drawn and run without leaving the device.
        self.decodes_ahead = device.type in {"cpu", "cuda"} and self._ranks is None
        self.reads_each = device.type == "cpu"
        self._cycle_began_s: float | None = None  # None between cycles
        self._backlog = 0  # tokens that waited when the current cycle was planned
        self._counters = EngineCounters()

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current pass; waiting requests fail with `Unavailable`."""
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(None if self._ranks is None else _RANKS_S)
        if self._ranks is not None:
            self._ranks.stop()

    @property
    def alive(self) -> bool:
        """Whether the thread runs; `stop`, a defect of the engine or a lost rank ends it."""
        lost = self._ranks is not None and self._ranks.lost
        return self._thread.is_alive() and not lost

    @property
    def working_s(self) -> float:
        """Return the age of the current cycle, 0 if there is none."""
        began_s = self._cycle_began_s
        return 0.0 if began_s is None else self._clock() - began_s

    def submit(self, request: ForwardRequest) -> None:
        """Queue a request. A session has at most one that is not finished."""
        request.submitted_s = self._clock()
        self._inbox.put(request)
        if self._ended:
            self._refuse_waiting()

    def decode_ahead(
        self, sessions: Sequence[SessionId], ids_N: Tensor, draw: Draw, *, passes: int
    ) -> tuple[list[Tensor], list[list[int]]]:
        """Run passes of one token per session, with no plan between them.

        Called by the handler in `finish`, for sessions whose logits it is given. Where another
        block waits to run, or a cache range ends, the passes do. On a GPU, where what they yield is
        read once, after the last, prefills wait for all of them. A model whose RoPE frequencies
        depend on lengths runs none.

        Args:
            sessions: The sessions.
            ids_N: The token of each that runs first, on the device.
            draw: Returns the tokens that run next, or None to end.
            passes: How many passes, at most.

        Returns:
            The logits `[N, V]` and the N tokens of each pass that has run, maybe none.
        """
        sequences = [self._cache.find(session) for session in sessions]
        found = [one for one in sequences if one is not None]
        waits = len(self._scheduler) if self.reads_each else self._scheduler.has_blocks
        if waits or len(found) < len(sequences):
            return [], []
        logits, tokens = forward.decode_ahead(
            self.runner,
            found,
            ids_N,
            draw,
            columns=self._columns,
            passes=min(passes, self.limit_tokens - max(len(one.tokens) for one in found)),
            go_on=self._inbox.empty,
            source_slots=self._source_slots,
        )
        run = len(logits) * len(sessions)
        self._share(found, [len(logits)] * len(found))
        self._counters.passes += len(logits)
        self._counters.tokens += run
        self._counters.turns += run
        self._counters.queued_tokens += run
        return logits, tokens

    def release(self, session: SessionId) -> None:
        """End a session and its branches.

        Their waiting requests are dropped without a call of the handler, the session's cache stays
        for prefix reuse.
        """
        self._inbox.put(partial(self._release, session))

    def adopt(self, session: SessionId, *, branch: SessionId) -> None:
        """Replace a session by its branch, which then is no branch any more.

        The session's waiting request is dropped without a call of the handler; the branch's
        becomes the session's. `submit` the requests that follow: those returned by a handler would
        be accepted before the adoption.
        """
        self._inbox.put(partial(self._adopt, session, branch))

    @property
    def spare(self) -> float:
        """Return the recent share of idle time; 0 while any request waits.

        On a CPU it is also 0 unless a whole core is idle: speculative work must not slow other
        processes of the machine.
        """
        busy = self._meter.share()
        crowded = self._idle_cores is not None and not self._idle_cores.leave_one(busy=busy)
        waits = len(self._scheduler) or not self._inbox.empty()
        return 0.0 if waits or crowded else 1.0 - busy

    def cached_tokens(self, session: SessionId) -> int:
        """Return how many tokens of `session`, source included, were cached when it opened."""
        sequence = self._cache.find(session)
        return sequence.reused + sequence.reused_source if sequence else 0

    def taken_s(self, session: SessionId) -> float:
        """Return the seconds that a session and its branches took of passes since it opened.

        For the handler, on the engine's thread: the current pass counts up to now.
        """
        sequence = self._cache.find(session)
        if sequence is None:
            return 0.0
        running_s = (self._clock() - self._pass_began_s) / max(1, self._pass_tokens)
        return sequence.share.seconds + sequence.share.tokens * running_s

    def stats(self) -> EngineStats:
        """Return a snapshot of load and counters."""
        counters: dict[str, Any] = asdict(self._counters)
        return EngineStats(
            **counters,
            busy=self._meter.share(),
            busy_s=self._meter.busy_s,
            budget_tokens=self._budget,
            waiting=len(self._scheduler) + self._inbox.qsize(),
            sessions=len(self._cache),
            branches=self._cache.num_branches,
            cache_tokens_used=self._cache.used_tokens,
            cache_tokens_live=self._cache.live_tokens,
            cache_tokens_capacity=self._cache.capacity,
            prefix_hits=self._cache.prefix_hits,
            prefix_tokens=self._cache.prefix_tokens,
            preemptions=self._cache.preemptions,
        )

    def step(self) -> bool:
        """Process the inbox and run one cycle; the thread repeats this until it returns False.

        Waits for a message if there is nothing to run. Without `start`, a caller may step the
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
            # No caller must wait for a thread that has ended.
            self._ended = True
            for step in list(self._scheduler):
                self._abandon(step, _stopped())
            self._refuse_waiting()

    def _refuse_waiting(self) -> None:
        with suppress(Empty):
            while True:
                message = self._inbox.get_nowait()
                if isinstance(message, ForwardRequest):
                    self._fail(message, _stopped())

    def _receive(self) -> bool:
        """Process messages, waiting for one if there is nothing to run; False to stop."""
        idle = not len(self._scheduler)
        while idle or not self._inbox.empty():
            message = self._inbox.get()
            if idle:
                self._meter.record(busy=False)
                idle = False
            match message:
                case None:
                    return False
                case ForwardRequest():
                    self._accept(message)
                case _:
                    message()
        return True

    def _release(self, session: SessionId) -> None:
        for name in (*self._cache.branches(session), session):
            self._scheduler.remove(name)
            self._cache.release(name)

    def _adopt(self, session: SessionId, branch: SessionId) -> None:
        if self._cache.find(branch) is None:  # released together with its session
            return
        self._scheduler.remove(session)
        self._cache.adopt(session, branch=branch)
        self._scheduler.rename(branch, to=session)

    def _accept(self, request: ForwardRequest) -> None:
        """Add a request's tokens to its sequence and queue it, or fail it."""
        prefill = self._scheduler.find(request.session)
        if prefill is not None and not prefill.request.num_logits:
            self._scheduler.remove(request.session)
        else:
            prefill = None
        try:
            sequence = self._admit(request)
        except CascadeError as error:
            self._fail(request, error)
            return
        # Logits are not kept: their tokens run again even if they are cached.
        sequence.cached = min(sequence.cached, len(sequence.tokens) - request.num_logits)
        sequence.reused = min(sequence.reused, sequence.cached)
        step = self._scheduler.add(request, sequence=sequence, prefill=prefill)
        self._begin_run(step)
        if step.finished:
            self._deliver([(step, 0)], self._empty_0V)

    def _begin_run(self, step: ScheduledStep) -> None:
        """Let a step run up to the last of its logits that share the RoPE length of the next."""
        rows = range(step.next_logit, step.end)
        if not rows:
            return
        run, rope_length = next(self.runner.rope_lengths.runs(rows))
        step.run_end = run.stop
        if rope_length != step.sequence.rope_length:
            step.sequence.rewrite(base=step.end, tokens=(), rope_length=rope_length)

    def _admit(self, request: ForwardRequest) -> CachedSequence:
        sequence = self._cache.find(request.session)
        if sequence is None and request.parent is not None:
            sequence = self._cache.branch(request.session, parent=request.parent, base=request.base)
            if sequence is None:
                raise _no_space()
        known = len(sequence.tokens) if sequence else 0
        self._check(request, known=known)
        # The next logits are those of the first token that needs some, or of the one to come.
        first_logit = request.base + len(request.tokens) - request.num_logits
        rope_length = self.runner.rope_lengths.of(first_logit + 1)
        if sequence is None:
            source = Source.of(request.source) if request.source else None
            sequence = self._cache.open(
                request.session, tokens=request.tokens, rope_length=rope_length, source=source
            )
            if source is not None and self._sources is not None and source in self._sources:
                sequence.reused_source = len(source.tokens)
                self._cache.prefix_hits += not sequence.reused
                self._cache.prefix_tokens += sequence.reused_source
            return sequence
        sequence.rewrite(base=request.base, tokens=request.tokens, rope_length=rope_length)
        self._cache.touch(sequence)
        return sequence

    def _check(self, request: ForwardRequest, *, known: int) -> None:
        length = request.base + len(request.tokens)
        if self._scheduler.find(request.session):
            raise Internal(f"Session {request.session} has a request in flight; wait for its end")
        if not 0 <= request.base <= known:
            raise InvalidRequest(
                f"Session {request.session} has {known} tokens here, so {request.base} cannot be "
                "kept; send it from the start"
            )
        if not 0 <= request.num_logits <= length or not length:
            raise InvalidRequest(
                f"A request of {length} tokens cannot give {request.num_logits} logits"
            )
        if length > self.limit_tokens:
            raise ContextTooLong(
                f"The session would have {length} tokens; this model's cache and context hold "
                f"{self.limit_tokens}"
            )
        if not known:
            self._check_source(request)
        if not known and len(self._cache) >= self._settings.session_limit:
            raise Overloaded(
                f"All {self._settings.session_limit} sessions of this replica are open"
            )

    def _check_source(self, request: ForwardRequest) -> None:
        if bool(request.source) != (self._sources is not None):
            raise InvalidRequest(
                "This model has no encoder; send the prompt without a source"
                if request.source
                else "This model is an encoder-decoder; send the prompt as its source"
            )
        if len(request.source) > self.limit_source:
            raise ContextTooLong(
                f"The prompt has {len(request.source)} tokens; the encoder of this model reads at "
                f"most {self.limit_source}"
            )

    def _cycle(self) -> None:
        """Plan once and run the plan, pass by pass."""
        if not len(self._scheduler):
            return
        now_s = self._cycle_began_s = self._clock()
        self._backlog = sum(step.remaining + self._unencoded(step) for step in self._scheduler)
        passes = self._plan()
        for request in (chunk.step.request for one_pass in passes for chunk, _ in one_pass):
            if request.submitted_s is not None:
                self._counters.waits += 1
                self._counters.waited_s += now_s - request.submitted_s
                request.submitted_s = None
        for one_pass in passes:
            self._begin_pass()
            counts = [chunk.count for chunk, _ in one_pass]
            self._share([chunk.step.sequence for chunk, _ in one_pass], counts)
            self._forward(one_pass)
            self._end_pass()
        self._meter.record(busy=True)
        self._cycle_began_s = None

    def _plan(self) -> list[list[tuple[StepChunk, Segment]]]:
        """Return the chunks that run, with their segments, pass by pass."""
        preemptor = Preemptor(cache=self._cache, scheduler=self._scheduler)
        chunks = self._scheduler.plan(reserve=self._with_source(preemptor.reserve))
        for step in preemptor.failed:
            self._abandon(step, _no_space())
        if failed := self._encode():
            chunks = [chunk for chunk in chunks if chunk.step.sequence.source not in failed]
        # Sessions that are neighbours in the pool are read together, so segments follow its order.
        planned = sorted(
            ((chunk, self._segment(chunk)) for chunk in chunks), key=lambda pair: pair[1].start
        )
        alone = [[pair] for pair in planned if pair[0].step.alone]
        planned = [pair for pair in planned if not pair[0].step.alone]
        passes = self.runner.split([segment for _, segment in planned])
        return [*([planned[index] for index in indices] for indices in passes), *alone]

    def _with_source(
        self, reserve: Callable[[ScheduledStep], bool]
    ) -> Callable[[ScheduledStep], bool]:
        """Return what also makes sure that the source of a step will be encoded."""
        sources = self._sources
        if sources is None:
            return reserve
        sources.begin_cycle()

        def both(step: ScheduledStep) -> bool:
            source = step.sequence.source
            assert source is not None, "all sessions of an encoder-decoder have one"
            return sources.reserve(source) and reserve(step)

        return both

    def _encode(self) -> set[Source | None]:
        """Encode the sources that the plan needs; return those that cannot be encoded."""
        failed: set[Source | None] = set()
        if self._sources is None:
            return failed
        for source in self._sources.waiting:
            self._counters.tokens += len(source.tokens)
            self._begin_pass()
            readers = [one.sequence for one in self._scheduler if one.sequence.source == source]
            self._share(readers, [1] * len(readers))
            try:
                assert isinstance(self.runner, EncoderDecoderRunner), "it has sources"
                self.runner.encode(source.tokens, slots=self._sources.slots(source))
            # As in `_forward`.
            except Exception as error:
                log.exception("A source of %d tokens cannot be encoded", len(source.tokens))
                self._sources.drop(source)
                failed.add(source)
                for step in [one for one in self._scheduler if one.sequence.source == source]:
                    self._abandon(step, error)
            self._end_pass()
        return failed

    def _begin_pass(self) -> None:
        self._pass_began_s, self._pass_tokens, self._sharing = self._clock(), 0, []

    def _share(self, sequences: Sequence[CachedSequence], counts: Sequence[int]) -> None:
        """Count tokens of sequences in the current pass."""
        for sequence, count in zip(sequences, counts, strict=True):
            sequence.share.tokens += count
            self._pass_tokens += count
            self._sharing.append(sequence)

    def _end_pass(self) -> None:
        """Divide the duration of the pass over the tokens in it."""
        token_s = (self._clock() - self._pass_began_s) / max(1, self._pass_tokens)
        for sequence in self._sharing:
            sequence.share.seconds += sequence.share.tokens * token_s
            sequence.share.tokens = 0

    def _unencoded(self, step: ScheduledStep) -> int:
        """Return how many tokens of a step's source are still to encode."""
        source = step.sequence.source
        waits = source is not None and self._sources is not None and source not in self._sources
        return len(source.tokens) if source is not None and waits else 0

    def _source_slots(self, sequence: CachedSequence) -> range | None:
        if sequence.source is None or self._sources is None:
            return None
        return self._sources.slots(sequence.source)

    def _segment(self, chunk: StepChunk) -> Segment:
        step, sequence = chunk.step, chunk.step.sequence
        assert sequence.kv_range is not None, "a planned step has its slots reserved"
        first, last = sequence.cached, sequence.cached + chunk.count
        return Segment(
            start=sequence.kv_range.start,
            past=first,
            tokens=sequence.tokens[first:last],
            num_logits=max(0, last - max(first, step.next_logit)),
            rope_length=sequence.rope_length,
            source=self._source_slots(sequence),
        )

    def _forward(self, planned: list[tuple[StepChunk, Segment]]) -> None:
        """Run one forward pass; an error fails the steps of this pass only."""
        tokens = sum(chunk.count for chunk, _ in planned)
        self.current_pass = ForwardPass(began_s=self._clock(), tokens=tokens, sessions=len(planned))
        try:
            logits_NV = self.runner.forward([segment for _, segment in planned])
            logits_NV = logits_NV[:, : self._columns]
        # Model and device may fail in any way; the other passes go on.
        except Exception as error:
            log.exception("A forward pass of %d sessions failed", len(planned))
            for chunk, _ in planned:
                self._abandon(chunk.step, error)
            return
        self._counters.passes += 1
        self._counters.tokens += tokens
        self._counters.turns += len(planned)
        self._counters.queued_tokens += self._backlog
        if (invalid := forward.invalid_rows(logits_NV)) is not None:
            planned, logits_NV = self._valid(planned, logits_NV, invalid)
        done: list[tuple[ScheduledStep, int]] = []
        for chunk, segment in planned:
            step = chunk.step
            step.sequence.cached += chunk.count
            step.computed += segment.num_logits
            if not step.remaining and not step.finished:
                self._begin_run(step)
            if segment.num_logits or step.finished:
                done.append((step, segment.num_logits))
        if any(step.held or not step.finished for step, _ in done):
            done, logits_NV = self._hold(done, logits_NV)
        self._deliver(done, logits_NV)

    def _valid(
        self,
        planned: list[tuple[StepChunk, Segment]],
        logits_NV: Tensor,
        invalid: list[bool],
    ) -> tuple[list[tuple[StepChunk, Segment]], Tensor]:
        """Return the part of a pass with valid logits; other steps run again alone, or fail.

        Attention reads masked states of other sessions, and what is NaN there is NaN in the sum. So
        a step is to blame only for what comes of its whole text by itself.
        """
        ends = [0, *accumulate(segment.num_logits for _, segment in planned)]
        bad = [any(invalid[first:end]) for first, end in pairwise(ends)]
        for (chunk, segment), wrong in zip(planned, bad, strict=True):
            if not wrong:
                continue
            step, kv_range = chunk.step, chunk.step.sequence.kv_range
            assert kv_range is not None, "the step has run"
            self.runner.pool.clear(start=kv_range.start, count=kv_range.size)
            step.sequence.cached = 0
            if step.alone or (len(planned) == 1 and not segment.past):
                self._abandon(step, self._invalid_logits)
            step.alone = True
        parts = logits_NV.split([segment.num_logits for _, segment in planned])
        kept = [index for index, wrong in enumerate(bad) if not wrong]
        rows_NV = torch.cat([self._empty_0V, *(parts[index] for index in kept)])
        return [planned[index] for index in kept], rows_NV

    def _hold(
        self, done: Sequence[tuple[ScheduledStep, int]], logits_NV: Tensor
    ) -> tuple[list[tuple[ScheduledStep, int]], Tensor]:
        """Keep back the logits of blocks that run on, add those kept before; return the rest."""
        ready: list[tuple[ScheduledStep, int]] = []
        rows = [self._empty_0V]
        parts = logits_NV.split([count for _, count in done])
        for (step, _), own_NV in zip(done, parts, strict=True):
            step.held.append(own_NV)
            if step.finished or step.request.num_logits > self._budget:
                ready.append((step, sum(map(len, step.held))))
                rows += step.held
                step.held = []
        return ready, torch.cat(rows)

    def _deliver(self, done: Sequence[tuple[ScheduledStep, int]], logits_NV: Tensor) -> None:
        """Give the handler its logits and queue the requests that follow."""
        outputs = [_output(step, count) for step, count in done]
        for step, count in done:
            step.delivered += count
            if step.finished:
                self._scheduler.remove(step.request.session)
        if not outputs:
            return
        following: Sequence[ForwardRequest] = ()
        try:
            following = self._handler.finish(outputs, logits_NV)
        # A defect of the handler must not end every session of the replica.
        except Exception as error:
            log.exception("The logits handler failed on %d requests", len(outputs))
            for step, _ in done:
                self._abandon(step, error)
        for request in following:
            self._accept(request)

    def _abandon(self, step: ScheduledStep, error: Exception) -> None:
        self._scheduler.remove(step.request.session)
        self._fail(step.request, error)

    def _fail(self, request: ForwardRequest, error: Exception) -> None:
        try:
            self._handler.fail(request, error)
        # As in `_deliver`.
        except Exception:
            log.exception("The logits handler failed to handle a failed request")


def _stopped() -> Unavailable:
    return Unavailable("The engine has stopped")


def _no_space() -> Overloaded:
    return Overloaded("The cache has no space left for a branch")


def _output(step: ScheduledStep, count: int) -> LogitsOutput:
    return LogitsOutput(
        request=step.request,
        first=step.delivered,
        count=count,
        position=step.first_logit + step.delivered,
        last=step.finished,
    )
