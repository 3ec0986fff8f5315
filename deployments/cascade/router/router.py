"""The loop: a drafter proposes, an expert judges, the session advances, until the answer ends.

The router owns every request's `Session`; caches elsewhere are a convenience. Each mode of the
server is a choice of who drafts and who judges over the one loop (`operations.roles`).
"""

from __future__ import annotations

import asyncio
import statistics
import uuid
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cascade.errors import DeadlineExceeded, ExpertUnavailable
from cascade.router.circuit_breaker import CircuitBreaker
from cascade.router.drafters import (
    BestEffortDrafter,
    Drafter,
    NoDrafter,
    PredictionDrafter,
    RemoteDrafter,
)
from cascade.router.retry import RetryPolicy
from cascade.router.statistics import RoundRecorder
from cascade.router.tier_session import TierClient, TierSession, now_s, score
from cascade.router.verifiers import AcceptAll, RemoteVerifier, Verifier, VerifyOnDeferral
from cascade.speculation.draft_length import DraftLength, Fixed, expert_slots
from cascade.speculation.modes import accepts_without_expert, policy_in
from cascade.types import (
    Confidence,
    ExpertLoss,
    FinishReason,
    Mode,
    OutputChunk,
    Request,
    Session,
    SessionId,
    Statistics,
    advance,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from cascade import types
    from cascade.types import DecodingParams, TokenLogprob, Verdict


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """How the loop runs."""

    max_generation_s: float = 600.0
    draft_deadline_s: float = 2.0  # a block later than this is given up: the expert goes on alone
    draft_pause_s: float = 1.0  # before a drafter that failed is tried again; up to 4 times as long
    answer_deadline_s: float = 5.0  # before a verdict is asked for again, from a replica that lives
    entry_deadline_s: float = 2.0  # of an answer that has not begun, while no replica is there
    loss_deadline_s: float = 30.0  # of one that has
    chunk_tokens: int = 16  # drafted at a time where no expert judges
    ahead_tokens: int = 8  # the expert writes at a time where no drafter is
    overlap_blocks: int = 1  # the drafter is ahead of the expert
    overlap_branches: int = 4  # other likely verdicts that it drafts on, at most

    @property
    def needed(self) -> RetryPolicy:
        """Return how long an answer bears with a tier that it needs."""
        return RetryPolicy(
            reply_timeout_s=self.answer_deadline_s,
            entry_s=self.entry_deadline_s,
            loss_s=self.loss_deadline_s,
        )

    @property
    def spared(self) -> RetryPolicy:
        """Return how often an answer asks a drafter that it can do without."""
        pauses_s = tuple(times * self.draft_pause_s for times in (1, 2, 4))
        return RetryPolicy(reply_timeout_s=self.draft_deadline_s, pauses_s=pauses_s)


class Router:
    """Generates answers with one drafter tier and one expert tier."""

    def __init__(
        self,
        *,
        drafters: TierClient,
        experts: TierClient,
        automatic: Callable[[DecodingParams], DraftLength],
        options: RouterOptions,
    ) -> None:
        self._drafters = drafters
        self._experts = experts
        self._automatic = automatic
        self._options = options
        self._trust = CircuitBreaker(clock=now_s)

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield the pieces of one answer; the last has a finish reason and the statistics.

        Closing the iterator frees both tiers. Raises the CascadeError that ended the answer early.
        """
        deadline_s = self._deadline_s(request)
        if request.mode is Mode.SEQUENCE_CASCADE:
            pieces = self._sequence_cascade(request, deadline_s=deadline_s)
        else:
            pieces = self._with_expert_fallback(request, Statistics(), deadline_s=deadline_s)
        try:
            async for piece in pieces:
                yield piece
        finally:
            await pieces.aclose()

    async def score(self, tokens: Sequence[int], *, top: int) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token but the first."""
        return await score(self._experts, tuple(tokens), top=top)

    async def _with_expert_fallback(
        self, request: Request, entry: Statistics, *, deadline_s: float
    ) -> AsyncGenerator[OutputChunk]:
        """Yield the answer; the drafter ends it where no expert is left, if the client wishes."""
        written = OutputChunk(tokens=(), origins=())
        try:
            async with aclosing(self._loop(request, entry, deadline_s=deadline_s)) as pieces:
                async for piece in pieces:
                    written = _joined(written, piece)
                    yield piece
        except ExpertUnavailable:
            if request.on_expert_loss is ExpertLoss.FAIL:
                raise
            entry.expert_losses += 1
            alone = replace(request, mode=Mode.DRAFTER_ONLY)
            rest = self._loop(alone, entry, deadline_s=deadline_s, written=written)
            async with aclosing(rest) as pieces:
                async for piece in pieces:
                    yield piece

    async def _loop(
        self,
        request: Request,
        entry: Statistics,
        *,
        deadline_s: float,
        written: OutputChunk | None = None,
    ) -> AsyncGenerator[OutputChunk]:
        session = _session(request, written)
        ledger = RoundRecorder(entry, trace=request.trace)
        length = self._draft_length(request)
        async with self._open_roles(request, session, entry, deadline_s) as (drafter, expert):
            finish = None
            wanted = length.next(room=_draft_budget(request, session))
            while finish is None:
                alone = self._options.ahead_tokens if wanted.tokens else wanted.alone
                async with _until(deadline_s):
                    with ledger.time_draft():
                        offer = await drafter.propose(session, wanted)
                    with ledger.time_verify():
                        room = request.max_tokens - session.position
                        judged = await expert.verify(session, offer, room=room, alone=alone)
                verdict = judged.verdict
                before, session = session, advance(session, verdict, limit=request.max_tokens)
                ledger.record(before, session, offer, verdict, reason=wanted.reason)
                length.learn(ledger.sample(offer, judged))
                drafter.observe(session.policy, offer, verdict)
                finish = _finish(session, request)
                if finish is None:
                    wanted = length.next(room=_draft_budget(request, session))
                    drafter.hint(session, wanted)
                yield _output_chunk(before, session, verdict, finish, entry)

    async def _sequence_cascade(
        self, request: Request, *, deadline_s: float
    ) -> AsyncGenerator[OutputChunk]:
        """Yield the drafter's whole answer where it is sure, else the expert's from scratch."""
        entry = Statistics()
        policy = replace(request.policy, logprobs=request.policy.logprobs or 0)
        draft = replace(request, mode=Mode.DRAFTER_ONLY, policy=policy)
        pieces = [piece async for piece in self._loop(draft, entry, deadline_s=deadline_s)]
        if _confidence(pieces, request.patience) >= request.patience.threshold:
            for piece in pieces:
                yield piece if request.policy.logprobs is not None else replace(piece, logprobs=())
            return
        drafted = sum(len(piece.tokens) for piece in pieces)
        entry.kept_tokens -= drafted
        entry.accepted -= drafted
        entry.judged, entry.deferred = drafted, drafted
        judged = replace(request, mode=Mode.EXPERT_ONLY)
        async with aclosing(
            self._with_expert_fallback(judged, entry, deadline_s=deadline_s)
        ) as rest:
            async for piece in rest:
                yield piece

    @asynccontextmanager
    async def _open_roles(
        self, request: Request, session: Session, entry: Statistics, deadline_s: float
    ) -> AsyncGenerator[tuple[Drafter, Verifier]]:
        """Choose who drafts and who judges, start both on the prompt, and free both at the end."""
        drafters = TierSession(self._drafters, entry, patience=self._options.needed)
        experts = TierSession(self._experts, entry, patience=self._options.needed)
        judging = RemoteVerifier(experts)
        unasked = accepts_without_expert(request.mode, session.policy)
        drafter: Drafter
        expert: Verifier
        match request.mode:
            case Mode.EXPERT_ONLY:
                drafter, expert, needed = NoDrafter(), judging, experts
            case Mode.DRAFTER_ONLY | Mode.SEQUENCE_CASCADE:
                drafter, expert, needed = RemoteDrafter(drafters), AcceptAll(), drafters
            case Mode.TOKEN_CASCADE:
                drafter, expert = (
                    RemoteDrafter(drafters, until_deferral=True),
                    VerifyOnDeferral(judging),
                )
                needed = drafters
            case Mode.SPECULATIVE | Mode.CASCADE:
                drafters = TierSession(self._drafters, entry, patience=self._options.spared)
                drafter = self._hurried(drafters, until_deferral=unasked)
                expert, needed = (
                    (VerifyOnDeferral(judging), None) if unasked else (judging, experts)
                )
        if request.prediction and not unasked:
            drafter = PredictionDrafter(
                request.prediction,
                drafter,
                block_tokens=request.draft_tokens or self._options.chunk_tokens,
                limit=request.max_tokens - expert_slots(session.policy),
            )
        try:
            if needed is not None:
                async with _until(deadline_s):
                    await needed.open(session)
            yield drafter, expert
        finally:
            drafters.close()
            experts.close()

    def _hurried(self, place: TierSession, *, until_deferral: bool) -> BestEffortDrafter:
        options = self._options
        return BestEffortDrafter(
            RemoteDrafter(
                place,
                ahead=options.overlap_blocks,
                branches=options.overlap_branches,
                until_deferral=until_deferral,
            ),
            trust=self._trust,
            deadline_s=options.draft_deadline_s,
        )

    def _draft_length(self, request: Request) -> DraftLength:
        if request.mode is Mode.EXPERT_ONLY:
            return Fixed(tokens=0, reason="expert_only")
        if request.mode in {Mode.DRAFTER_ONLY, Mode.SEQUENCE_CASCADE, Mode.TOKEN_CASCADE}:
            return Fixed(tokens=self._options.chunk_tokens, reason="no expert waits")
        if request.draft_tokens is not None:
            return Fixed(tokens=request.draft_tokens, reason="requested")
        if accepts_without_expert(request.mode, request.policy):
            return Fixed(tokens=self._options.chunk_tokens, reason="until deferral")
        return self._automatic(request.policy)

    def _deadline_s(self, request: Request) -> float:
        longest_s = self._options.max_generation_s
        if request.deadline_s is not None:
            longest_s = min(longest_s, request.deadline_s)
        return now_s() + longest_s


@asynccontextmanager
async def _until(deadline_s: float) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout_at(deadline_s):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("the answer took longer than its deadline") from error


def _session(request: Request, written: OutputChunk | None) -> Session:
    begun = Session(
        id=SessionId(uuid.uuid4().hex),
        prompt=request.prompt,
        policy=policy_in(request.mode, request.policy),
    )
    return replace(begun, tokens=written.tokens, origins=written.origins) if written else begun


def _draft_budget(request: Request, session: Session) -> int:
    """Return how many tokens it is of use to draft."""
    return request.max_tokens - session.position - expert_slots(session.policy)


def _joined(before: OutputChunk, after: OutputChunk) -> OutputChunk:
    tokens, origins = before.tokens + after.tokens, before.origins + after.origins
    return OutputChunk(tokens=tokens, origins=origins)


def _finish(session: Session, request: Request) -> FinishReason | None:
    if session.finished:
        return FinishReason.STOP
    return FinishReason.LENGTH if session.position >= request.max_tokens else None


def _output_chunk(
    before: Session,
    after: Session,
    verdict: Verdict,
    finish: FinishReason | None,
    entry: Statistics,
) -> OutputChunk:
    return OutputChunk(
        tokens=after.tokens[before.position :],
        origins=after.origins[before.position :],
        logprobs=verdict.logprobs[: after.position - before.position],
        finish=finish,
        statistics=entry,
    )


def _confidence(pieces: Sequence[OutputChunk], patience: types.SequenceCascadeParams) -> float:
    """Return how sure the drafter was of its answer, in nats per token."""
    logprobs = sorted(entry.logprob for piece in pieces for entry in piece.logprobs)
    match patience.confidence:
        case Confidence.MEAN:
            return statistics.fmean(logprobs)
        case Confidence.MINIMUM:
            return logprobs[0]
        case Confidence.QUANTILE:
            return logprobs[len(logprobs) // 10]
