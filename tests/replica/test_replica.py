"""A replica serves one message of a session at a time and refuses only the session at fault."""

from __future__ import annotations

import pytest
from tests.support.fake_engine import TOKEN, Client, FakeDrafter, FakeExpert

from cascade.errors import ContextTooLong, InvalidRequest, Overloaded, Unauthenticated
from cascade.protocol.messages import (
    Close,
    Judge,
    Judgement,
    Need,
    Open,
    Proposal,
    Propose,
    Refusal,
)
from cascade.types import Block, SessionId


def propose(client: Client, *tokens: int, sent: int = 0, count: int = 2) -> Propose:
    """Return a Propose after these tokens, of which the last `sent` are in the message."""
    new = tokens[len(tokens) - sent :]
    return Propose(**client.after(*tokens), count=count, tokens=new)


async def test_open_prefills_all_but_the_last_token() -> None:
    client = Client(FakeDrafter(), 3, prompt=(1, 2))
    (request,) = client.replica.engine.waiting
    assert (request.tokens, request.num_logits) == ((1, 2), 0)
    assert await client.run() == []


async def test_open_of_a_single_token_needs_no_prefill() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    assert client.replica.engine.waiting == []
    client.send(propose(client))
    assert [one.tokens for one in client.replica.engine.waiting] == [(1,)]


async def test_a_session_whose_message_follows_is_prefilled_with_it() -> None:
    client = Client(FakeDrafter(), 3, prompt=(1, 2), message_follows=True)
    assert client.replica.engine.waiting == []
    client.send(propose(client, 3))
    (request,) = client.replica.engine.waiting
    assert (request.base, request.tokens, request.num_logits) == (0, (1, 2, 3), 1)
    (reply,) = await client.run(2)
    assert isinstance(reply, Proposal)
    assert reply.block.tokens == (4, 5)


async def test_a_message_is_served_though_the_prefill_still_waits() -> None:
    client = Client(FakeDrafter(), 3, prompt=(1, 2))
    client.send(propose(client, 3))
    prefill, request = client.replica.engine.waiting
    assert prefill.num_logits == 0
    assert (request.base, request.tokens, request.num_logits) == (2, (3,), 1)


async def test_a_proposal_follows_the_committed_tokens() -> None:
    client = Client(FakeDrafter(), 3)
    await client.run()
    client.send(propose(client, 3))
    (reply,) = await client.run(2)
    assert isinstance(reply, Proposal)
    assert (reply.position, reply.digest) == (1, client.digest(3))
    assert (reply.block.tokens, reply.passes) == ((4, 5), 2)


async def test_a_session_that_is_busy_serves_the_last_of_its_queued_messages() -> None:
    """Of the messages before it only the tokens count."""
    client = Client(FakeDrafter())
    client.send(propose(client, 3, sent=1))
    client.send(propose(client, 3, 4, sent=1))
    client.send(propose(client, 3, 4, 5, sent=1))
    assert await client.run() == []
    (reply,) = await client.run(2)
    assert isinstance(reply, Proposal)
    assert (reply.position, reply.block.tokens) == (3, (6, 7))


async def test_a_message_repeated_while_it_is_served_is_answered_once() -> None:
    client = Client(FakeDrafter())
    await client.run()
    for _ in range(3):
        client.send(propose(client))
    assert len(await client.run(2)) == 1
    assert client.replica.engine.waiting == []


async def test_missing_tokens_are_requested_from_where_they_begin() -> None:
    client = Client(FakeDrafter(), 3)
    await client.run()
    client.send(propose(client, 3, 4, 5, sent=1))
    assert await client.take() == [Need(session_id=client.session.id, epoch=1, position=1)]
    client.send(propose(client, 3, 4, 5, sent=2))
    (reply,) = await client.run(2)
    assert isinstance(reply, Proposal)
    assert reply.block.tokens == (6, 7)


async def test_tokens_that_differ_are_requested_from_the_start() -> None:
    client = Client(FakeDrafter(), 3, 4)
    await client.run()
    client.send(propose(client, 3, 5))
    assert await client.take() == [Need(session_id=client.session.id, epoch=1, position=0)]


async def test_a_digest_that_matches_no_tokens_is_refused() -> None:
    client = Client(FakeDrafter(), 3)
    await client.run()
    wrong = Propose(
        session_id=client.session.id, epoch=1, position=1, digest=7, count=2, tokens=(4,)
    )
    with pytest.raises(InvalidRequest, match="digest"):
        client.send(wrong)


async def test_a_queued_message_that_fails_refuses_its_session() -> None:
    client = Client(FakeDrafter())
    client.send(propose(client))
    client.send(propose(client, 4, sent=1, count=0))
    (refusal,) = await client.run()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "INVALID_ARGUMENT"
    assert client.replica.num_sessions == 0


