"""The loop: a drafter proposes, a verifier decides, the session advances, until the answer ends.

The router owns the `Session` of every request; KV caches elsewhere are only a convenience. Each
mode is a `Plan` over the one loop (`speculation.modes`).
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING, ClassVar

from cascade.errors import (
    ContextTooLong,
    DeadlineExceeded,
    DrafterUnavailable,
    ExpertUnavailable,
)
from cascade.router.circuit_breaker import CircuitBreaker
from cascade.router.drafters import (
    BestEffortDrafter,
    Drafter,
    NoDrafter,
    PredictionDrafter,
    RemoteDrafter,
    WaitingDrafter,
)
from cascade.router.retry import RetryPolicy
from cascade.router.statistics import RoundRecorder, discard_drafts
from cascade.router.tier_session import TierClient, TierSession, now_s
from cascade.router.verifiers import AcceptAll, RemoteVerifier, Verifier, VerifyOnDeferral
from cascade.speculation.draft_length import DraftLength, Fixed, expert_slots
from cascade.speculation.modes import DraftSource, VerifyWhen, plan_for
from cascade.types import (
    Confidence,
    DecodingParams,
    DrafterLoss,
    ExpertLoss,
    FinishReason,
    Mode,
    Natural,
    OutputChunk,
    Positive,
    Request,
    Seconds,
    SequenceCascadeParams,
    Session,
    SessionId,
    Statistics,
    advance,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping, Sequence

    from cascade.speculation.draft_length import DraftPlan
    from cascade.speculation.modes import Plan
    from cascade.types import Caller, TokenLogprob

log = logging.getLogger(__name__)

DRAFTERS_DUE_S = 60.0  # after a router's start, by when drafters have loaded or never will
READY_PERIOD_S = 0.25  # of a look whether answers can begin
CHUNK_TOKENS = 16  # drafted at a time where no expert verifies
ALONE_TOKENS = 8  # written in a row by the expert where it has no drafter


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterOptions:
    """How the loop runs; the `router` branch of the settings."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}
    max_generation_s: Seconds = 600.0
    draft_deadline_s: Seconds = 2.0  # after it the expert goes on without a draft
    draft_wait_s: Seconds = 30.0  # for a draft, in requests that wait for one; then they fail
    draft_pause_s: Seconds = 1.0  # before a failed drafter is asked; up to 4 times
    answer_deadline_s: Seconds = 5.0  # before a verdict is asked for again
    entry_deadline_s: Seconds = 2.0  # for an expert, before an answer begins
    loss_deadline_s: Seconds = 30.0  # for another expert, in the middle of one
    lease_timeout_s: Seconds = 8.0  # below gRPC's 10 s to a stream's first status
    lease_hedge_s: Seconds = 0.25  # before a second replica is asked for a lease
    draft_tokens: Positive = 5  # the adaptive length, before it has measured
    overlap_blocks: Natural = 1  # drafted while the expert verifies; 0 waits for it
    overlap_branches: Natural = 4  # other verdicts drafted on, if drafters are idle

    @property
    def required_tier(self) -> RetryPolicy:
        """Return how an answer retries a tier that it needs."""
        return RetryPolicy(
            reply_timeout_s=self.answer_deadline_s,
            entry_s=self.entry_deadline_s,
            loss_s=self.loss_deadline_s,
            lease_s=self.lease_timeout_s,
        )

    @property
    def best_effort_tier(self) -> RetryPolicy:
        """Return how an answer retries a drafter that it can do without."""
        return RetryPolicy(
            deadline_s=self.draft_deadline_s,
            reply_timeout_s=self.draft_deadline_s,
            pauses_s=tuple(times * self.draft_pause_s for times in (1, 2, 4)),
        )

    @property
    def waiting_tier(self) -> RetryPolicy:
        """Return how an answer retries a drafter that it waits for; `draft_wait_s` ends that."""
        return RetryPolicy(
            reply_timeout_s=self.draft_deadline_s, entry_s=math.inf, loss_s=math.inf, queues=True
        )


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
        """Route over two tiers.

        Args:
            drafters: The drafter tier.
            experts: The expert tier.
            automatic: Makes the adaptive draft length of one session.
            options: Deadlines and overlap.
        """
        self._drafters = drafters
        self._experts = experts
        self._automatic = automatic
        self._options = options
        self._breaker = CircuitBreaker(clock=now_s)
        self._drafters_due_s = -math.inf  # when the first drafter is not waited for any more

    def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield an answer in chunks; the last has a finish reason and the statistics.

        Closing the iterator frees both tiers.

        Raises:
            CascadeError: What ended the answer early.
        """
        limit_s = self._options.max_generation_s
        if request.deadline_s is not None:
            limit_s = min(limit_s, request.deadline_s)
        deadline_s = now_s() + limit_s
        if request.mode is Mode.SEQUENCE_CASCADE:
            return self._sequence_cascade(request, deadline_s=deadline_s)
        return self._with_expert_fallback(request, Statistics(), deadline_s=deadline_s)

    async def score(
        self, tokens: Sequence[int], *, top: int, caller: Caller | None = None
    ) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token but the first."""
        policy = self._options.required_tier
        experts = TierSession(self._experts, Statistics(), policy=policy, caller=caller)
        try:
            return await experts.score(_session_id(), tuple(tokens), top=top)
        finally:
            experts.close()

    async def watch(self) -> None:
        """Keep up `ready` and `context_tokens` until cancelled."""
        self._drafters_due_s = now_s() + DRAFTERS_DUE_S
        log.info("The router waits for an expert and a drafter")
        await asyncio.gather(self._experts.watch(), self._drafters.watch(), self._say_when_ready())

    async def _say_when_ready(self) -> None:
        while not self.ready():  # noqa: ASYNC110 - it depends on the clock too
            await asyncio.sleep(READY_PERIOD_S)
        log.info("The router answers requests")

    def ready(self) -> bool:
        """Return whether answers can begin: an expert can be reached.

        They can without a drafter too, but at its start a router waits a while for the first one.
        """
        drafters, experts = self._drafters, self._experts
        if drafters.always_there and not drafters.was_connected and now_s() < self._drafters_due_s:
            return False
        return experts.reachable or not experts.always_there

    def context_tokens(self, mode: Mode, on_drafter_loss: DrafterLoss) -> int | None:
        """Return what prompt and answer may have together, in tokens, as far as replicas have said.

        A drafter counts only where an answer cannot go on without it.
        """
        plan = plan_for(mode, DecodingParams())
        waits = plan.drafter is DraftSource.BEST_EFFORT and on_drafter_loss is DrafterLoss.WAIT
        drafts = waits or plan.drafter is DraftSource.REQUIRED
        verifies = mode is not Mode.DRAFTER_ONLY
        needed = [self._drafters] * drafts + [self._experts] * verifies
        lengths = [tier.context_tokens for tier in needed]
        return min((length for length in lengths if length is not None), default=None)

    def warnings(self) -> list[str]:
        """Return what is wrong though answers can begin, a sentence each."""
        found = [
            f"all drafts of a drafter are rejected under rule {kind}, so it is hardly asked there"
            for kind in sorted(self.suspects())
        ]
        if len(self._drafters.tokenizers | self._experts.tokenizers) > 1:
            found.append(
                "drafters and experts do not have the same token ids; start drafters with the"
                " settings that name the expert, or with `cascade tier drafter --expert`"
            )
        return found

    def suspects(self) -> Mapping[str, int]:
        """Return of how many drafters all drafts are rejected, by the kind of the rule."""
        return self._breaker.suspects()

    async def _loop(
        self, request: Request, session: Session, statistics: Statistics, *, deadline_s: float
    ) -> AsyncGenerator[OutputChunk]:
        plan = plan_for(request.mode, request.policy)
        recorder = RoundRecorder(statistics, trace=request.trace)
        length = self._draft_length(request, plan)
        session, finish = replace(session, policy=plan.params), None
        draft_plan = _next_plan(length, request, session)
        async with self._open_roles(request, plan, statistics) as (drafter, verifier, experts):
            if draft_plan.tokens and plan.verify is VerifyWhen.ALWAYS:
                async with _until(deadline_s):  # the prefill runs while the drafter drafts
                    await experts.open(session)
            while finish is None:
                alone = ALONE_TOKENS if draft_plan.tokens else draft_plan.expert_tokens
                room = request.max_tokens - session.position
                async with _until(deadline_s):
                    with recorder.time_draft():
                        draft = await drafter.propose(session, draft_plan)
                    with recorder.time_verify():
                        result = await verifier.verify(session, draft, room=room, alone=alone)
                verdict = result.verdict
                before, session = session, advance(session, verdict, limit=request.max_tokens)
                recorder.record(before, session, draft, verdict, reason=draft_plan.reason)
                length.learn(recorder.sample(draft, result))
                drafter.observe(before, draft, verdict)
                finish = _finish(session, request)
                if finish is None:
                    draft_plan = _next_plan(length, request, session)
                    drafter.hint(session, draft_plan)
                yield OutputChunk(
                    tokens=session.tokens[before.position :],
                    origins=session.origins[before.position :],
                    logprobs=verdict.logprobs[: session.position - before.position],
                    drafts=draft.block.logprobs[: session.position - before.position],
                    accepted=min(verdict.accepted, session.position - before.position),
                    finish=finish,
                    statistics=statistics,
                )

    async def _with_expert_fallback(
        self, request: Request, statistics: Statistics, *, deadline_s: float
    ) -> AsyncGenerator[OutputChunk]:
        """Yield the answer; the drafter finishes it without an expert, if the client allows."""
        written: list[OutputChunk] = []
        try:
            session = _session(request, written)
            chunks = self._loop(request, session, statistics, deadline_s=deadline_s)
            async with aclosing(chunks):
                async for chunk in chunks:
                    written.append(chunk)
                    yield chunk
        except ContextTooLong:  # to a replica that holds less than those the router knew
            if not written:
                raise
            finish = FinishReason.LENGTH
            yield OutputChunk(tokens=(), origins=(), finish=finish, statistics=statistics)
        except ExpertUnavailable as lost:
            if request.on_expert_loss is ExpertLoss.FAIL:
                raise
            statistics.expert_losses += 1
            request = replace(request, mode=Mode.DRAFTER_ONLY)
            session = _session(request, written)
            chunks = self._loop(request, session, statistics, deadline_s=deadline_s)
            try:
                async with aclosing(chunks):
                    async for chunk in chunks:
                        yield chunk
            except ContextTooLong:
                raise lost from None

    async def _sequence_cascade(
        self, request: Request, *, deadline_s: float
    ) -> AsyncGenerator[OutputChunk]:
        """Yield the drafter's whole answer if it is confident enough, else the expert's."""
        statistics, params = Statistics(), request.patience
        policy = replace(request.policy, logprobs=request.policy.logprobs or 0)
        draft = replace(request, mode=Mode.DRAFTER_ONLY, policy=policy)
        answer = self._with_expert_fallback(draft, statistics, deadline_s=deadline_s)
        chunks = [chunk async for chunk in answer]
        statistics.judged = statistics.drafted
        if _confidence(chunks, params) >= params.threshold:
            wanted = request.policy.logprobs is not None
            for chunk in chunks:
                yield chunk if wanted else replace(chunk, logprobs=(), drafts=())
            return
        discard_drafts(statistics)
        request = replace(request, mode=Mode.EXPERT_ONLY)
        answer = self._with_expert_fallback(request, statistics, deadline_s=deadline_s)
        async with aclosing(answer):
            async for chunk in answer:
                yield chunk

    @asynccontextmanager
    async def _open_roles(
        self,
        request: Request,
        plan: Plan,
        statistics: Statistics,
    ) -> AsyncGenerator[tuple[Drafter, Verifier, TierSession]]:
        """Make the drafter and the verifier of a plan, with its expert; free all at the end."""
        required = self._options.required_tier
        policy, caller = self._drafter_tier(request, plan), request.caller
        drafters = TierSession(self._drafters, statistics, policy=policy, caller=caller)
        experts = TierSession(self._experts, statistics, policy=required, caller=caller)
        try:
            yield self._drafter(request, plan, drafters), _verifier(plan, experts), experts
        except DeadlineExceeded as error:
            if not (_waits_for_drafter(request, plan) and drafters.missing):
                raise
            raise DrafterUnavailable(
                "no drafter was there before the deadline of the answer; the request waits for one"
                " (`on_drafter_loss`)"
            ) from error
        finally:
            drafters.close()
            experts.close()

    def _drafter_tier(self, request: Request, plan: Plan) -> RetryPolicy:
        if _waits_for_drafter(request, plan):
            return self._options.waiting_tier
        if plan.drafter is DraftSource.BEST_EFFORT:
            return self._options.best_effort_tier
        return self._options.required_tier

    def _drafter(self, request: Request, plan: Plan, tier_session: TierSession) -> Drafter:
        options, until_deferral = self._options, plan.verify is VerifyWhen.ON_DEFERRAL
        match plan.drafter:
            case DraftSource.NONE:
                drafter = NoDrafter()
            case DraftSource.REQUIRED:
                drafter = RemoteDrafter(tier_session, until_deferral=until_deferral)
            case DraftSource.BEST_EFFORT:
                remote = RemoteDrafter(
                    tier_session,
                    ahead=options.overlap_blocks,
                    branches=options.overlap_branches,
                    until_deferral=until_deferral,
                )
                waits = _waits_for_drafter(request, plan)
                kind = WaitingDrafter if waits else BestEffortDrafter
                deadline_s = options.draft_wait_s if waits else options.draft_deadline_s
                drafter = kind(remote, breaker=self._breaker, deadline_s=deadline_s)
        if not request.prediction or plan.verify is not VerifyWhen.ALWAYS:
            return drafter
        return PredictionDrafter(
            request.prediction,
            drafter,
            block_tokens=request.draft_tokens or CHUNK_TOKENS,
            limit=request.max_tokens - expert_slots(plan.params),
        )

    def _draft_length(self, request: Request, plan: Plan) -> DraftLength:
        if plan.drafter is DraftSource.NONE:
            return Fixed(tokens=0, reason=plan.length_reason or "")
        if plan.drafter is DraftSource.BEST_EFFORT and request.draft_tokens is not None:
            return Fixed(tokens=request.draft_tokens, reason="requested")
        if plan.length_reason is not None:
            return Fixed(tokens=CHUNK_TOKENS, reason=plan.length_reason)
        return self._automatic(plan.params)


