from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.errors import Overloaded
from cascade.router.leases import FixedLease, FixedLeases, HedgedLeases, LeaseQueue
from cascade.types import Caller


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


class Tier:
    """A tier with so many slots, which grants a lease as soon as one is free."""

    def __init__(self, slots: int) -> None:
        self.free = asyncio.Semaphore(slots)
        self.held = 0

    async def take(self) -> Slot:
        await self.free.acquire()
        self.held += 1
        return Slot(self)


class Slot(FixedLease):
    """Occupies a slot until it is closed."""

    def __init__(self, tier: Tier) -> None:
        super().__init__("a:1", "")
        self._tier: Tier | None = tier

    def close(self) -> None:
        if self._tier is not None:
            self._tier.held -= 1
            self._tier.free.release()
            self._tier = None


async def settle() -> None:
    """Let everything happen that needs no more leases."""
    for _ in range(50):
        await asyncio.sleep(0)


def caller(name: str, connection: str = "") -> Caller:
    return Caller(name=name, connection=connection or name)


async def test_a_caller_with_one_session_waits_for_one_lease() -> None:
    """However many sessions another caller, or another connection, had waiting before."""
    tier = Tier(slots=1)
    queue = LeaseQueue(tier, limit=256)
    held = await queue.take(caller("noisy"))
    order: list[Caller] = []

    async def wait(who: Caller) -> None:
        lease = await queue.take(who)
        order.append(who)
        lease.close()

    noisy = [caller("noisy", "one")] * 40 + [caller("noisy", "two")]
    waiting = [asyncio.create_task(wait(who)) for who in noisy]
    await settle()
    waiting.append(asyncio.create_task(wait(caller("quiet"))))
    await settle()
    held.close()
    await asyncio.gather(*waiting)
    assert [who.name for who in order[:2]] == ["noisy", "quiet"]
    assert order.index(caller("noisy", "two")) <= 3
    assert tier.held == 0


async def test_a_caller_has_as_many_turns_in_a_row_as_its_weight() -> None:
    tier = Tier(slots=1)
    queue = LeaseQueue(tier, limit=256)
    held = await queue.take(Caller(name="first"))
    order: list[str] = []

    async def wait(who: Caller) -> None:
        lease = await queue.take(who)
        order.append(who.name)
        lease.close()

    callers = [Caller(name="heavy", connection="a", weight=3), Caller(name="light")]
    waiting = [asyncio.create_task(wait(who)) for who in callers for _ in range(6)]
    await settle()
    held.close()
    await asyncio.gather(*waiting)
    heavy, light = ["heavy"] * 3, ["light"]
    assert order == [*heavy, *light, *heavy, *light, *["light"] * 4]


@settings(deadline=None, max_examples=150)
@given(
    slots=st.integers(1, 3),
    limit=st.integers(1, 12),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["a", "b", "c"]), st.sampled_from(["take", "take", "leave", "end"])
        ),
        max_size=60,
    ),
)
def test_no_lease_is_lost_whoever_comes_leaves_or_is_refused(
    slots: int, limit: int, steps: list[tuple[str, str]]
) -> None:
    """At the end nobody waits, nothing is held, and no caller is starved of a free slot."""

    async def run() -> None:
        tier = Tier(slots)
        queue = LeaseQueue(tier, limit=limit)
        tasks: dict[str, list[asyncio.Task[object]]] = {"a": [], "b": [], "c": []}
        for name, step in steps:
            own = tasks[name]
            match step:
                case "take":
                    own.append(asyncio.create_task(queue.take(caller(name))))
                case "leave":
                    next((task.cancel() for task in own if not task.done()), None)
                case _:
                    close(next((task for task in own if granted(task)), None))
            await settle()
            waiting = [task for every in tasks.values() for task in every if not task.done()]
            assert len(waiting) <= limit
            assert not waiting or tier.held == slots
        for every in tasks.values():
            for task in every:
                task.cancel()
        await settle()
        for every in tasks.values():
            for task in every:
                close(task if granted(task) else None)
        await settle()
        assert tier.held == 0
        assert await queue.take(caller("last"))

    asyncio.run(run())


def granted(task: asyncio.Task[object]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None


def close(task: asyncio.Task[object] | None) -> None:
    if task is not None:
        lease = task.result()
        assert isinstance(lease, Slot)
        lease.close()


async def test_a_full_queue_refuses_the_caller_that_fills_it() -> None:
    """A newcomer gets the place of the last of them."""
    queue = LeaseQueue(Tier(slots=0), limit=8)
    noisy = [asyncio.create_task(queue.take(caller("noisy"))) for _ in range(9)]
    await settle()
    quiet = asyncio.create_task(queue.take(caller("quiet")))
    await settle()
    refused = Counter(type(task.exception()) for task in noisy if task.done())
    assert refused == {Overloaded: 2}
    assert noisy[7].done()
    assert noisy[8].done()
    assert not quiet.done()
    for task in (*noisy, quiet):
        task.cancel()
    await settle()


async def test_an_error_of_the_tier_goes_to_the_session_that_has_waited_longest() -> None:
    source = Hesitant()
    queue = LeaseQueue(source, limit=256)
    first, second = (asyncio.create_task(queue.take(caller(name))) for name in "ab")
    one, two = await source.calls.get(), await source.calls.get()
    two.set_exception(Overloaded("full"))
    await settle()
    assert isinstance(first.exception(), Overloaded)
    one.set_result(FixedLease("a:1", ""))
    assert (await second).address == "a:1"