async def test_close_frees_the_engine_session_and_the_lease() -> None:
    replica = FakeDrafter()
    call = replica.lease()
    client = Client(replica, lease=(await anext(call))["token"])
    assert (replica.num_sessions, len(replica.leases)) == (1, 1)
    client.send(Close(session_id=client.session.id, epoch=1))
    assert (replica.num_sessions, len(replica.leases)) == (0, 0)
    assert replica.engine.released == ["s/0"]
    assert replica.engine.waiting == []
    assert await anext(call, None) is None


async def test_a_result_of_a_closed_session_is_dropped() -> None:
    client = Client(FakeDrafter(), 3)
    await client.run()
    client.send(propose(client, 3, count=1))
    client.replica.engine.run()  # its result waits for the event loop
    client.send(Close(session_id=client.session.id, epoch=1))
    assert await client.take() == []


async def test_the_end_of_a_stream_closes_its_sessions_only() -> None:
    replica = FakeDrafter()
    one, other = Client(replica, name="one"), Client(replica, name="other")
    replica.disconnected(one.connection)
    assert (replica.num_sessions, replica.engine.released) == (1, ["one/0"])
    await other.run()
    other.send(propose(other, count=1))
    assert len(await other.run()) == 1


async def test_a_session_opened_again_replaces_the_old_one() -> None:
    client = Client(FakeDrafter(), 3)
    client.send(Open(session=client.session, epoch=2, lease=TOKEN))
    assert (client.replica.num_sessions, client.replica.engine.released) == (1, ["s/0"])
    (request,) = client.replica.engine.waiting
    assert request.session == "s/1"


async def test_a_failed_request_refuses_only_its_session() -> None:
    replica = FakeDrafter()
    one, other = Client(replica, name="one"), Client(replica, name="other")
    await one.run()
    for client in (one, other):
        client.send(propose(client, count=1))
    replica.engine.fail(SessionId("one/0"), Overloaded("no cache space"))
    (refusal,) = await one.take()
    assert isinstance(refusal, Refusal)
    assert (refusal.code, replica.num_sessions) == ("RESOURCE_EXHAUSTED", 1)
    (reply,) = await other.run()
    assert isinstance(reply, Proposal)


async def test_an_unknown_failure_of_the_engine_is_an_internal_error() -> None:
    client = Client(FakeDrafter())
    client.replica.engine.fail(SessionId("s/0"), RuntimeError("device lost"))
    (refusal,) = await client.take()
    assert isinstance(refusal, Refusal)
    assert (refusal.code, "device lost" in refusal.message) == ("INTERNAL", True)


async def test_a_session_without_a_lease_is_not_opened() -> None:
    with pytest.raises(Unauthenticated):
        Client(FakeDrafter(), lease="guessed")


async def test_the_end_of_a_lease_refuses_its_session() -> None:
    replica = FakeDrafter()
    call = replica.lease()
    client = Client(replica, lease=(await anext(call))["token"])
    other = Client(replica, name="other", lease=TOKEN)
    await call.aclose()
    (refusal,) = await client.take()
    assert isinstance(refusal, Refusal)
    assert (refusal.code, replica.num_sessions) == ("UNAUTHENTICATED", 1)
    assert await other.take() == []


async def test_a_prompt_must_be_there_and_fit() -> None:
    with pytest.raises(InvalidRequest, match="empty"):
        Client(FakeDrafter(), prompt=())
    with pytest.raises(ContextTooLong, match="context of 4"):
        Client(FakeDrafter(limit_tokens=4), 3, 4, 5)


async def test_a_block_must_fit_the_context() -> None:
    client = Client(FakeExpert(limit_tokens=4), 3)
    await client.run()
    with pytest.raises(ContextTooLong):
        client.send(Judge(**client.after(3), block=Block(tokens=(4, 5))))


async def test_committed_tokens_of_a_verdict_need_not_be_sent_back() -> None:
    client = Client(FakeExpert())
    await client.run()
    client.send(Judge(**client.after(), block=Block(tokens=(3, 9))))
    (first,) = await client.run()
    assert isinstance(first, Judgement)
    assert (first.position, first.verdict.tokens) == (0, (3, 4))
    client.send(Judge(**client.after(3, 4), block=Block(tokens=(5,))))
    (second,) = await client.run()
    assert isinstance(second, Judgement)
    assert (second.position, second.verdict.tokens) == (2, (5, 6))


async def test_a_hanging_device_is_not_alive() -> None:
    replica = FakeDrafter()
    assert replica.alive
    replica.engine.working_s = 1e6
    assert not replica.alive
