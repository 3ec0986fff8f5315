from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from cascade.errors import Overloaded
from cascade.router.leases import FixedLease, FixedLeases, HedgedLeases


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
