"""What a drafter sends unasked is what it would have drafted when asked, whatever comes between.

That holds for the chain of a session, whose guess is that all stands, and for its branches, which
guess otherwise.
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
    from cascade.router.router import Router as Loop
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

RIVAL = -1  # the drafter's second choice

_names = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Turn:
    """What the router does after a block: when it asks again, and after which tokens."""

    count: int
    ahead: int
    accepted: int  # of the block; more than there are means all
    token: int | None  # that follows them; None is the drafter's own next, or `RIVAL`
    patient: bool  # lets the drafter get ahead before it asks again
    floor: float = 0.0
    branches: int = 0


turns = st.builds(
    Turn,
    count=st.integers(1, 4),
    ahead=st.integers(0, 2),
    accepted=st.sampled_from((0, 1, 2, 9, 9, 9)),
    token=st.none() | st.just(RIVAL) | st.just(RIVAL) | st.integers(0, 7),
    patient=st.booleans(),
    floor=st.sampled_from((0.0, 0.0, 0.1, 0.5)),
    branches=st.integers(0, 4),
)


class Router:
    """A session on a real drafter, whose committed tokens the test chooses."""

    def __init__(self, link: SessionStream, pair: Pair, policy: DecodingParams) -> None:
        self.link = link
        self.drafter = pair.drafter
        self.twin = reference.ModelPair(
            prompt=PROMPT, drafter=pair.drafter.logits, expert=pair.expert.logits, policy=policy
        )
        self.answer: list[int] = []
        self.known = 0

    @property
    def digest(self) -> int:
        return extend_digest(extend_digest(0, PROMPT), self.answer)

    async def ask(self, turn: Turn, *, until_deferral: bool = False) -> Proposal:
        """Ask for a block after the answer, and wait for the one that continues it."""
        self.send(turn, until_deferral=until_deferral)
        while True:
            item = await self.hear()
            if (item.position, item.digest) == (len(self.answer), self.digest):
                return item

    def send(self, turn: Turn, *, until_deferral: bool = False) -> None:
        """Ask for a block after the answer."""
        self.link.send(
            Propose(
                session_id=self.link.session_id,
                epoch=1,
                position=len(self.answer),
                digest=self.digest,
                count=turn.count,
                tokens=tuple(self.answer[self.known :]),
                until_deferral=until_deferral,
                ahead=turn.ahead,
                floor=turn.floor,
                branches=turn.branches,
            )
        )
        self.known = len(self.answer)

    async def hear(self) -> Proposal:
        """Return what the drafter says next."""
        item = await asyncio.wait_for(self.link.receive(), 30)
        assert isinstance(item, Proposal)
        return item

    def drafted(self, count: int) -> list[int]:
        """Return the block that plain forward passes draft after the answer."""
        tokens: list[int] = []
        while len(tokens) < count and not self.twin.has_ended(tokens):
            tokens.append(self._draw(tokens, Purpose.DRAFT))
        return tokens

    def commit(self, block: tuple[int, ...], turn: Turn) -> None:
        """Advance as a verdict would."""
        kept = list(block[: turn.accepted])
        guess = turn.token
        if guess is None:
            guess = self._draw(kept, Purpose.NEXT_TOKEN)
        elif guess == RIVAL:
            guess = self._rival(kept, *block[len(kept) : len(kept) + 1])
        ends = len(kept) == len(block) and self.twin.policy.bonus is Bonus.NONE
        self.answer += kept if ends and kept else [*kept, guess]

    def stand_on(self, block: tuple[int, ...], proposal: Proposal) -> None:
        """Commit the verdict that a pushed proposal was drafted on."""
        kept = [*self.answer, *block][: proposal.position - 1]
        before = extend_digest(extend_digest(0, PROMPT), kept)
        (token,) = (one for one in range(8) if extend_digest(before, (one,)) == proposal.digest)
        self.answer = [*kept, token]

    def _rival(self, tokens: list[int], drafted: int | None = None) -> int:
        text = [*PROMPT, *self.answer, *tokens]
        ranked = self.drafter.logits(text).argsort(descending=True).tolist()
        return next(token for token in ranked[drafted is None :] if token != drafted)

    def _draw(self, tokens: list[int], purpose: Purpose) -> int:
        place = self.twin.probs_after([*self.answer, *tokens])
        start = len(self.answer)
        return self.twin.draw(place.q, purpose, position=place.position, start=start)


@pytest.fixture
async def drafter(toy_stack: LocalServer) -> AsyncIterator[ReplicaClient]:
    peer = ReplicaClient(toy_stack.drafter.address, DRAFTER)
    yield peer
    await peer.close()


def opened(peer: ReplicaClient, server: LocalServer, pair: Pair, policy: DecodingParams) -> Router:
    name = SessionId(f"overlap/{next(_names)}")
    link = peer.open_stream(name, 1)
    session = Session(id=name, prompt=PROMPT, policy=policy)
    link.send(Open(session=session, epoch=1, lease=server.token))
    return Router(link, pair, policy)


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let drafters have capacity to spare however busy the machine and the tests before are."""
    monkeypatch.setattr(Engine, "spare", 1.0)
    monkeypatch.setattr("cascade.drafter.drafter.MAX_BRANCH_OVERHEAD", 1e9)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@settings(
    max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(script=st.lists(turns, min_size=2, max_size=5))
async def test_no_schedule_changes_a_block(
    toy: Pair,
    toy_stack: LocalServer,
    drafter: ReplicaClient,
    policy: DecodingParams,
    script: list[Turn],
) -> None:
    """Right guesses, wrong ones, hasty and patient routers: each block is a function of its past.

    One that was drafted in advance may be longer or shorter than what is asked when it is due, and
    one that the drafter doubts ends early: with the tokens that it would have had.
    """
    router = opened(drafter, toy_stack, toy, replace(policy, seed=len(script)))
    for turn in script:
        proposal = await router.ask(turn)
        tokens = proposal.block.tokens
        expected = router.drafted(len(tokens))
        assert list(tokens) == expected
        assert len(tokens) <= 4
        assert tokens or not expected
        router.commit(tokens, turn)
        if router.twin.has_ended(router.answer):
            break
        if turn.patient:
            await toy_stack.router.score(PROMPT, top=0)
    router.link.close()


async def test_a_right_guess_is_there_before_it_is_asked_for(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    router = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    turn = Turn(count=3, ahead=1, accepted=9, token=None, patient=False)
    first = await router.ask(turn)
    pushed = await asyncio.wait_for(router.link.receive(), 30)
    assert isinstance(pushed, Proposal)
    router.commit(first.block.tokens, turn)
    assert (pushed.position, pushed.timing.service_s) == (len(router.answer), 0.0)
    assert pushed.digest == extend_digest(extend_digest(0, PROMPT), router.answer)
    assert list(pushed.block.tokens) == router.drafted(3)
    router.link.close()


async def test_a_guess_that_was_right_is_not_sent_again(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    """What comes next is the block after it: asking for it only let the line go on."""
    router = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    turn = Turn(count=2, ahead=1, accepted=9, token=None, patient=False)
    positions: list[int] = []
    for _ in range(4):
        block = (await router.ask(turn)).block.tokens
        router.commit(block, turn)
        positions.append(len(router.answer))
    assert positions == [3, 6, 9, 12]
    passes = toy_stack.drafter.engine.stats().passes
    last = await asyncio.wait_for(router.link.receive(), 30)
    assert isinstance(last, Proposal)
    assert last.position == 12
    assert toy_stack.drafter.engine.stats().passes <= passes + 3
    router.link.close()


async def test_nothing_is_sent_unasked_where_nothing_ahead_is_wanted(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    router = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    before = toy_stack.drafter.engine.stats().passes
    await router.ask(Turn(count=3, ahead=0, accepted=9, token=None, patient=False))
    await toy_stack.router.score(PROMPT, top=0)
    assert toy_stack.drafter.engine.stats().passes - before == 3 + 1  # and the prompt
    router.link.close()


async def test_nothing_is_drafted_on_from_a_block_that_ended_in_doubt(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    router = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    before = toy_stack.drafter.engine.stats().passes
    turn = Turn(count=3, ahead=1, accepted=9, token=None, patient=False, floor=1.0)
    first = await router.ask(turn)
    await toy_stack.router.score(PROMPT, top=0)
    assert first.block.length == 1
    assert toy_stack.drafter.engine.stats().passes - before == 1 + 1  # and the prompt
    router.link.close()


async def test_a_deferral_is_guessed_past(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    """The line goes on after the token that the expert is to write."""
    router = opened(drafter, toy_stack, toy, replace(POLICIES["deferring"], seed=3))
    turn = Turn(count=8, ahead=1, accepted=9, token=None, patient=False)
    first = await router.ask(turn, until_deferral=True)
    assert first.deferred
    pushed = await asyncio.wait_for(router.link.receive(), 30)
    assert isinstance(pushed, Proposal)
    assert pushed.position == first.block.length + 1
    router.link.close()


BRANCHED = Turn(count=3, ahead=0, accepted=9, token=None, patient=False, branches=1)


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["greedy", "sampled", "gumbel"])
async def test_another_verdict_that_was_guessed_takes_no_pass(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient, name: str
) -> None:
    """Its block is there; what follows goes on from its rows, of which none is computed twice."""
    router = opened(drafter, toy_stack, toy, replace(POLICIES[name], seed=5))
    first = await router.ask(BRANCHED)
    pushed = await router.hear()
    assert (pushed.branched, pushed.timing.service_s) == (True, 0.0)
    router.stand_on(first.block.tokens, pushed)
    assert list(pushed.block.tokens) == router.drafted(3)

    before = toy_stack.drafter.engine.stats()
    turn = replace(BRANCHED, branches=0)
    router.send(turn)
    router.commit(pushed.block.tokens, turn)
    last = await router.ask(turn)
    after = toy_stack.drafter.engine.stats()
    assert (last.branched, list(last.block.tokens)) == (False, router.drafted(3))
    # The last draft and the bonus, which no pass has seen; then two drafts.
    assert (after.passes - before.passes, after.tokens - before.tokens) == (3, 4)
    router.link.close()


@pytest.mark.usefixtures("idle")
async def test_a_branch_that_is_asked_for_is_gone_on_from(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient
) -> None:
    """It is the session's line then, with a chain of its own."""
    router = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    first = await router.ask(BRANCHED)
    router.stand_on(first.block.tokens, await router.hear())
    passes = toy_stack.drafter.engine.stats().passes
    chained = replace(BRANCHED, ahead=1, branches=0)
    router.send(chained)
    chain = await router.hear()
    router.commit(tuple(router.drafted(3)), chained)
    assert chain.position == len(router.answer)
    assert list(chain.block.tokens) == router.drafted(3)
    assert toy_stack.drafter.engine.stats().passes - passes == 1 + 3  # the bonus, and the block
    router.link.close()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize(
    "limit",
    ["cascade.engine.engine.Engine.spare", "cascade.drafter.drafter.MAX_BRANCH_OVERHEAD"],
)
async def test_no_branch_is_drafted_where_no_capacity_is_left(
    toy: Pair,
    toy_stack: LocalServer,
    drafter: ReplicaClient,
    monkeypatch: pytest.MonkeyPatch,
    limit: str,
) -> None:
    """Of the drafter's time, or of its passes."""
    monkeypatch.setattr(limit, 0.0)
    router = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    before = toy_stack.drafter.engine.stats()
    await router.ask(replace(BRANCHED, branches=4))
    await toy_stack.router.score(PROMPT, top=0)
    after = toy_stack.drafter.engine.stats()
    assert after.passes - before.passes == 3 + 1  # and the prompt
    assert after.branches == 0
    router.link.close()


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("heard", [0, 1, 2])
async def test_a_session_that_ends_leaves_no_branch(
    toy: Pair, toy_stack: LocalServer, drafter: ReplicaClient, heard: int
) -> None:
    """Wherever its branches are: not begun, being drafted, or at rest."""
    router = opened(drafter, toy_stack, toy, POLICIES["greedy"])
    asked = asyncio.create_task(router.ask(replace(BRANCHED, ahead=1, branches=4)))
    if heard:
        await asked
    for _ in range(heard - 1):
        await router.hear()
    router.link.close()
    asked.cancel()
    engine = toy_stack.drafter.engine
    async with asyncio.timeout(30):
        while engine.stats().sessions or engine.stats().branches or engine.stats().waiting:
            await toy_stack.router.score(PROMPT, top=0)


async def written(
    loop: Loop, policy: DecodingParams, *, draft_tokens: int
) -> tuple[list[tuple[int, Origin]], Statistics]:
    request = Request(
        prompt=PROMPT,
        policy=policy,
        mode=Mode.SPECULATIVE,
        max_tokens=24,
        draft_tokens=draft_tokens,
    )
    pieces = [piece async for piece in loop.generate(request)]
    statistics = pieces[-1].statistics
    assert statistics is not None
    pairs = [zip(piece.tokens, piece.origins, strict=True) for piece in pieces]
    return [pair for piece in pairs for pair in piece], statistics


@pytest.mark.usefixtures("idle")
@pytest.mark.parametrize("name", ["greedy", "sampled", "gumbel", "block"])
async def test_an_answer_is_the_same_without_overlap(
    toy: Pair, toy_stack: LocalServer, name: str
) -> None:
    """Token for token, and who wrote it; and some of it did come from branches."""
    tiers = {"drafters": toy_stack.router._drafters, "experts": toy_stack.router._experts}  # pyright: ignore[reportPrivateUsage] - the stack's own
    router = {"overlap_blocks": 0, "overlap_branches": 0, "draft_deadline_s": 120}
    plain = toy.settings(router=router).router.loop(**tiers)
    router |= {"overlap_blocks": 1, "overlap_branches": 4}
    ahead = toy.settings(router=router).router.loop(**tiers)
    branched = 0
    for seed, draft_tokens in itertools.product(range(4), (1, 3)):
        policy = replace(POLICIES[name], seed=seed, rule=Lossless())
        some = [written(loop, policy, draft_tokens=draft_tokens) for loop in (ahead, plain)]
        (one, cost), (other, _) = await asyncio.gather(*some)
        assert one == other
        branched += cost.branched_rounds
    assert branched > 0
