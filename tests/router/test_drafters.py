"""Drafters over a scripted tier: deadlines, the circuit breaker, predictions; and the verifiers."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.clock import FakeClock
from tests.support.fake_tier import (
    FakeStream,
    FakeTier,
    drafting,
    judgement,
    proposal,
    session,
    silent,
)

from cascade.errors import (
    CascadeError,
    ContextTooLong,
    DrafterUnavailable,
    Internal,
    Overloaded,
)
from cascade.protocol import services
from cascade.protocol.messages import Judge, Propose
from cascade.router.circuit_breaker import PROBE_PERIOD_S, CircuitBreaker
from cascade.router.drafters import (
    NO_DRAFT,
    BestEffortDrafter,
    Draft,
    NoDrafter,
    PredictionDrafter,
    RemoteDrafter,
    WaitingDrafter,
)
from cascade.router.retry import RetryPolicy
from cascade.router.router import RouterOptions
from cascade.router.tier_session import TierSession, now_s
from cascade.router.verifiers import AcceptAll, RemoteVerifier, VerifyOnDeferral
from cascade.rules import Lossless, Lossy, Rule, TokenV3
from cascade.speculation.draft_length import DraftPlan
from cascade.types import Block, Origin, Session, Statistics, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

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
    assert (await drafter.propose(session(), PLAN)).block.length == 0
    first = list(tier.messages)
    # Late: it is asked again, and the answer goes on at once.
    assert (await drafter.propose(session(), PLAN)).block.length == 0
    assert len(tier.messages) >= len(first)
    assert not tier.clients.streams[0].closed


async def test_a_drafter_that_is_back_in_time_is_waited_for_again() -> None:
    tier = FakeTier(silent)
    policy = RetryPolicy(pauses_s=(0.0,), deadline_s=0.01, reply_timeout_s=60.0)
    tier_session = TierSession(tier.client, Statistics(), policy=policy)
    drafter = BestEffortDrafter(
        RemoteDrafter(tier_session), breaker=CircuitBreaker(clock=now_s), deadline_s=60.0
    )
    assert (await drafter.propose(session(), PLAN)).undrafted == "late"
    stream = tier.clients.streams[0]
    stream.inbox.put_nowait(proposal(stream.sent[-1], 5))
    stream.reply = drafting(7)
    draft = await drafter.propose(session(), PLAN)
    assert draft.block.tokens == (7,)


REJECTED = Verdict(accepted=0, tokens=(1,), origins=(Origin.EXPERT,), judged=1)


def after(*tokens: int, prompt: int = 1, rule: Rule = Lossless()) -> Session:  # noqa: B008 - frozen
    """Return a session with a prompt and a rule of its own."""
    base = session(*tokens, prompt=(prompt, 2))
    return replace(base, policy=replace(base.policy, rule=rule))


def opened(clock: FakeClock, rule: Rule = Lossless()) -> CircuitBreaker:  # noqa: B008 - frozen
    """Return a breaker that is open for the first replica under a rule, and let a block through."""
    breaker = CircuitBreaker(clock=clock)
    for prompt in range(100):
        breaker.record("replica-0", after(9, rule=rule), REJECTED, prompt=prompt)
    assert breaker.allows("replica-0", rule)
    return breaker


async def test_a_drafter_whose_drafts_are_rejected_is_not_asked_under_that_rule() -> None:
    clock = FakeClock()
    tier, breaker = FakeTier(drafting(7)), opened(clock)
    drafter = best_effort(tier, breaker=breaker)
    draft = await drafter.propose(session(), PLAN)
    assert (draft.block.length, draft.undrafted) == (0, "collapsed")
    assert tier.messages == []
    assert tier.leases.granted[0].closed
    tier = FakeTier(drafting(7))
    other = await best_effort(tier, breaker=breaker).propose(after(rule=TokenV3(alpha=0.9)), PLAN)
    assert (other.block.tokens, other.undrafted) == ((7,), "")


async def test_a_drafter_whose_drafts_are_rejected_is_asked_now_and_then() -> None:
    clock = FakeClock()
    breaker = opened(clock)
    clock.now_s += PROBE_PERIOD_S
    tier = FakeTier(drafting(7))
    draft = await best_effort(tier, breaker=breaker).propose(session(), PLAN)
    assert draft.block.tokens == (7,)
    tier = FakeTier(drafting(7))
    assert not (await best_effort(tier, breaker=breaker).propose(session(), PLAN)).block.length


@pytest.mark.parametrize("rule", [Lossless(), Lossy(alpha=0.1), TokenV3(alpha=0.9)])
async def test_every_rule_shows_what_is_rejected_under_it(rule: Rule) -> None:
    """By several prompts: many verdicts on answers to one prompt show nothing."""
    breaker = CircuitBreaker(clock=FakeClock())
    for prompt in (1,) * 20 + (2, 3, 4, 5):
        assert not breaker.suspects()
        drafter = best_effort(FakeTier(drafting(7)), breaker=breaker)
        draft = await drafter.propose(after(prompt=prompt, rule=rule), PLAN)
        for _ in range(30):
            drafter.observe(after(9, prompt=prompt, rule=rule), draft, REJECTED)
    assert breaker.suspects() == {rule.kind: 1}


async def test_a_draft_that_is_missing_says_why() -> None:
    for error, cause in (
        (DrafterUnavailable("gone"), "lost"),
        (Overloaded("full"), "full"),
    ):
        tier = FakeTier(drafting(7))
        tier.leases.errors.append(error)
        assert (await best_effort(tier).propose(session(), PLAN)).undrafted == cause
    for error, cause in (
        (DrafterUnavailable("died"), "lost"),
        (Internal("a forward pass failed: NaN"), "broken"),
        (ContextTooLong("600 tokens do not fit"), "context"),
    ):
        tier = FakeTier(failing(error))
        assert (await best_effort(tier).propose(session(), PLAN)).undrafted == cause
    late = best_effort(FakeTier(silent), deadline_s=0.01)
    assert [(await late.propose(session(), PLAN)).undrafted for _ in range(2)] == ["late", "late"]


async def test_a_lease_that_is_not_granted_yet_is_the_cause_of_a_missing_draft() -> None:
    tier = FakeTier(drafting(7))
    tier.leases.gate = asyncio.Event()
    drafter = best_effort(tier, deadline_s=0.01)
    assert (await drafter.propose(session(), PLAN)).undrafted == "lease"
    assert (await drafter.propose(session(9), PLAN)).undrafted == "lease"
    tier.leases.gate.set()
    await asyncio.sleep(0)
    assert (await drafter.propose(session(9, 9), PLAN)).block.tokens == (7,)


async def test_a_drafter_whose_text_gives_no_token_is_the_cause_of_a_missing_draft() -> None:
    drafter = best_effort(FakeTier(drafting()))
    assert (await drafter.propose(session(), PLAN)).undrafted == "empty"


async def test_a_drafter_that_holds_no_more_of_an_answer_is_not_asked_again() -> None:
    tier = FakeTier(failing(ContextTooLong("600 tokens do not fit")))
    drafter = best_effort(tier)
    for length in range(5):
        assert (await drafter.propose(session(*range(length)), PLAN)).undrafted == "context"
    assert len(tier.leases.granted) == 1
    assert tier.leases.granted[0].closed


def failing(error: CascadeError) -> Callable[[object, FakeStream], Sequence[object]]:
    """Return a script that fails whenever it is asked."""

    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        del stream
        return [error] if isinstance(message, Propose) else []

    return reply


def waiting(tier: FakeTier, *, deadline_s: float, breaker: CircuitBreaker | None = None) -> Any:
    """Return a drafter that waits, over a tier."""
    policy = RouterOptions().waiting_tier
    return WaitingDrafter(
        RemoteDrafter(TierSession(tier.client, Statistics(), policy=policy)),
        breaker=breaker or CircuitBreaker(clock=FakeClock()),
        deadline_s=deadline_s,
    )


async def test_a_request_that_waits_gets_its_draft_whatever_fails_before() -> None:
    """No lease, a full tier, a stream that breaks, an open breaker: then a block."""
    tier = FakeTier(drafting(7))
    tier.leases.errors += [DrafterUnavailable("none"), Overloaded("full"), Overloaded("full")]
    drafter = waiting(tier, deadline_s=60, breaker=opened(FakeClock()))
    draft = await drafter.propose(session(), PLAN)
    assert (draft.block.tokens, draft.undrafted) == ((7,), "")
    stream = tier.clients.streams[0]
    stream.reply = failing(DrafterUnavailable("died"))
    assert (await drafter.propose(session(9), PLAN)).block.tokens == (7,)
    assert len(tier.leases.granted) == 2


@pytest.mark.parametrize("script", [silent, failing(Internal("NaN"))], ids=["silent", "broken"])
async def test_a_request_that_waits_in_vain_fails_and_may_be_repeated(script: Any) -> None:
    with pytest.raises(DrafterUnavailable, match="on_drafter_loss") as found:
        await waiting(FakeTier(script), deadline_s=0.05).propose(session(), PLAN)
    assert (found.value.http, found.value.retry_after_s is not None) == (503, True)


async def test_a_request_that_waits_for_a_lease_in_vain_fails_too() -> None:
    tier = FakeTier(drafting(7))
    tier.leases.gate = asyncio.Event()
    with pytest.raises(DrafterUnavailable):
        await waiting(tier, deadline_s=0.05).propose(session(), PLAN)


async def test_waiting_for_a_drafter_that_holds_no_more_is_refused() -> None:
    with pytest.raises(ContextTooLong, match="on_drafter_loss"):
        await waiting(FakeTier(failing(ContextTooLong("600"))), deadline_s=60).propose(
            session(), PLAN
        )


async def test_a_plan_of_no_tokens_waits_for_nobody() -> None:
    drafter = waiting(FakeTier(silent), deadline_s=0.01)
    assert await drafter.propose(session(), replace(PLAN, tokens=0)) is NO_DRAFT


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
