"""Thousands of stories of faults, in virtual time: text, leaks and endings are always right.

A seed that breaks is printed with all that happened in it; `live(seed)` tells it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.simulation.checks import live
from tests.simulation.clock import run

from cascade.protocol import server
from cascade.protocol.client import ReplicaConnection  # pyright: ignore[reportPrivateUsage] - a bug is planted
from cascade.protocol.codec import decode_server_message, parse_frame
from cascade.protocol.messages import Close, Open, Refusal
from cascade.replica.lease_book import LeaseBook
from cascade.replica.session import ReplicaSession
from cascade.router.tier_session import TierSession

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.simulation.world import World

    from cascade.types import Session

STORIES, PART = 5_000, 500


@pytest.mark.parametrize("first", range(0, STORIES, PART))
def test_every_story_ends_well(first: int) -> None:
    _live_through(range(first, first + PART))


def _live_through(seeds: Iterable[int]) -> None:
    for seed in seeds:
        run(live(seed))


def test_a_seed_tells_the_same_story_again() -> None:
    for seed in range(30):
        once: World = run(live(seed))
        again: World = run(live(seed))
        assert _told(once) == _told(again)


def _told(world: World) -> list[object]:
    ends = [(outcome.written, type(outcome.error), outcome.left) for outcome in world.outcomes]
    times = [line.split(" answer ")[0] for line in world.log]
    return [*times, ends]


def test_the_stories_meet_every_way_of_losing_a_replica() -> None:
    causes: set[str] = set()
    for seed in range(150):
        world: World = run(live(seed))
        for outcome in world.outcomes:
            causes |= set(outcome.statistics.failover_causes if outcome.statistics else ())
    assert causes >= {"drafter lost", "drafter late", "drafter full", "expert lost"}


async def _any_answer(self: TierSession, session: Session) -> Any:
    """Take an answer whatever it answers."""
    del session
    answer: Any = await self._stream.receive()  # pyright: ignore[reportOptionalMemberAccess, reportPrivateUsage] - as is
    if isinstance(answer, Refusal):
        raise self.tier.error(answer)
    return answer


def _never_leave(self: TierSession) -> None:
    """Forget leases instead of giving them back."""
    self._stream = self._lease = self._lease_request = None  # pyright: ignore[reportPrivateUsage] - as it is


def _hear_old_epochs(self: ReplicaConnection, data: bytes) -> None:
    """Deliver answers of every epoch."""
    for message in parse_frame(data, self.kind.response):
        answer = decode_server_message(message)
        link = self._links.get(answer.session_id)  # pyright: ignore[reportPrivateUsage] - as it is
        if link is not None:
            link.deliver(answer, 0)


def _admit_old_epochs(connection: server.Connection, item: Any, limits: object) -> bool:
    """Let items of every epoch in."""
    del limits
    match item:
        case Open():
            connection.epochs[item.session.id] = item.epoch
            return True
        case Close():
            return connection.epochs.pop(item.session_id, None) is not None
        case _:
            return item.session_id in connection.epochs


def _trust_any_prefix(
    self: ReplicaSession, *, position: int, tokens: Any, digest: int
) -> int | None:
    """Take tokens without looking at the digest, or at what they follow."""
    del digest
    del self.answer[position - len(tokens) :]
    self.agreed = min(self.agreed, len(self.answer))
    self.commit(tokens)
    return None


def _always_continue(*_: object) -> bool:
    """Take a block whatever it was drafted after."""
    return True


def _keep_dropped(self: LeaseBook, token: str) -> None:
    """Forget to end a lease."""
    del self, token


PLANTED: dict[str, tuple[Any, str, Any]] = {
    "answers of old epochs": (ReplicaConnection, "_receive", _hear_old_epochs),
    "items of old epochs": (server, "_admit", _admit_old_epochs),
    "answers to other positions": (TierSession, "_next_reply", _any_answer),
    "blocks of other prefixes": (TierSession, "_follows", _always_continue),
    "digests unread": (ReplicaSession, "sync_tokens", _trust_any_prefix),
    "leases not given back": (TierSession, "close", _never_leave),
    "leases not ended": (LeaseBook, "end", _keep_dropped),
}


@pytest.mark.parametrize(("where", "name", "bug"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, where: Any, name: str, bug: Any
) -> None:
    monkeypatch.setattr(where, name, bug)
    with pytest.raises(AssertionError) as found:
        _live_through(range(STORIES))
    assert "seed " in "".join(found.value.__notes__)
