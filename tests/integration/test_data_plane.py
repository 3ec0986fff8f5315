"""Replicas get bytes and messages that our router never sends."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import ExpertUnavailable
from cascade.protocol import services
from cascade.protocol.client import ReplicaClient
from cascade.protocol.codec import decode_client_message, encode_frame, parse_frame
from cascade.protocol.messages import (
    Judge,
    Judgement,
    Need,
    Open,
    Proposal,
    Propose,
    Refusal,
    Score,
    extend_digest,
)
from cascade.protocol.services import LEASE_KEY
from cascade.rules import (
    Bild,
    Chow,
    ChowLog,
    Ensemble,
    Fuzzy,
    Lossless,
    Lossy,
    Opt,
    OptLog,
    Rule,
    TokenV1,
    TokenV3,
    Typical,
)
from cascade.speculation.verify import VerifyTask, rows_needed
from cascade.speculation.verify import verify as judge_all
from cascade.types import (
    Block,
    Bonus,
    Coupling,
    DecodingParams,
    DraftStats,
    Mode,
    Request,
    RowFormat,
    SamplingParams,
    Session,
    SessionId,
    SparseProbs,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cascade.local import LocalServer
    from cascade.protocol.client import SessionStream

PROMPT: tuple[int, ...] = (3, 1, 4, 1, 5)

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))

SESSION = SessionId("mine")


@pytest.fixture
async def expert(toy_stack: LocalServer) -> AsyncIterator[ReplicaClient]:
    client = ReplicaClient(toy_stack.expert.address, services.EXPERT)
    yield client
    await client.close()


@pytest.fixture
async def drafter(toy_stack: LocalServer) -> AsyncIterator[ReplicaClient]:
    client = ReplicaClient(toy_stack.drafter.address, services.DRAFTER)
    yield client
    await client.close()


def opened(stack: LocalServer, client: ReplicaClient, **session: Any) -> SessionStream:
    stream = client.open_stream(SESSION, 1, lease=stack.token)
    opened_session = replace(Session(id=SESSION, prompt=PROMPT, policy=GREEDY), **session)
    stream.send(Open(session=opened_session, epoch=1, lease=stack.token))
    return stream


def judge(**changes: Any) -> Judge:
    default = Judge(session_id=SESSION, epoch=1, position=0, digest=extend_digest(0, PROMPT))
    return replace(default, **changes)


async def refusal(stream: SessionStream) -> Refusal:
    reply = await stream.receive()
    assert isinstance(reply, Refusal), reply
    return reply


async def check_still_serves(stack: LocalServer) -> None:
    """Check that another session is served."""
    request = Request(prompt=PROMPT, policy=GREEDY, mode=Mode.SPECULATIVE, max_tokens=6)
    chunks = [chunk async for chunk in stack.router.generate(request)]
    assert sum(len(chunk.tokens) for chunk in chunks) == 6


@pytest.mark.parametrize("kind", [services.DRAFTER, services.EXPERT], ids=["drafter", "expert"])
async def test_invalid_bytes_end_their_stream_only(
    toy_stack: LocalServer, kind: services.TierKind
) -> None:
    replica = toy_stack.drafter if kind is services.DRAFTER else toy_stack.expert
    rng = random.Random(5)  # noqa: S311 - reproducible, no secret
    request = Request(prompt=PROMPT, policy=GREEDY, mode=Mode.SPECULATIVE, max_tokens=60)
    running = toy_stack.router.generate(request)
    await anext(running)
    async with grpc.aio.insecure_channel(replica.address) as channel:
        for size in (1, 7, 100, 5000):
            call = channel.stream_stream(kind.path(kind.stream_method))(
                metadata=((LEASE_KEY, toy_stack.token),)
            )
            await call.write(b"\xff" + rng.randbytes(size))
            with pytest.raises(grpc.aio.AioRpcError) as ended:
                _ = [message async for message in call]
            assert ended.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    rest = [chunk async for chunk in running]
    assert rest[-1].finish is not None
    await check_still_serves(toy_stack)


async def test_a_session_that_was_never_opened_is_refused(
    toy_stack: LocalServer, expert: ReplicaClient, drafter: ReplicaClient
) -> None:
    stream = expert.open_stream(SESSION, 1, lease=toy_stack.token)
    stream.send(judge())
    assert (await refusal(stream)).code == "NOT_FOUND"
    other = drafter.open_stream(SESSION, 1, lease=toy_stack.token)
    other.send(Propose(session_id=SESSION, epoch=1, position=0, digest=0, count=3))
    assert (await refusal(other)).code == "NOT_FOUND"
    await check_still_serves(toy_stack)


async def test_a_session_needs_a_lease(toy_stack: LocalServer, expert: ReplicaClient) -> None:
    stream = expert.open_stream(SESSION, 1, lease=toy_stack.token)
    session = Session(id=SESSION, prompt=PROMPT, policy=GREEDY)
    stream.send(Open(session=session, epoch=1, lease="guess"))
    assert (await refusal(stream)).code == "UNAUTHENTICATED"
    stream = expert.open_stream(SessionId("score"), 1, lease=toy_stack.token)
    stream.send(Score(session_id=SessionId("score"), epoch=1, lease="", tokens=PROMPT, top=1))
    assert (await refusal(stream)).code == "UNAUTHENTICATED"


async def test_a_stream_needs_a_lease(toy_stack: LocalServer, expert: ReplicaClient) -> None:
    wrong = replace(toy_stack, token="guess")  # noqa: S106 - a wrong one
    with pytest.raises(ExpertUnavailable, match="UNAUTHENTICATED"):
        await refusal(opened(wrong, expert))
    assert toy_stack.expert.num_sessions == 0


async def test_tokens_outside_the_vocabulary_are_refused(
    toy_stack: LocalServer, expert: ReplicaClient
) -> None:
    assert (await refusal(opened(toy_stack, expert, prompt=(3, 8)))).code == "INVALID_ARGUMENT"
    stream = opened(toy_stack, expert)
    stream.send(judge(block=Block(tokens=(99,), likelihoods=(1.0,))))
    assert "99" in (await refusal(stream)).message
    await check_still_serves(toy_stack)


async def test_a_prompt_longer_than_the_context_is_refused(
    toy_stack: LocalServer, expert: ReplicaClient
) -> None:
    refused = await refusal(opened(toy_stack, expert, prompt=(1,) * 513))
    assert refused.code == "INVALID_ARGUMENT"
    assert "512" in refused.message


async def test_a_block_without_the_stats_of_its_rule_is_judged(
    toy_stack: LocalServer, expert: ReplicaClient
) -> None:
    """Opt needs the drafter's stats; without them the expert decides alone."""
    stream = opened(toy_stack, expert, policy=DecodingParams(rule=Opt(alpha=0.2)))
    stream.send(judge(block=Block(tokens=(1, 2), likelihoods=(0.5, 0.5))))
    assert isinstance(await stream.receive(), Judgement)
    await check_still_serves(toy_stack)


