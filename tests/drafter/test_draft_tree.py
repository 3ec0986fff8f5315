"""A tree forks likely verdicts, adopts the confirmed branch and drops the others."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.draft_branches import digest, drafted, new_branch, propose
from tests.support.fake_engine import FakeEngine

from cascade.drafter.draft_tree import MIN_PROB, DraftSession, DraftTree
from cascade.protocol.messages import Judge
from cascade.types import SessionId

if TYPE_CHECKING:
    from cascade.drafter.draft_branch import DraftBranch
    from cascade.engine.request import ForwardRequest


@dataclass
class Forest:
    """A tree whose main branch has drafted the tokens 3 and 4, with alternatives 8 and 9."""

    engine: FakeEngine
    tree: DraftTree

    def fork(self, *, spare: float = 1.0, limit: int = 8) -> list[ForwardRequest]:
        """Fork branches and hand their requests to the engine."""
        requests = self.tree.fork(spare=spare, limit=limit)
        for request in requests:
            self.engine.submit(request)
        return requests


def grown(*, prob: float = 0.5, **more: Any) -> Forest:
    engine = FakeEngine(handler=None)  # pyright: ignore[reportArgumentType] - nothing runs
    branch = new_branch(message=propose(**{"branches": 4, **more}))
    tree = DraftTree(session=branch.session, engine=engine, main=branch, ids=itertools.count(1))  # pyright: ignore[reportArgumentType] - a fake engine
    assert isinstance(branch.session, DraftSession)
    branch.session.tree = tree
    engine.cache["s/0"] = [1, 2, 3, 4]
    branch.add(drafted(3, prob, runner_up=8))
    branch.add(drafted(4, prob, runner_up=9))
    tree.in_flight.clear()
    return Forest(engine, tree)


def others(forest: Forest) -> list[DraftBranch]:
    return [request.task for request in forest.engine.waiting]


def test_a_tree_starts_with_its_main_branch_in_flight() -> None:
    branch = new_branch()
    engine: Any = None
    tree = DraftTree(session=branch.session, engine=engine, main=branch, ids=itertools.count())
    assert tree.in_flight == {branch}
    assert tree.has(branch)
    assert tree.resume() == []


def test_forks_are_the_likeliest_verdicts_each_in_an_engine_session_of_its_own() -> None:
    forest = grown(prob=0.75)
    requests = forest.fork(limit=1)
    (request,) = requests
    assert (request.session, request.parent, request.tokens) == ("s/1", "s/0", (8,))
    assert forest.tree.in_flight == {request.task}
    assert forest.tree.has(request.task)
    assert forest.engine.cache["s/1"] == [1, 2]


@pytest.mark.parametrize(("spare", "limit", "count"), [(0.0, 8, 0), (0.25, 8, 1), (1.0, 0, 0)])
def test_the_number_of_forks_is_limited_by_spare_capacity(
    spare: float, limit: int, count: int
) -> None:
    assert len(grown().fork(spare=spare, limit=limit)) == count


def test_each_block_is_forked_from_once() -> None:
    forest = grown()
    assert len(forest.fork()) == 2
    assert forest.fork() == []


def test_an_incomplete_block_is_not_forked_from() -> None:
    branch = new_branch(message=propose(branches=4))
    engine: Any = None
    tree = DraftTree(session=branch.session, engine=engine, main=branch, ids=itertools.count())
    branch.add(drafted(3, 0.5))
    assert tree.fork(spare=1.0, limit=8) == []


def test_unlikely_verdicts_are_not_drafted_for() -> None:
    assert grown(prob=1 - MIN_PROB).fork() == []


def test_a_message_that_continues_the_main_branch_drops_the_others() -> None:
    forest = grown(ahead=1)
    forest.tree.main.add(drafted(5))
    forest.fork()
    assert len(others(forest)) == 2
    assert forest.tree.follow(propose(3, 4, 5))
    assert forest.engine.released == ["s/1", "s/2"]
    assert forest.tree.in_flight == set()
    assert not forest.tree.ended


def test_a_confirmed_branch_becomes_the_main_one_and_keeps_its_cache() -> None:
    forest = grown()
    forest.fork()
    dropped, confirmed = others(forest)
    forest.tree.in_flight.add(forest.tree.main)
    message = propose(3, 9)
    assert forest.tree.follow(message)
    assert forest.tree.main is confirmed
    assert forest.engine.adopted == ["s/2"]
    assert forest.engine.released == ["s/1"]
    assert forest.engine.cache == {"s/0": [1, 2, 3]}
    assert [request.session for request in forest.engine.waiting] == ["s/0"]
    assert forest.tree.in_flight == {confirmed}
    assert forest.tree.session.engine_tokens is confirmed.tokens
    assert not forest.tree.has(dropped)
    assert confirmed.message is message


def test_a_message_that_continues_no_branch_is_not_followed() -> None:
    forest = grown()
    forest.fork()
    main = forest.tree.main
    assert not forest.tree.follow(propose(3, 7))
    assert forest.tree.main is main


def test_the_message_being_served_is_followed_without_a_change() -> None:
    forest = grown()
    forest.fork()
    assert forest.tree.follow(forest.tree.main.message)
    assert forest.engine.released == []


def test_sync_applies_the_last_queued_message() -> None:
    forest = grown()
    forest.fork()
    forest.tree.session.queued += [propose(7), propose(8)]
    assert forest.tree.sync()
    assert forest.tree.main.requested.prefix == (1, digest(8))
    assert not forest.tree.ended


def test_sync_without_a_queued_message_changes_nothing() -> None:
    forest = grown()
    forest.fork()
    assert not forest.tree.sync()
    assert not forest.tree.ended
    assert forest.engine.released == []


@pytest.mark.parametrize("reason", ["closed", "mismatch", "other"])
def test_sync_ends_the_tree_with_its_session_or_at_a_mismatch(reason: str) -> None:
    forest = grown()
    forest.fork()
    session = forest.tree.session
    if reason == "closed":
        session.closed = True
    elif reason == "mismatch":
        session.queued.append(propose(7))
    else:
        session.queued.append(
            Judge(session_id=SessionId("s"), epoch=1, position=1, digest=digest(8))
        )
    assert not forest.tree.sync()
    assert forest.tree.ended
    assert not forest.tree.has(forest.tree.main)
    assert forest.engine.released == ["s/1", "s/2"]


def test_nothing_follows_the_end_of_a_tree() -> None:
    forest = grown(ahead=1)
    forest.tree.end()
    assert not forest.tree.follow(forest.tree.main.message)
    assert forest.tree.resume() == []
    assert forest.fork() == []


def test_a_paused_main_branch_resumes_once() -> None:
    forest = grown()
    forest.tree.main.message = propose(ahead=1)
    (request,) = forest.tree.resume()
    assert request.tokens == (4,)
    assert forest.tree.in_flight == {forest.tree.main}
    assert forest.tree.resume() == []


def test_the_failure_of_the_last_branch_in_flight_is_reported() -> None:
    forest = grown()
    forest.fork()
    first, second = others(forest)
    assert not forest.tree.drop_failed(first)
    assert not forest.tree.drop_failed(first), "it is not in flight any more"
    assert forest.tree.drop_failed(second)
    assert not forest.tree.drop_failed(second)
    assert forest.engine.released == ["s/1", "s/2"]
