"""A session on one tier: leases, epochs, what the replica lacks, and recovery."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.fake_tier import (
    FakeStream,
    FakeTier,
    asking,
    drafting,
    proposal,
    session,
    silent,
)

from cascade.errors import DrafterUnavailable, Internal, InvalidRequest, Overloaded
from cascade.protocol.messages import Need, Open, Proposal, Propose, Refusal
from cascade.router.retry import Failure, RetryPolicy
from cascade.router.tier_session import TierSession
from cascade.types import Statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

REQUIRED = RetryPolicy(pauses_s=(0.0,))
BEST_EFFORT = RetryPolicy(pauses_s=(0.0,), deadline_s=60.0)
LATE = RetryPolicy(pauses_s=(0.0,), deadline_s=0.01, reply_timeout_s=60.0)


def on(tier: FakeTier, policy: RetryPolicy = REQUIRED) -> tuple[TierSession, Statistics]:
    statistics = Statistics()
    return TierSession(tier.client, statistics, policy=policy), statistics


async def ask(tier_session: TierSession, *tokens: int) -> Any:
    after = session(*tokens)
    return await tier_session.ask(after, asking(after))


async def test_the_first_message_opens_the_session_under_a_lease() -> None:
    tier = FakeTier(drafting(7, 8))
    tier_session, _ = on(tier)
    reply = await ask(tier_session)
    assert reply.block.tokens == (7, 8)
    opened, asked = tier.messages
    assert isinstance(opened, Open)
    assert (opened.epoch, opened.lease, asked.epoch) == (1, "token", 1)
    assert opened.message_follows
    assert tier_session.address == "replica-0"


async def test_a_session_opened_in_advance_has_no_message_that_follows_at_once() -> None:
    tier = FakeTier(drafting(7, 8))
    tier_session, _ = on(tier)
    await tier_session.open(session())
    (opened,) = tier.messages
    assert isinstance(opened, Open)
    assert not opened.message_follows


async def test_only_tokens_that_the_replica_lacks_are_sent() -> None:
    tier = FakeTier(drafting(7, 8))
    tier_session, _ = on(tier)
    await ask(tier_session, 3)
    assert tier.messages[-1].tokens == ()  # Open carries the whole session
    await ask(tier_session, 3, 4, 5)
    assert tier.messages[-1].tokens == (4, 5)


async def test_a_replica_that_needs_more_tokens_gets_them() -> None:
    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        if not isinstance(message, Propose):
            return []
        if message.tokens:
            return [proposal(message, 9)]
        return [Need(session_id=message.session_id, epoch=stream.epoch, position=0)]

    tier = FakeTier(reply)
    tier_session, _ = on(tier)
    assert await ask(tier_session, 5, 6) is not None
    assert tier.messages[-1].tokens == (5, 6)


async def test_replies_to_earlier_messages_are_skipped_and_their_passes_counted() -> None:
    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        del stream
        if not isinstance(message, Propose):
            return []
        old = replace(proposal(message, 5, passes=4), position=99)
        return [old, proposal(message, 9)]

    tier = FakeTier(reply)
    tier_session, statistics = on(tier)
    found = await ask(tier_session)
    assert found.block.tokens == (9,)
    assert statistics.drafter_passes == 4


@pytest.mark.parametrize(
    ("error", "cause"),
    [
        (DrafterUnavailable("gone"), "drafter lost"),
        (Overloaded("full"), "drafter full"),
        (Internal("broken"), "drafter broken"),
    ],
)
async def test_a_required_tier_is_asked_again_under_the_next_epoch(
    error: Exception, cause: str
) -> None:
    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        if not isinstance(message, Propose):
            return []
        return [error] if stream.epoch == 2 else [proposal(message, 9)]

    tier = FakeTier(reply)
    tier_session, statistics = on(tier)
    await ask(tier_session)

    def fail(message: object, stream: FakeStream) -> Sequence[object]:
        del message, stream
        return [error]

    tier.clients.streams[0].reply = fail
    found = await ask(tier_session)
    assert found.block.tokens == (9,)
    assert [stream.epoch for stream in tier.clients.streams] == [1, 2, 3]
    assert [lease.closed for lease in tier.leases.granted] == [True, True, False]
    assert statistics.failovers == 2
    assert statistics.failover_causes == {cause: 2}


async def test_a_tier_that_stays_away_is_given_up() -> None:
    tier = FakeTier(silent)
    tier.leases.errors = [DrafterUnavailable("nobody")] * 50
    policy = RetryPolicy(pauses_s=(0.01,), entry_s=0.02)
    tier_session, _ = on(tier, policy)
    with pytest.raises(DrafterUnavailable, match="nobody"):
        await ask(tier_session)


async def test_an_error_of_the_request_itself_is_not_retried() -> None:
    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        if not isinstance(message, Propose):
            return []
        return [
            Refusal(
                session_id=message.session_id,
                epoch=stream.epoch,
                code="INVALID_ARGUMENT",
                reason="InvalidRequest",
                message="too long",
            )
        ]

    tier = FakeTier(reply)
    tier_session, statistics = on(tier)
    with pytest.raises(InvalidRequest, match="too long"):
        await ask(tier_session)
    assert (len(tier.clients.streams), statistics.failovers) == (1, 0)


async def test_a_lost_lease_counts_as_a_lost_replica() -> None:
    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        if not isinstance(message, Propose):
            return []
        if stream.epoch > 1:
            return [proposal(message, 9)]
        return [
            Refusal(
                session_id=message.session_id,
                epoch=1,
                code="UNAUTHENTICATED",
                reason="Unauthenticated",
                message="the lease has ended",
            )
        ]

    tier = FakeTier(reply)
    tier_session, statistics = on(tier)
    assert await ask(tier_session) is not None
    assert statistics.failover_causes == {"drafter lost": 1}


async def test_a_tier_that_is_not_required_fails_without_an_error() -> None:
    tier = FakeTier(silent)
    tier.leases.errors = [DrafterUnavailable("nobody")]
    tier_session, statistics = on(tier, BEST_EFFORT)
    assert await ask(tier_session) is None
    assert statistics.failover_causes == {"drafter lost": 1}
    assert statistics.failovers == 0


async def test_a_late_reply_keeps_the_session_open() -> None:
    tier = FakeTier(silent)
    tier_session, statistics = on(tier, LATE)
    assert await ask(tier_session) is None
    assert tier_session.retry_state.late
    assert not tier.clients.streams[0].closed
    assert statistics.failover_causes == {"drafter late": 1}


async def test_a_late_reply_can_be_read_without_waiting() -> None:
    tier = FakeTier(silent)
    tier_session, statistics = on(tier, LATE)
    await ask(tier_session)
    assert not await tier_session.receive_late()
    stream = tier.clients.streams[0]
    stream.inbox.put_nowait(proposal(stream.sent[-1], 7, passes=3))
    assert await tier_session.receive_late()
    assert statistics.drafter_passes == 3


async def test_a_message_sent_early_is_not_sent_again() -> None:
    tier = FakeTier(drafting(7, 8))
    tier_session, _ = on(tier)
    start = session()
    await tier_session.ask(start, asking(start))
    tier_session.hint(start, asking(start))
    sent = len(tier.messages)
    assert await tier_session.ask(start, asking(start)) is not None
    assert len(tier.messages) == sent


async def test_a_pushed_reply_needs_no_message() -> None:
    tier = FakeTier(drafting(7, 8))
    tier_session, _ = on(tier)
    start = session()
    await tier_session.ask(start, asking(start))
    stream = tier.clients.streams[0]
    sent = list(stream.sent)
    stream.inbox.put_nowait(proposal(sent[-1], 5))
    reply = await tier_session.ask(start, asking(start), pushed=True)
    assert isinstance(reply, Proposal)
    assert (reply.block.tokens, stream.sent) == ((5,), sent)


async def test_closing_counts_bytes_and_releases_the_lease() -> None:
    tier = FakeTier(drafting(7, 8))
    tier_session, statistics = on(tier)
    await ask(tier_session)
    tier_session.close()
    tier_session.close()
    assert (statistics.sent_bytes, statistics.received_bytes) == (3, 5)
    assert tier.leases.granted[0].closed
    assert tier.clients.streams[0].closed


async def test_a_lease_granted_after_closing_is_released() -> None:
    tier = FakeTier(silent)
    tier.leases.gate = asyncio.Event()
    tier_session, _ = on(tier)
    assert not await tier_session.has_lease(within_s=0.0)
    tier_session.close()
    tier.leases.gate.set()
    await asyncio.sleep(0)
    assert all(lease.closed for lease in tier.leases.granted)


async def test_a_lease_that_takes_long_is_waited_for_in_the_background() -> None:
    tier = FakeTier(drafting(7, 8))
    tier.leases.gate = asyncio.Event()
    tier_session, _ = on(tier, BEST_EFFORT)
    assert not await tier_session.has_lease(within_s=0.0)
    tier.leases.gate.set()
    assert await tier_session.has_lease(within_s=60.0)
    assert tier_session.retry_state.last is None


async def test_a_failed_lease_request_is_a_failure_of_the_tier() -> None:
    tier = FakeTier(silent)
    tier.leases.errors = [Overloaded("full")]
    tier_session, statistics = on(tier, BEST_EFFORT)
    assert not await tier_session.has_lease(within_s=60.0)
    assert tier_session.retry_state.last is Failure.FULL
    assert statistics.failover_causes == {"drafter full": 1}
