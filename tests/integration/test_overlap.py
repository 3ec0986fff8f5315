"""Blocks drafted ahead equal the blocks that would be drafted on request, in any schedule.

That holds for blocks that assume full acceptance and for branches, which assume other verdicts.
"""

from __future__ import annotations

import asyncio
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests import reference

from cascade.engine.engine import Engine
from cascade.protocol.client import ReplicaClient
from cascade.protocol.messages import Open, Proposal, Propose, extend_digest
from cascade.protocol.services import DRAFTER
from cascade.rules import Chow, Lossless, Opt, TokenV3
from cascade.sampling.rng import Purpose
from cascade.types import (
    Bonus,
    Coupling,
    DecodingParams,
    Mode,
    Origin,
    Request,
    SamplingParams,
    Session,
    SessionId,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.conftest import Pair

    from cascade.local import LocalServer
    from cascade.protocol.client import SessionStream
    from cascade.router.router import Router
    from cascade.types import Statistics

PROMPT = (3, 1, 4, 1, 5)

WARM = SamplingParams(temperature=1.3)

POLICIES = {
    "greedy": DecodingParams(sampling=SamplingParams(temperature=0.0)),
    "sampled": DecodingParams(sampling=WARM),
    "gumbel": DecodingParams(sampling=WARM, coupling=Coupling.GUMBEL, rule=TokenV3(alpha=0.5)),
    "no bonus": DecodingParams(sampling=WARM, bonus=Bonus.NONE, rule=Opt(alpha=0.2)),
    "bonus of the target": DecodingParams(sampling=WARM, bonus=Bonus.TARGET, rule=Opt(alpha=0.2)),
    "block": DecodingParams(sampling=WARM, verification=Verification.BLOCK),
    "stop": DecodingParams(sampling=WARM, stop_ids=(2,)),
    "penalties": DecodingParams(
        sampling=replace(WARM, presence_penalty=0.7, repetition_penalty=1.2)
    ),
    "deferring": DecodingParams(sampling=WARM, rule=Chow(alpha=0.6), bonus=Bonus.NONE),
}

RUNNER_UP = -1  # the drafter's second choice

_names = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Round:
    """What a router requests, and the verdict that follows."""

    count: int
    ahead: int
    accepted: int  # of the block; more than it has means all
    token: int | None  # that follows them; None is the drafter's own next, or `RUNNER_UP`
    waits: bool  # lets the drafter draft ahead before the next request
    floor: float = 0.0
    branches: int = 0


rounds = st.builds(
    Round,
    count=st.integers(1, 4),
    ahead=st.integers(0, 2),
    accepted=st.sampled_from((0, 1, 2, 9, 9, 9)),
    token=st.none() | st.just(RUNNER_UP) | st.just(RUNNER_UP) | st.integers(0, 7),
    waits=st.booleans(),
    floor=st.sampled_from((0.0, 0.0, 0.1, 0.5)),
    branches=st.integers(0, 4),
)


class Client:
    """A router's session on a real drafter; the test chooses which tokens are committed."""

    def __init__(self, stream: SessionStream, pair: Pair, policy: DecodingParams) -> None:
        self.stream = stream
        self.drafter = pair.drafter
        self.reference = reference.ModelPair(
            prompt=PROMPT, drafter=pair.drafter.logits, expert=pair.expert.logits, policy=policy
        )
        self.tokens: list[int] = []
        self.known = 0

    @property
    def digest(self) -> int:
        return extend_digest(extend_digest(0, PROMPT), self.tokens)

    async def ask(self, round_: Round, *, until_deferral: bool = False) -> Proposal:
        """Request a block after the committed tokens, and return the one that follows them."""
        self.send(round_, until_deferral=until_deferral)
        while True:
            proposal = await self.receive()
            if (proposal.position, proposal.digest) == (len(self.tokens), self.digest):
                return proposal

    def send(self, round_: Round, *, until_deferral: bool = False) -> None:
        """Request a block after the committed tokens."""
        self.stream.send(
            Propose(
                session_id=self.stream.session_id,
                epoch=1,
                position=len(self.tokens),
                digest=self.digest,
                count=round_.count,
                tokens=tuple(self.tokens[self.known :]),
                until_deferral=until_deferral,
                ahead=round_.ahead,
                floor=round_.floor,
                branches=round_.branches,
            )
        )
        self.known = len(self.tokens)

    async def receive(self) -> Proposal:
        """Return the next proposal."""
        proposal = await asyncio.wait_for(self.stream.receive(), 30)
        assert isinstance(proposal, Proposal)
        return proposal

    def expected_block(self, count: int) -> list[int]:
        """Return the block that plain forward passes draft after the committed tokens."""
        tokens: list[int] = []
        while len(tokens) < count and not self.reference.has_ended(tokens):
            tokens.append(self._draw(tokens, Purpose.DRAFT))
        return tokens

    def commit(self, block: tuple[int, ...], round_: Round) -> None:
        """Commit what a verdict would."""
        kept = list(block[: round_.accepted])
        token = round_.token
        if token is None:
            token = self._draw(kept, Purpose.NEXT_TOKEN)
        elif token == RUNNER_UP:
            token = self._runner_up(kept, *block[len(kept) : len(kept) + 1])
        ends = len(kept) == len(block) and self.reference.policy.bonus is Bonus.NONE
        self.tokens += kept if ends and kept else [*kept, token]

    def commit_assumed(self, block: tuple[int, ...], proposal: Proposal) -> None:
        """Commit the verdict that a proposal drafted ahead assumes."""
        kept = [*self.tokens, *block][: proposal.position - 1]
        before = extend_digest(extend_digest(0, PROMPT), kept)
        (token,) = (
            token for token in range(8) if extend_digest(before, (token,)) == proposal.digest
        )
        self.tokens = [*kept, token]

    def _runner_up(self, tokens: list[int], drafted: int | None = None) -> int:
        text = [*PROMPT, *self.tokens, *tokens]
        ranked = self.drafter.logits(text).argsort(descending=True).tolist()
        return next(token for token in ranked[drafted is None :] if token != drafted)

    def _draw(self, tokens: list[int], purpose: Purpose) -> int:
        following = self.reference.probs_after([*self.tokens, *tokens])
        start = len(self.tokens)
        return self.reference.draw(following.q, purpose, position=following.position, start=start)


@pytest.fixture
async def drafter(toy_stack: LocalServer) -> AsyncIterator[ReplicaClient]:
    replica = ReplicaClient(toy_stack.drafter.address, DRAFTER)
    yield replica
    await replica.close()


def opened(
    replica: ReplicaClient, server: LocalServer, pair: Pair, policy: DecodingParams
) -> Client:
    name = SessionId(f"overlap/{next(_names)}")
    stream = replica.open_stream(name, 1, lease=server.token)
    session = Session(id=name, prompt=PROMPT, policy=policy)
    stream.send(Open(session=session, epoch=1, lease=server.token, message_follows=True))
    return Client(stream, pair, policy)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let drafters have spare capacity, however busy the machine is."""
    monkeypatch.setattr(Engine, "spare", 1.0)
    monkeypatch.setattr("cascade.drafter.drafter.MAX_BRANCH_OVERHEAD", 1e9)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(schedule=st.lists(rounds, min_size=2, max_size=5))
async def test_a_block_does_not_depend_on_the_schedule(
    toy: Pair,
    toy_stack: LocalServer,
    drafter: ReplicaClient,
    policy: DecodingParams,
    schedule: list[Round],
) -> None:
    """Whatever is accepted and whenever it is requested, a block depends on its prefix alone.

    A block drafted ahead may have another length than the one requested, and one of low confidence
    ends early; the tokens that it has are the same.
    """
    client = opened(drafter, toy_stack, toy, replace(policy, seed=len(schedule)))
    for round_ in schedule:
        proposal = await client.ask(round_)
        tokens = proposal.block.tokens
        expected = client.expected_block(len(tokens))
        assert list(tokens) == expected
        assert len(tokens) <= 4
        assert tokens or not expected
        client.commit(tokens, round_)
        if client.reference.has_ended(client.tokens):
            break
        if round_.waits:
            await toy_stack.router.score(PROMPT, top=0)
    client.stream.close()


async def test_a_right_guess_is_sent_before_its_block_is_requested(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    client = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    round_ = Round(count=3, ahead=1, accepted=9, token=None, waits=False)
    first = await client.ask(round_)
    sent_ahead = await client.receive()
    client.commit(first.block.tokens, round_)
    assert (sent_ahead.position, sent_ahead.timing.service_s) == (len(client.tokens), 0.0)
    assert sent_ahead.digest == extend_digest(extend_digest(0, PROMPT), client.tokens)
    assert list(sent_ahead.block.tokens) == client.expected_block(3)
    client.stream.close()


async def test_a_block_sent_ahead_is_not_sent_again(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    """The next proposal is the block after it: the request only lets the branch go on."""
    client = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    round_ = Round(count=2, ahead=1, accepted=9, token=None, waits=False)
    positions: list[int] = []
    for _ in range(4):
        block = (await client.ask(round_)).block.tokens
        client.commit(block, round_)
        positions.append(len(client.tokens))
    assert positions == [3, 6, 9, 12]
    passes = toy_stack.drafter.engine.stats().passes
    last = await client.receive()
    assert last.position == 12
    assert toy_stack.drafter.engine.stats().passes <= passes + 3
    client.stream.close()


async def test_nothing_is_drafted_ahead_where_the_request_says_so(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    client = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    before = toy_stack.drafter.engine.stats().passes
    await client.ask(Round(count=3, ahead=0, accepted=9, token=None, waits=False))
    await toy_stack.router.score(PROMPT, top=0)
    assert toy_stack.drafter.engine.stats().passes - before == 3, "the prompt runs with the first"
    client.stream.close()


async def test_nothing_is_drafted_ahead_of_a_block_below_the_floor(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    client = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    before = toy_stack.drafter.engine.stats().passes
    round_ = Round(count=3, ahead=1, accepted=9, token=None, waits=False, floor=1.0)
    first = await client.ask(round_)
    await toy_stack.router.score(PROMPT, top=0)
    assert first.block.length == 1
    assert toy_stack.drafter.engine.stats().passes - before == 1, "the prompt runs with it"
    client.stream.close()


async def test_drafting_goes_on_after_a_deferral(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    """The deferred token serves as the guess of what the expert will choose."""
    client = opened(drafter, toy_stack, toy, replace(POLICIES["deferring"], seed=3))
    round_ = Round(count=8, ahead=1, accepted=9, token=None, waits=False)
    first = await client.ask(round_, until_deferral=True)
    assert first.deferred
    sent_ahead = await client.receive()
    assert sent_ahead.position == first.block.length + 1
    client.stream.close()


BRANCHED = Round(count=3, ahead=0, accepted=9, token=None, waits=False, branches=1)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["greedy", "sampled", "gumbel"])
async def test_a_verdict_that_a_branch_assumed_needs_no_forward_pass(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient, name: str
) -> None:
    """Its block is there, and its KV cache is kept: no token is computed twice."""
    client = opened(drafter, toy_stack, toy, replace(POLICIES[name], seed=5))
    first = await client.ask(BRANCHED)
    sent_ahead = await client.receive()
    assert (sent_ahead.branched, sent_ahead.timing.service_s) == (True, 0.0)
    client.commit_assumed(first.block.tokens, sent_ahead)
    assert list(sent_ahead.block.tokens) == client.expected_block(3)

    before = toy_stack.drafter.engine.stats()
    round_ = replace(BRANCHED, branches=0)
    client.send(round_)
    client.commit(sent_ahead.block.tokens, round_)
    last = await client.ask(round_)
    after = toy_stack.drafter.engine.stats()
    assert (last.branched, list(last.block.tokens)) == (False, client.expected_block(3))
    # The last draft and the bonus, which no pass has seen; then two drafts.
    assert (after.passes - before.passes, after.tokens - before.tokens) == (3, 4)
    client.stream.close()


@pytest.mark.usefixtures("idle")
async def test_a_confirmed_branch_becomes_the_main_branch(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    """It drafts ahead then."""
    client = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    first = await client.ask(BRANCHED)
    client.commit_assumed(first.block.tokens, await client.receive())
    passes = toy_stack.drafter.engine.stats().passes
    ahead = replace(BRANCHED, ahead=1, branches=0)
    client.send(ahead)
    proposal = await client.receive()
    client.commit(tuple(client.expected_block(3)), ahead)
    assert proposal.position == len(client.tokens)
    assert list(proposal.block.tokens) == client.expected_block(3)
    assert toy_stack.drafter.engine.stats().passes - passes == 1 + 3  # the bonus, and the block
    client.stream.close()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "limit",
    ["cascade.engine.engine.Engine.spare", "cascade.drafter.drafter.MAX_BRANCH_OVERHEAD"],
)
async def test_no_branch_is_drafted_without_spare_capacity(
    toy: Pair,
    toy_stack: LocalServer,
    drafter: ReplicaClient,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    """Neither when the drafter is busy nor when its passes are full."""
    monkeypatch.setattr(limit, 0.0)
    client = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    before = toy_stack.drafter.engine.stats()
    await client.ask(replace(BRANCHED, branches=4))
    await toy_stack.router.score(PROMPT, top=0)
    after = toy_stack.drafter.engine.stats()
    assert after.passes - before.passes == 3, "the prompt runs with the first"
    assert after.branches == 0
    client.stream.close()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("received", [0, 1, 2])
async def test_a_session_that_ends_leaves_no_branch(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient, received: int
) -> None:
    """Whether its branches have not begun, are being drafted, or are complete."""
    client = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    asked = asyncio.create_task(client.ask(replace(BRANCHED, ahead=1, branches=4)))
    if received:
        await asked
    for _ in range(received - 1):
        await client.receive()
    client.stream.close()
    asked.cancel()
    engine = toy_stack.drafter.engine
    async with asyncio.timeout(30):
        while engine.stats().sessions or engine.stats().branches or engine.stats().waiting:
            await toy_stack.router.score(PROMPT, top=0)


async def written(
    router: Router, policy: DecodingParams, *, draft_tokens: int
) -> tuple[list[tuple[int, Origin]], Statistics]:
    request = Request(
        prompt=PROMPT,
        policy=policy,
        mode=Mode.SPECULATIVE,
        max_tokens=24,
        draft_tokens=draft_tokens,
    )
    chunks = [chunk async for chunk in router.generate(request)]
    statistics = chunks[-1].statistics
    assert statistics is not None
    pairs = [zip(chunk.tokens, chunk.origins, strict=True) for chunk in chunks]
    return [pair for chunk in pairs for pair in chunk], statistics


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["greedy", "sampled", "gumbel", "block"])
async def test_an_answer_is_the_same_without_drafting_ahead(
    toy: Pair, toy_stack: LocalServer, name: str
) -> None:
    """Token for token, with the same origins, while some blocks come from branches.

    How soon a branch is ready depends on how busy the machine is, so answers follow until one is.
    """
    tiers = {"drafters": toy_stack.router._drafters, "experts": toy_stack.router._experts}  # pyright: ignore[reportPrivateUsage] - the stack's own
    router = {"overlap_blocks": 0, "overlap_branches": 0, "draft_deadline_s": 120}
    plain = toy.settings(router=router).router.loop(**tiers)
    router |= {"overlap_blocks": 1, "overlap_branches": 4}
    ahead = toy.settings(router=router).router.loop(**tiers)
    branched, seeds = 0, itertools.count()
    async with asyncio.timeout(120):
        while (seed := next(seeds)) < 2 or not branched:
            policy = replace(POLICIES[name], seed=seed, rule=Lossless())
            for draft_tokens in (1, 3):
                some = [written(loop, policy, draft_tokens=draft_tokens) for loop in (ahead, plain)]
                (one, cost), (other, _) = await asyncio.gather(*some)
                assert one == other
                branched += cost.branched_rounds
