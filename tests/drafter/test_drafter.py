"""A drafter answers each request once, drafts ahead, and lets branches fail alone."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.support.fake_engine import Client, FakeDrafter, successor

from cascade.errors import ContextTooLong, InvalidRequest, Overloaded
from cascade.protocol.messages import Close, Proposal, Propose, Refusal
from cascade.rules import TokenV3
from cascade.speculation.confidence import Calibration
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.protocol.codec import ServerMessage


def propose(client: Client, *tokens: int, count: int = 2, **more: Any) -> Propose:
    return Propose(**client.after(*tokens), count=count, tokens=tokens, **more)


def blocks(messages: Sequence[ServerMessage]) -> list[tuple[int, tuple[int, ...], bool]]:
    proposals = [message for message in messages if isinstance(message, Proposal)]
    assert len(proposals) == len(messages)
    return [(one.position, one.block.tokens, one.branched) for one in proposals]


@pytest.fixture
def branching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let forward passes have room for any number of branches."""
    monkeypatch.setattr("cascade.drafter.drafter.MAX_BRANCH_OVERHEAD", 1e9)


async def test_all_sessions_draft_in_one_forward_pass() -> None:
    drafter = FakeDrafter()
    clients = [Client(drafter, name=name, prompt=(2 * i,)) for i, name in enumerate("abc")]
    for client in clients:
        client.send(propose(client))
    drafter.engine.run()
    drafter.engine.run()
    found = [blocks(await client.take()) for client in clients]
    assert found == [[(0, (2 * i + 1, 2 * i + 2), False)] for i in range(3)]


async def test_rules_with_ever_new_parameters_fill_no_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was learned under the rule used longest ago is forgotten."""
    monkeypatch.setattr("cascade.drafter.drafter.MAX_RULES", 2)
    known = FakeDrafter()._calibration  # pyright: ignore[reportPrivateUsage] - no message shows it
    one, two, three = (TokenV3(alpha=alpha) for alpha in (0.1, 0.2, 0.3))
    first, second = known(one), known(two)
    assert known(one) is first
    known(three)
    assert known(one) is first
    assert known(two) is not second


async def test_a_block_drafted_ahead_is_sent_once() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, ahead=1))
    # Two drafts, the guess of the expert's token, two drafts.
    assert blocks(await client.run(5)) == [(0, (2, 3), False), (3, (5, 6), False)]
    assert client.replica.engine.waiting == []
    client.send(propose(client, 2, 3, 4))
    assert client.replica.engine.waiting == []
    assert await client.take() == []


async def test_a_mismatch_starts_a_new_branch_after_the_tokens_in_flight() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, ahead=4))
    await client.run(3)
    client.send(propose(client, 2, 9))
    assert blocks(await client.run(3)) == [(2, (10, 11), False)]
    assert client.replica.engine.cache["s/0"] == [1, 2, 9, 10]


@pytest.mark.usefixtures("branching")
async def test_a_confirmed_branch_answers_without_a_forward_pass() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, branches=4))
    first, *ahead = blocks(await client.run(4))
    assert first == (0, (2, 3), False)
    # Of the first draft the runner-up is 3, of the second 4.
    assert ahead == [(1, (4, 5), True), (2, (5, 6), True)]
    client.send(propose(client, 3))
    engine = client.replica.engine
    assert (len(engine.adopted), len(engine.released), engine.waiting) == (1, 1, [])


@pytest.mark.usefixtures("branching")
async def test_a_branch_confirmed_while_it_is_drafted_goes_on_in_the_adopted_cache() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, branches=1))
    await client.run(2)
    client.send(propose(client, 3, ahead=1))
    assert blocks(await client.run(5)) == [(1, (4, 5), True), (4, (7, 8), False)]
    assert client.replica.engine.cache == {"s/0": [1, 3, 4, 5, 6, 7]}


@pytest.mark.usefixtures("branching")
async def test_a_mismatch_teaches_the_rules_calibration() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, branches=1))
    await client.run(4)
    client.send(propose(client, 9))
    (calibration,) = client.replica._calibrations.values()  # pyright: ignore[reportPrivateUsage, reportAttributeAccessIssue] - a drafter's own
    assert calibration != Calibration()


@pytest.mark.usefixtures("branching")
async def test_a_failed_branch_leaves_its_session_open() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, branches=1))
    await client.run(2)
    (request,) = client.replica.engine.waiting
    assert request.parent == "s/0"
    client.replica.engine.fail(request.session, Overloaded("no cache space"))
    assert await client.take() == []
    client.send(propose(client, 9))
    assert blocks(await client.run(2)) == [(1, (10, 11), False)]


async def test_a_failed_main_branch_refuses_its_session() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, ahead=1))
    await client.run(2)
    client.replica.engine.fail(SessionId("s/0"), Overloaded("no cache space"))
    (refusal,) = await client.take()
    assert isinstance(refusal, Refusal)


@pytest.mark.usefixtures("branching")
async def test_a_closed_session_drafts_nothing_more() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, ahead=3, branches=2))
    await client.run(2)
    client.send(Close(session_id=client.session.id, epoch=1))
    await client.run(2)
    assert client.replica.engine.waiting == []
    assert client.replica.engine.cache == {}


async def test_a_busy_drafter_makes_no_branches() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.replica.engine.spare = 0.0
    client.send(propose(client, branches=4))
    assert blocks(await client.run(2)) == [(0, (2, 3), False)]
    assert client.replica.engine.waiting == []


async def test_only_requested_blocks_have_a_service_time() -> None:
    client = Client(FakeDrafter(), prompt=(1,))
    client.send(propose(client, ahead=1))
    requested, ahead = await client.run(5)
    assert isinstance(requested, Proposal)
    assert isinstance(ahead, Proposal)
    assert (requested.timing.service_s > 0, ahead.timing.service_s) == (True, 0.0)
    assert requested.timing.open == 1


async def test_at_least_one_token_must_be_requested_and_fit_and_no_more_is_drafted() -> None:
    client = Client(FakeDrafter(limit_tokens=4), prompt=(1,))
    with pytest.raises(InvalidRequest, match="at least 1"):
        client.send(propose(client, count=0))
    client.send(propose(client, count=4))
    (proposal,) = await client.run(3)
    assert isinstance(proposal, Proposal)
    assert proposal.block.tokens == (2, 3, 4)
    with pytest.raises(ContextTooLong):
        client.send(propose(client, 2, 3, 4))


async def test_the_model_sees_prompt_committed_and_drafted_tokens() -> None:
    seen: list[list[int]] = []

    def model(tokens: Sequence[int]) -> int:
        seen.append(list(tokens))
        return successor(tokens)

    client = Client(FakeDrafter(model=model), 3, prompt=(1, 2))
    client.send(Propose(**client.after(3), count=2))
    await client.run(3)
    assert seen == [[1, 2, 3], [1, 2, 3, 4]]