UNITS = st.floats(0, 1)

RULES: tuple[Rule, ...] = (
    Lossless(),
    Lossy(alpha=0.3, beta="solved"),
    Ensemble(weight=0.5),
    Chow(alpha=0.5),
    ChowLog(alpha=1.0),
    Opt(alpha=0.2),
    OptLog(alpha=0.2),
    Bild(alpha=1.0),
    Fuzzy(alpha=0.1),
    TokenV1(alpha=0.3),
    TokenV3(alpha=0.5),
    Typical(),
)


@st.composite
def policies(draw: st.DrawFn) -> DecodingParams:
    return DecodingParams(
        rule=draw(st.sampled_from(RULES)),
        coupling=draw(st.sampled_from(Coupling)),
        bonus=draw(st.sampled_from(Bonus)),
        verification=draw(st.sampled_from(Verification)),
        rows=draw(st.sampled_from(RowFormat)),
        sampling=SamplingParams(temperature=draw(st.sampled_from([0.0, 0.7, 1.0]))),
    )


@st.composite
def rows(draw: st.DrawFn) -> SparseProbs:
    ids = draw(st.lists(st.integers(0, 7), unique=True, max_size=4))
    size = len(ids) or draw(st.sampled_from([0, 8]))
    weights = np.array([draw(UNITS) for _ in range(size)], np.float16)
    weights[:1] = 1
    unscaled = np.array([draw(UNITS) for _ in range(size)], np.float16)
    return SparseProbs(
        ids=np.array(ids, np.uint32),
        weights=weights,
        unscaled=unscaled if draw(st.booleans()) else None,
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Return a block that decodes, whether or not it has what the rule needs."""
    length = draw(st.integers(0, 3))
    tokens = tuple(draw(st.integers(0, 7)) for _ in range(length))

    def some(values: st.SearchStrategy[Any], *, more: int = 0) -> tuple[Any, ...]:
        size = draw(st.sampled_from([0, length, length + more]))
        return tuple(draw(values) for _ in range(size))

    stats = st.builds(DraftStats, max_prob=UNITS, argmax=st.integers(0, 7), entropy=st.floats(0, 9))
    return Block(
        tokens=tokens,
        likelihoods=some(UNITS),
        unscaled=some(UNITS),
        draft_stats=some(stats, more=1),
        draft_probs=some(rows(), more=1),
    )


@given(policies(), blocks())
@settings(max_examples=100, deadline=None)
def test_no_block_that_decodes_breaks_the_batch_of_others(
    policy: DecodingParams, block: Block
) -> None:
    """A replica verifies all sessions in one batch; a strange block must not change the others."""
    sent = encode_frame(judge(block=block), services.EXPERT.request)
    strange = decode_client_message(parse_frame(sent, services.EXPERT.request)[0])
    assert isinstance(strange, Judge)
    normal = VerifyTask(policy=policy, position=0, block=Block(tokens=(1,)))
    task = VerifyTask(policy=policy, position=0, block=strange.block)
    generator = torch.Generator().manual_seed(3)
    counts = [rows_needed(policy, each.block.tokens) for each in (normal, task)]
    logits_NV = torch.randn(sum(counts), 8, generator=generator)
    together = judge_all(logits_NV, [normal, task])
    assert together[0] == judge_all(logits_NV[: counts[0]], [normal])[0]
    assert all(0 <= token < 8 for token in together[1].tokens)


async def test_missing_tokens_are_requested_and_a_wrong_digest_refused(
    toy_stack: LocalServer, expert: ReplicaClient
) -> None:
    stream = opened(toy_stack, expert)
    stream.send(judge(position=4, tokens=(1,)))
    assert await stream.receive() == Need(session_id=SESSION, epoch=1, position=0)
    stream.send(judge(position=2, tokens=(1, 2), digest=7))
    assert "digest" in (await refusal(stream)).message
    await check_still_serves(toy_stack)


async def test_a_repeated_judge_gets_the_same_judgement(
    toy_stack: LocalServer, expert: ReplicaClient
) -> None:
    stream = opened(toy_stack, expert)
    block = Block(tokens=(1, 2, 3), likelihoods=(1.0, 1.0, 1.0))
    stream.send(judge(block=block))
    first = await stream.receive()
    stream.send(judge(block=block))
    again = await stream.receive()
    assert isinstance(first, Judgement)
    assert isinstance(again, Judgement)
    assert replace(again, timing=first.timing) == first


async def test_a_message_of_an_old_epoch_is_ignored(
    toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    stream = opened(toy_stack, drafter)
    propose = Propose(
        session_id=SESSION, epoch=1, position=0, digest=extend_digest(0, PROMPT), count=2
    )
    stream.send(replace(propose, epoch=0))
    stream.send(propose)
    reply = await stream.receive()
    assert isinstance(reply, Proposal)
    assert (reply.epoch, reply.block.length) == (1, 2)
