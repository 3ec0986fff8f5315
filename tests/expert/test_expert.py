"""An expert verifies blocks in batches, decodes on alone, and scores texts."""

from __future__ import annotations

import pytest
from tests.support.fake_engine import GREEDY, TOKEN, Client, FakeDrafter, FakeExpert

from cascade.errors import ContextTooLong, InvalidRequest, Overloaded, Unauthenticated
from cascade.protocol.messages import Close, Judge, Judgement, Refusal, Score, Scores
from cascade.types import Block, DecodingParams, Origin, SamplingParams, SessionId


def judge(client: Client, *tokens: int, draft: tuple[int, ...] = (), ahead: int = 0) -> Judge:
    return Judge(**client.after(*tokens), tokens=tokens, block=Block(tokens=draft), ahead=ahead)


def score(*tokens: int, top: int = 0, lease: str = TOKEN) -> Score:
    return Score(session_id=SessionId("text"), epoch=1, lease=lease, tokens=tokens, top=top)


def verdicts(messages: object) -> list[tuple[int, tuple[int, ...]]]:
    assert isinstance(messages, list)
    assert all(isinstance(one, Judgement) for one in messages)
    return [(one.position, one.verdict.tokens) for one in messages]


async def test_blocks_of_all_sessions_are_verified_in_one_pass() -> None:
    expert = FakeExpert()
    clients = [Client(expert, name=name, prompt=(1,)) for name in "ab"]
    clients[0].send(judge(clients[0], draft=(2, 3)))
    clients[1].send(judge(clients[1], draft=(2, 7, 8)))
    expert.engine.run()
    assert verdicts(await clients[0].take()) == [(0, (2, 3, 4))]
    (second,) = await clients[1].take()
    assert isinstance(second, Judgement)
    assert (second.verdict.tokens, second.verdict.accepted) == ((2, 3), 1)
    assert second.verdict.origins == (Origin.DRAFTER, Origin.EXPERT)


async def test_a_judgement_names_the_prefix_of_its_block() -> None:
    client = Client(FakeExpert(), prompt=(1,))
    client.send(judge(client, 2, 3, draft=(4,)))
    (reply,) = await client.run()
    assert isinstance(reply, Judgement)
    assert (reply.position, reply.digest) == (2, client.digest(2, 3))
    assert reply.timing.sessions == reply.timing.open == 1


async def test_after_a_verdict_the_expert_decodes_on_alone() -> None:
    client = Client(FakeExpert(), prompt=(1,))
    client.send(judge(client, draft=(2, 9), ahead=2))
    assert verdicts(await client.run(3)) == [(0, (2, 3)), (2, (4,)), (3, (5,))]
    assert client.replica.engine.waiting == []


async def test_a_new_message_ends_decoding_alone() -> None:
    client = Client(FakeExpert(), prompt=(1,))
    client.send(judge(client, ahead=9))
    await client.run(2)
    client.send(judge(client, 2, 3, 9, draft=(10,)))
    assert verdicts(await client.run()) == [(2, (4,))]
    assert verdicts(await client.run()) == [(3, (10, 11))]


async def test_a_stop_token_ends_decoding_alone() -> None:
    policy = DecodingParams(sampling=SamplingParams(temperature=0.0), stop_ids=(3,))
    client = Client(FakeExpert(), prompt=(1,), policy=policy)
    client.send(judge(client, ahead=9))
    assert verdicts(await client.run(2)) == [(0, (2,)), (1, (3,))]
    assert client.replica.engine.waiting == []


async def test_decoding_alone_ends_at_the_context_limit() -> None:
    client = Client(FakeExpert(limit_tokens=4), prompt=(1,))
    client.send(judge(client, ahead=9))
    assert len(await client.run(4)) == 4
    assert client.replica.engine.waiting == []


async def test_a_closed_session_ends_decoding_alone() -> None:
    client = Client(FakeExpert(), prompt=(1,))
    client.send(judge(client, ahead=9))
    await client.run()
    client.send(Close(session_id=client.session.id, epoch=1))
    assert client.replica.engine.waiting == []


async def test_a_failed_block_refuses_only_its_session() -> None:
    expert = FakeExpert()
    one, other = Client(expert, name="one"), Client(expert, name="other")
    expert.engine.run()
    await one.take()
    for client in (one, other):
        client.send(judge(client, draft=(3,)))
    expert.engine.fail(SessionId("one/0"), Overloaded("no cache space"))
    (refusal,) = await one.take()
    assert isinstance(refusal, Refusal)
    assert verdicts(await other.run()) == [(0, (3, 4))]


async def test_a_text_is_scored_token_by_token() -> None:
    client = Client(FakeExpert(), prompt=(1,), policy=GREEDY)
    client.send(score(1, 2, 9, top=1))
    (reply,) = await client.run()
    assert isinstance(reply, Scores)
    likely, unlikely = reply.logprobs
    assert (likely.token, unlikely.token) == (2, 9)
    assert likely.logprob > unlikely.logprob
    assert [top for one in reply.logprobs for top, _ in one.top] == [2, 3]
    assert client.replica.engine.released == ["score/1"]


async def test_a_text_of_one_token_has_no_scores() -> None:
    client = Client(FakeExpert(), prompt=(1,))
    client.send(score(5))
    (reply,) = await client.take()
    assert isinstance(reply, Scores)
    assert reply.logprobs == ()


async def test_scoring_holds_a_lease_until_its_reply() -> None:
    expert = FakeExpert()
    client, call = Client(expert, prompt=(1,)), expert.lease()
    client.send(score(1, 2, lease=(await anext(call))["token"]))
    assert len(expert.leases) == 1
    assert len(await client.run()) == 1
    assert len(expert.leases) == 0
    assert await anext(call, None) is None


async def test_a_score_that_fails_is_refused_and_freed() -> None:
    client = Client(FakeExpert(), prompt=(1,))
    client.send(score(1, 2))
    client.replica.engine.fail(SessionId("score/1"), Overloaded("no cache space"))
    (refusal,) = await client.take()
    assert isinstance(refusal, Refusal)
    assert (refusal.session_id, refusal.code) == ("text", "RESOURCE_EXHAUSTED")
    assert client.replica.engine.released == ["score/1"]


async def test_a_score_needs_a_lease_and_must_fit() -> None:
    client = Client(FakeExpert(limit_tokens=4), prompt=(1,))
    with pytest.raises(Unauthenticated):
        client.send(score(1, 2, lease="guessed"))
    with pytest.raises(ContextTooLong):
        client.send(score(1, 2, 3, 4, 5))


async def test_a_drafter_does_not_score() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    with pytest.raises(InvalidRequest, match="send Score to an expert"):
        client.send(score(1, 2))
