"""What is on its way is bounded, and the slow make room for the quick."""

from __future__ import annotations

import asyncio

import pytest

from cascade.protocol.arrivals import Arrivals

LONG_S = 3600.0


async def waiting(arrivals: Arrivals, sender: str, *, most: int = 3) -> asyncio.Task[None]:
    """Begin a message that never arrives."""

    async def one() -> None:
        async with arrivals.place(sender, most=most, within_s=LONG_S):
            await asyncio.Event().wait()

    task = asyncio.create_task(one())
    await asyncio.sleep(0)
    return task


async def test_a_message_that_takes_too_long_is_ended() -> None:
    with pytest.raises(TimeoutError):
        async with Arrivals().place("a", most=1, within_s=0.0):
            await asyncio.Event().wait()


async def test_one_more_ends_the_oldest_of_the_sender_that_has_most() -> None:
    arrivals = Arrivals()
    honest = await waiting(arrivals, "honest")
    slow = [await waiting(arrivals, "slow") for _ in range(2)]
    async with arrivals.place("honest", most=3, within_s=LONG_S):
        with pytest.raises(TimeoutError):
            await slow[0]
        assert not slow[1].done()
        assert not honest.done()
        assert len(arrivals) == 3
    for task in (honest, slow[1]):
        task.cancel()
    await asyncio.wait((honest, slow[1]))
    assert len(arrivals) == 0


async def test_what_has_arrived_makes_room_without_an_end() -> None:
    arrivals = Arrivals()
    for _ in range(10):
        async with arrivals.place("a", most=1, within_s=LONG_S):
            pass
    assert len(arrivals) == 0