@asynccontextmanager
async def _until(deadline_s: float) -> AsyncGenerator[None]:
    try:
        async with asyncio.timeout_at(deadline_s):
            yield
    except TimeoutError as error:
        raise DeadlineExceeded("the answer took longer than its deadline") from error


def _waits_for_drafter(request: Request, plan: Plan) -> bool:
    return plan.drafter is DraftSource.BEST_EFFORT and request.on_drafter_loss is DrafterLoss.WAIT


def _verifier(plan: Plan, experts: TierSession) -> Verifier:
    match plan.verify:
        case VerifyWhen.ALWAYS:
            return RemoteVerifier(experts)
        case VerifyWhen.ON_DEFERRAL:
            return VerifyOnDeferral(RemoteVerifier(experts))
        case VerifyWhen.NEVER:
            return AcceptAll()


def _next_plan(length: DraftLength, request: Request, session: Session) -> DraftPlan:
    """Return how many tokens to draft next, within those that it is useful to draft."""
    budget = request.max_tokens - session.position - expert_slots(session.policy)
    return replace(length.next(budget=budget), budget=budget)


def _finish(session: Session, request: Request) -> FinishReason | None:
    if session.finished:
        return FinishReason.STOP
    return FinishReason.LENGTH if session.position >= request.max_tokens else None


def _session_id() -> SessionId:
    return SessionId(uuid.uuid4().hex)


def _session(request: Request, written: Sequence[OutputChunk]) -> Session:
    return Session(
        id=_session_id(),
        prompt=request.prompt,
        source=request.source,
        policy=request.policy,
        tokens=tuple(token for chunk in written for token in chunk.tokens),
        origins=tuple(origin for chunk in written for origin in chunk.origins),
        divergence_left=request.policy.divergence_budget,
    )


def _confidence(chunks: Sequence[OutputChunk], params: SequenceCascadeParams) -> float:
    """Return the drafter's confidence in its answer, in nats per token."""
    logprobs = sorted(entry.logprob for chunk in chunks for entry in chunk.logprobs)
    match params.confidence:
        case Confidence.MEAN:
            return fmean(logprobs)
        case Confidence.MINIMUM:
            return logprobs[0]
        case Confidence.QUANTILE:
            return logprobs[len(logprobs) // 10]
