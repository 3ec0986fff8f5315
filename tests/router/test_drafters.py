"""Drafters over a scripted tier: deadlines, the circuit breaker, predictions; and the verifiers."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from tests.support.fake_tier import (
    FakeStream,
    FakeTier,
    drafting,
    judgement,
    proposal,
    session,
    silent,
)

from cascade.protocol import services
from cascade.protocol.messages import Judge, Propose
from cascade.router.circuit_breaker import CircuitBreaker
from cascade.router.drafters import (
    NO_DRAFT,
    BestEffortDrafter,
    Draft,
    NoDrafter,
    PredictionDrafter,
    RemoteDrafter,
)
from cascade.router.retry import RetryPolicy
from cascade.router.tier_session import TierSession, now_s
from cascade.router.verifiers import AcceptAll, RemoteVerifier, VerifyOnDeferral
from cascade.rules import Lossless, TokenV3
from cascade.speculation.draft_length import DraftPlan
from cascade.types import Block, DecodingParams, Origin, Statistics, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

PLAN = DraftPlan(tokens=2, reason="requested")


def remote(tier: FakeTier, *, deadline_s: float | None = 60.0, **more: Any) -> RemoteDrafter:
    policy = RetryPolicy(pauses_s=(0.0,), deadline_s=deadline_s, reply_timeout_s=60.0)
    return RemoteDrafter(TierSession(tier.client, Statistics(), policy=policy), **more)


def best_effort(
    tier: FakeTier, *, deadline_s: float = 60.0, breaker: CircuitBreaker | None = None
) -> BestEffortDrafter:
    return BestEffortDrafter(
        remote(tier, deadline_s=deadline_s),
        breaker=breaker or CircuitBreaker(clock=now_s),
        deadline_s=deadline_s,
    )


async def test_no_drafter_never_drafts() -> None:
    drafter = NoDrafter()
    drafter.hint(session(), PLAN)
    assert await drafter.propose(session(), PLAN) is NO_DRAFT


async def test_a_block_is_cut_to_the_plan_and_then_has_no_deferral() -> None:
    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        del stream
        return [proposal(message, 7, 8, 9, deferred=True)] if isinstance(message, Propose) else []

    draft = await remote(FakeTier(reply)).propose(session(), PLAN)
    assert (draft.block.tokens, draft.deferred, draft.passes) == ((7, 8), False, 1)
    whole = await remote(FakeTier(reply)).propose(session(), replace(PLAN, tokens=3))
    assert whole.deferred


async def test_blocks_are_drafted_ahead_only_if_they_are_likely_accepted() -> None:
    tier = FakeTier(drafting(7))
    drafter = remote(tier, ahead=1, branches=4)
    await drafter.propose(session(), PLAN)
    assert (tier.messages[-1].ahead, tier.messages[-1].branches) == (1, 4)
    await drafter.propose(session(), replace(PLAN, survival=0.1))
    assert tier.messages[-1].ahead == 0


async def test_a_plan_of_no_tokens_asks_nobody() -> None:
    tier = FakeTier(silent)
    assert await best_effort(tier).propose(session(), replace(PLAN, tokens=0)) is NO_DRAFT
    assert tier.leases.granted == []


async def test_the_answer_waits_once_for_a_late_drafter() -> None:
    tier = FakeTier(silent)
    drafter = best_effort(tier, deadline_s=0.01)
    tier.leases.gate = None
    assert await drafter.propose(session(), PLAN) is NO_DRAFT
    first = list(tier.messages)
    # Late: it is asked again, and the answer goes on at once.
    assert await drafter.propose(session(), PLAN) is NO_DRAFT
    assert len(tier.messages) >= len(first)
    assert not tier.clients.streams[0].closed


async def test_a_drafter_that_is_back_in_time_is_waited_for_again() -> None:
    tier = FakeTier(silent)
    policy = RetryPolicy(pauses_s=(0.0,), deadline_s=0.01, reply_timeout_s=60.0)
    tier_session = TierSession(tier.client, Statistics(), policy=policy)
    drafter = BestEffortDrafter(
        RemoteDrafter(tier_session), breaker=CircuitBreaker(clock=now_s), deadline_s=60.0
    )
    assert await drafter.propose(session(), PLAN) is NO_DRAFT
    stream = tier.clients.streams[0]
    stream.inbox.put_nowait(proposal(stream.sent[-1], 5))
    stream.reply = drafting(7)
    draft = await drafter.propose(session(), PLAN)
    assert draft.block.tokens == (7,)


async def test_a_drafter_whose_breaker_is_open_is_not_asked() -> None:
    tier, breaker = FakeTier(drafting(7)), CircuitBreaker(clock=now_s)
    while not breaker.is_open("replica-0"):
        breaker.record("replica-0", drafted=4, accepted=0)
    assert await best_effort(tier, breaker=breaker).propose(session(), PLAN) is NO_DRAFT
    assert tier.messages == []
    assert tier.leases.granted[0].closed


async def test_only_rules_that_follow_the_expert_feed_the_breaker() -> None:
    tier, breaker = FakeTier(drafting(7)), CircuitBreaker(clock=now_s)
    drafter = best_effort(tier, breaker=breaker)
    draft = await drafter.propose(session(), PLAN)
    rejected = Verdict(accepted=0, tokens=(1,), origins=(Origin.EXPERT,))
    for _ in range(200):
        drafter.observe(DecodingParams(rule=TokenV3(alpha=0.9)), draft, rejected)
    assert not breaker.is_open("replica-0")
    for _ in range(200):
        drafter.observe(DecodingParams(rule=Lossless()), draft, rejected)
    assert breaker.is_open("replica-0")


async def test_a_prediction_is_followed_left_and_resumed() -> None:
    tier = FakeTier(drafting(99))
    drafter = PredictionDrafter(
        (10, 11, 12, 13, 14, 15, 16), remote(tier), block_tokens=2, limit=100
    )
    first = await drafter.propose(session(), PLAN)
    assert (first.block.tokens, first.predicted) == ((10, 11), True)
    left = await drafter.propose(session(10, 50), PLAN)
    assert (left.block.tokens, left.predicted) == ((99,), False)
    resumed = await drafter.propose(session(10, 50, 12, 13, 14), PLAN)
    assert resumed.block.tokens == (15, 16)


async def test_a_prediction_goes_no_further_than_the_answer() -> None:
    drafter = PredictionDrafter((10, 11, 12), NoDrafter(), block_tokens=8, limit=1)
    assert (await drafter.propose(session(), PLAN)).block.tokens == (10,)


def expert(*replies: tuple[int, ...]) -> FakeTier:
    """Return an expert tier that pushes a verdict for each of `replies` after one message."""

    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        del stream
        if not isinstance(message, Judge):
            return []
        verdicts = [judgement(message, *tokens) for tokens in replies]
        return verdicts[: 1 + message.ahead]

    return FakeTier(reply, kind=services.EXPERT)


def verifier(tier: FakeTier) -> RemoteVerifier:
    return RemoteVerifier(TierSession(tier.client, Statistics(), policy=RetryPolicy()))


async def test_the_expert_writes_ahead_where_nothing_is_drafted() -> None:
    tier = expert((4,))
    result = await verifier(tier).verify(session(), NO_DRAFT, room=5, alone=3)
    assert result.verdict.tokens == (4,)
    assert tier.messages[-1].ahead == 2


async def test_the_expert_writes_no_further_than_the_answer() -> None:
    tier = expert((4,))
    await verifier(tier).verify(session(), NO_DRAFT, room=1, alone=8)
    assert tier.messages[-1].ahead == 0


async def test_accept_all_keeps_the_whole_block() -> None:
    draft = Draft(block=Block(tokens=(7, 8)))
    result = await AcceptAll().verify(session(), draft, room=1, alone=1)
    assert result.verdict.tokens == (7, 8)
    assert set(result.verdict.origins) == {Origin.KEPT}


async def test_the_expert_is_asked_only_where_the_drafter_defers() -> None:
    tier = expert((4,))
    on_deferral = VerifyOnDeferral(verifier(tier))
    draft = Draft(block=Block(tokens=(7, 8)))
    result = await on_deferral.verify(session(), draft, room=9, alone=1)
    assert (result.verdict.tokens, result.verdict.judged, tier.messages) == ((7, 8), 2, [])
    deferred = await on_deferral.verify(session(), replace(draft, deferred=True), room=9, alone=1)
    assert deferred.verdict.tokens == (7, 8, 4)
    assert (deferred.verdict.judged, deferred.verdict.deferred) == (3, 1)


async def test_no_expert_is_asked_at_the_end_of_the_answer() -> None:
    tier = expert((4,))
    draft = Draft(block=Block(tokens=(7, 8)), deferred=True)
    result = await VerifyOnDeferral(verifier(tier)).verify(session(), draft, room=2, alone=1)
    assert result.verdict.tokens == (7, 8)
    assert tier.messages == []
