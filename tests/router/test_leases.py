from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from cascade.errors import Overloaded, Unauthenticated
from cascade.replica.lease_book import LeaseBook
from cascade.router.leases import FixedLease, FixedLeases, HedgedLeases


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def book(*, connect_s: float = 60.0, idle_s: float = 60.0, clock: Clock | None = None) -> LeaseBook:
    return LeaseBook(connect_timeout_s=connect_s, idle_timeout_s=idle_s, clock=clock or Clock())


async def test_a_lease_lasts_until_its_session_ends() -> None:
    leases, dropped = book(), list[str]()
    call = leases.hold("here:1", dropped.append)
    ticket = await anext(call)
    assert ticket["address"] == "here:1"
    leases.claim(ticket["token"])
    rest = asyncio.ensure_future(anext(call, None))
    assert len(leases) == 1
    leases.end(ticket["token"])
    assert await rest is None
    assert (dropped, len(leases)) == ([ticket["token"]], 0)


async def test_a_session_without_a_lease_is_refused() -> None:
    with pytest.raises(Unauthenticated, match="take a lease"):
        book().claim("guess")


async def test_a_lease_that_nobody_uses_ends() -> None:
    leases, dropped = book(connect_s=0.0), list[str]()
    tickets = [ticket async for ticket in leases.hold("here:1", dropped.append)]
    assert dropped == [tickets[0]["token"]]
    with pytest.raises(Unauthenticated):
        leases.claim(dropped[0])


async def test_an_idle_session_loses_its_lease() -> None:
    clock, dropped = Clock(), list[str]()
    leases = book(idle_s=5.0, clock=clock)
    call = leases.hold("here:1", dropped.append)
    ticket = await anext(call)
    leases.claim(ticket["token"])
    clock.now_s = 6.0
    assert await anext(call, None) is None
    assert dropped == [ticket["token"]]


async def test_a_session_that_is_used_keeps_its_lease() -> None:
    clock, dropped = Clock(), list[str]()
    leases = book(idle_s=5.0, clock=clock)
    call = leases.hold("here:1", dropped.append)
    token = (await anext(call))["token"]
    leases.claim(token)
    clock.now_s = 4.0
    leases.touch(token)
    clock.now_s = 6.0
    rest = asyncio.ensure_future(anext(call, None))
    await asyncio.sleep(0)
    assert not dropped
    leases.end(token)
    assert await rest is None


async def test_a_caller_that_leaves_frees_the_session() -> None:
    leases, dropped = book(), list[str]()
    call = leases.hold("here:1", dropped.append)
    await anext(call)
    await call.aclose()
    assert (len(dropped), len(leases)) == (1, 0)


async def test_a_standing_token_is_good_without_a_lease() -> None:
    leases = LeaseBook(connect_timeout_s=1, idle_timeout_s=1, shared_token="shared")  # noqa: S106 - no secret
    leases.claim("shared")
    with pytest.raises(Unauthenticated):
        leases.claim("other")


async def test_fixed_leases_take_turns() -> None:
    leases = FixedLeases(["a:1", "b:1"], token="shared")  # noqa: S106 - not a password
    taken = [await leases.take() for _ in range(3)]
    assert [lease.address for lease in taken] == ["a:1", "b:1", "a:1"]


class Hesitant:
    """Grants when it is told to, or fails."""

    def __init__(self) -> None:
        self.calls: asyncio.Queue[asyncio.Future[FixedLease]] = asyncio.Queue()

    async def take(self) -> FixedLease:
        call: asyncio.Future[FixedLease] = asyncio.get_running_loop().create_future()
        self.calls.put_nowait(call)
        return await call


@dataclass
class Noted(FixedLease):
    """Remembers that it was closed."""

    closed: bool = False

    def close(self) -> None:
        self.closed = True


async def test_a_replica_that_hangs_is_not_waited_for() -> None:
    source, granted = Hesitant(), FixedLease("b:1", "")
    taking = asyncio.ensure_future(HedgedLeases(source, after_s=0).take())
    first, second = await source.calls.get(), await source.calls.get()
    second.set_result(granted)
    assert await taking is granted
    await asyncio.sleep(0)
    assert first.cancelled()


async def test_a_lease_that_comes_second_is_given_back() -> None:
    source, one, two = Hesitant(), Noted("a:1", ""), Noted("b:1", "")
    taking = asyncio.ensure_future(HedgedLeases(source, after_s=0).take())
    first, second = await source.calls.get(), await source.calls.get()
    first.set_result(one)
    second.set_result(two)
    got = await taking
    await asyncio.sleep(0)
    assert [lease for lease in (one, two) if not lease.closed] == [got]


async def test_a_tier_that_says_no_is_not_asked_twice() -> None:
    source = Hesitant()
    taking = asyncio.ensure_future(HedgedLeases(source, after_s=60).take())
    (await source.calls.get()).set_exception(Overloaded("full"))
    with pytest.raises(Overloaded):
        await taking
    assert source.calls.empty()


async def test_one_call_that_fails_leaves_the_other() -> None:
    source = Hesitant()
    taking = asyncio.ensure_future(HedgedLeases(source, after_s=0).take())
    first, second = await source.calls.get(), await source.calls.get()
    second.set_exception(Overloaded("full"))
    await asyncio.wait([second])
    first.set_result(FixedLease("a:1", ""))
    assert (await taking).address == "a:1"


async def test_a_caller_that_leaves_takes_its_calls_along() -> None:
    source = Hesitant()
    taking = asyncio.ensure_future(HedgedLeases(source, after_s=0).take())
    calls = [await source.calls.get() for _ in range(2)]
    taking.cancel()
    await asyncio.wait([taking])
    await asyncio.sleep(0)
    assert all(call.cancelled() for call in calls)
