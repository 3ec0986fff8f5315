"""What verifiers send and make of verdicts: what is left of a divergence budget, above all."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.support.fake_tier import FakeStream, FakeTier, judgement, session

from cascade.errors import ExpertUnavailable, Unavailable
from cascade.protocol.messages import Judge
from cascade.protocol.services import EXPERT
from cascade.router.drafters import NO_DRAFT, Draft
from cascade.router.retry import RetryPolicy
from cascade.router.tier_session import TierSession
from cascade.router.verifiers import AcceptAll, RemoteVerifier
from cascade.speculation.cost_model import Timing
from cascade.types import Block, DecodingParams, Session, Statistics, advance

if TYPE_CHECKING:
    from collections.abc import Sequence

REQUIRED = RetryPolicy(pauses_s=(0.0,))
BLOCK = Draft(block=Block(tokens=(4, 5)))


def bounded(budget: float) -> Session:
    return replace(
        session(), policy=DecodingParams(divergence_budget=budget), divergence_left=budget
    )


def dying(message: object, stream: FakeStream) -> Sequence[object]:
    """Spend a quarter of what is left with each verdict; the first replica dies at the second."""
    if not isinstance(message, Judge):
        return []
    if stream.address == "replica-0" and message.position > 0:
        return [Unavailable("the stream broke")]
    found, left = judgement(message, 4, 6, accepted=1), message.divergence_left
    assert left is not None
    verdict = replace(found.verdict, divergences=(left / 4, 0.0), divergence_left=3 * left / 4)
    return [replace(found, verdict=verdict, timing=Timing(taken_s=float(1 + message.position)))]


async def test_what_is_left_of_a_budget_goes_with_an_answer_to_another_replica() -> None:
    tier, statistics = FakeTier(dying, kind=EXPERT), Statistics()
    verifier = RemoteVerifier(TierSession(tier.client, statistics, policy=REQUIRED))
    before = bounded(0.8)
    first = await verifier.verify(before, BLOCK, room=9, alone=1)
    after = advance(before, first.verdict, limit=9)
    assert after.divergence_left == pytest.approx(0.6)
    second = await verifier.verify(after, BLOCK, room=7, alone=1)
    sent = [message for message in tier.messages if isinstance(message, Judge)]
    assert [message.divergence_left for message in sent] == pytest.approx([0.8, 0.6, 0.6])
    assert advance(after, second.verdict, limit=9).divergence_left == pytest.approx(0.45)
    assert statistics.failovers == 1


async def test_an_answer_pays_every_replica_that_it_was_on() -> None:
    tier, statistics = FakeTier(dying, kind=EXPERT), Statistics()
    verifier = RemoteVerifier(TierSession(tier.client, statistics, policy=REQUIRED))
    before = bounded(0.8)
    first = await verifier.verify(before, BLOCK, room=9, alone=1)
    assert statistics.expert_pass_s == 1
    after = advance(before, first.verdict, limit=9)
    await verifier.verify(after, BLOCK, room=7, alone=1)
    assert (statistics.expert_pass_s, statistics.drafter_pass_s) == (1 + 3, 0)


async def test_an_expert_that_does_not_know_of_budgets_is_refused() -> None:
    def old(message: object, stream: FakeStream) -> Sequence[object]:
        del stream
        return [judgement(message, 4)] if isinstance(message, Judge) else []

    tier = FakeTier(old, kind=EXPERT)
    verifier = RemoteVerifier(TierSession(tier.client, Statistics(), policy=REQUIRED))
    with pytest.raises(ExpertUnavailable, match="release"):
        await verifier.verify(bounded(0.8), BLOCK, room=9, alone=1)
    tier = FakeTier(old, kind=EXPERT)
    verifier = RemoteVerifier(TierSession(tier.client, Statistics(), policy=REQUIRED))
    found = await verifier.verify(session(), NO_DRAFT, room=9, alone=1)
    assert found.verdict.divergence(1) == (0, 1), "of such an expert nothing is known"


async def test_the_divergence_of_a_token_that_no_expert_saw_is_not_known() -> None:
    """That of a forced token is: neither model had a choice."""
    draft = Draft(block=Block(tokens=(4, 5), forced=(False, True)))
    found = await AcceptAll().verify(session(), draft, room=9, alone=1)
    assert found.verdict.divergences == (None, 0.0)
    assert found.verdict.divergence(2) == (0.0, 1)
