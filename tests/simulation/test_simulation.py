"""Thousands of fault scenarios in virtual time: text, cleanup and endings are always right.

A failing seed is printed with its whole log; `run_checked(seed)` repeats it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.simulation.checks import run_checked
from tests.simulation.clock import run

from cascade.protocol import server
from cascade.protocol.client import ReplicaConnection
from cascade.protocol.codec import decode_server_message, parse_frame
from cascade.protocol.messages import Close, Judge, Open, Propose, Refusal
from cascade.replica.lease_book import LeaseBook
from cascade.replica.session import ReplicaSession
from cascade.router.tier_session import TierSession

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tests.simulation.cluster import Cluster

    from cascade.types import Session

SCENARIOS, FAST, CHUNK = 5_000, 500, 500


CHUNKS = [
    pytest.param(first, marks=() if first < FAST else pytest.mark.slow)
    for first in range(0, SCENARIOS, CHUNK)
]


@pytest.mark.parametrize("first", CHUNKS)
def test_every_scenario_ends_well(first: int) -> None:
    run_all(range(first, first + CHUNK))


def run_all(seeds: Iterable[int]) -> None:
    for seed in seeds:
        run(run_checked(seed))


def test_a_seed_repeats_its_scenario() -> None:
    for seed in range(30):
        first: Cluster = run(run_checked(seed))
        second: Cluster = run(run_checked(seed))
        assert history(first) == history(second)


def history(cluster: Cluster) -> list[object]:
    ends = [(one.written, type(one.error), one.left) for one in cluster.generations]
    times = [line.split(" generation ")[0] for line in cluster.log]
    return [*times, ends]


def test_the_scenarios_contain_every_cause_of_failover() -> None:
    causes: set[str] = set()
    for seed in range(150):
        cluster: Cluster = run(run_checked(seed))
        for one in cluster.generations:
            causes |= set(one.statistics.failover_causes if one.statistics else ())
    assert causes >= {"drafter lost", "drafter late", "drafter full", "expert lost"}


async def _any_reply(self: TierSession, session: Session) -> Any:
    """Accept a reply to any message."""
    del session
    reply: Any = await self._stream.receive()  # pyright: ignore[reportOptionalMemberAccess, reportPrivateUsage] - a planted bug
    if isinstance(reply, Refusal):
        raise self.tier.error(reply)
    return reply


def _keep_leases(self: TierSession) -> None:
    """Forget leases instead of releasing them."""
    self._stream = self._lease = self._lease_request = None  # pyright: ignore[reportPrivateUsage] - a planted bug


def _deliver_any_epoch(self: ReplicaConnection, data: bytes) -> None:
    """Deliver messages of every epoch."""
    for item in parse_frame(data, self.kind.response):
        message = decode_server_message(item)
        stream = self._sessions.get(message.session_id)  # pyright: ignore[reportPrivateUsage] - a planted bug
        if stream is not None:
            stream.deliver(message, 0)


def _admit_any_epoch(connection: server.Connection, message: Any, limits: object) -> bool:
    """Admit messages of every epoch."""
    del limits
    match message:
        case Open():
            connection.epochs[message.session.id] = message.epoch
            return True
        case Close():
            return connection.epochs.pop(message.session_id, None) is not None
        case _:
            return message.session_id in connection.epochs


def _trust_any_prefix(self: ReplicaSession, message: Propose | Judge) -> int | None:
    """Commit tokens without comparing the digest or what they follow."""
    del self.tokens[message.position - len(message.tokens) :]
    self.num_synced = min(self.num_synced, len(self.tokens))
    self.commit(message.tokens)
    return None


def _follows_always(*_: object) -> bool:
    """Accept a block whatever it was drafted after."""
    return True


def _never_end(self: LeaseBook, token: str) -> None:
    """Forget to end a lease."""
    del self, token


PLANTED: dict[str, tuple[Any, str, Any]] = {
    "messages of old epochs to the router": (
        ReplicaConnection,
        "_deliver_frame",
        _deliver_any_epoch,
    ),
    "messages of old epochs to a replica": (server, "_admit", _admit_any_epoch),
    "replies to other messages": (TierSession, "_next_reply", _any_reply),
    "blocks after other prefixes": (TierSession, "_follows", _follows_always),
    "digests not compared": (ReplicaSession, "sync_tokens", _trust_any_prefix),
    "leases not released": (TierSession, "close", _keep_leases),
    "leases not ended": (LeaseBook, "end", _never_end),
}


@pytest.mark.parametrize(("owner", "name", "bug"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, bug: Any
) -> None:
    monkeypatch.setattr(owner, name, bug)
    with pytest.raises(AssertionError) as found:
        run_all(range(FAST))
    assert "seed " in "".join(found.value.__notes__)
