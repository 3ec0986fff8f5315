"""A lease lasts while its session is used, and ends with it or with its caller."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.clock import FakeClock

from cascade.errors import Unauthenticated
from cascade.replica.lease_book import REMEMBERED, LeaseBook


def book(
    *, connect_s: float = 60.0, idle_s: float = 60.0, clock: FakeClock | None = None
) -> LeaseBook:
    return LeaseBook(connect_timeout_s=connect_s, idle_timeout_s=idle_s, clock=clock or FakeClock())


async def test_a_lease_lasts_until_its_session_ends() -> None:
    leases, ended = book(), list[str]()
    call = leases.hold("here:1", ended.append)
    ticket = await anext(call)
    assert ticket["address"] == "here:1"
    leases.claim(ticket["token"])
    rest = asyncio.ensure_future(anext(call, None))
    assert len(leases) == 1
    leases.end(ticket["token"])
    assert await rest is None
    assert (ended, len(leases)) == ([ticket["token"]], 0)


async def test_leases_have_different_tokens() -> None:
    leases, ended = book(), list[str]()
    calls = [leases.hold("here:1", ended.append) for _ in range(3)]
    tokens = [(await anext(call))["token"] for call in calls]
    assert len(set(tokens)) == len(leases) == 3
    leases.end(tokens[0])
    leases.claim(tokens[1])
    for call in calls:
        await call.aclose()
    assert sorted(ended) == sorted(tokens)


async def test_a_session_without_a_lease_is_refused() -> None:
    with pytest.raises(Unauthenticated, match="take a lease"):
        book().claim("guess")


async def test_a_lease_without_a_session_times_out() -> None:
    leases, ended = book(connect_s=0.0), list[str]()
    tickets = [ticket async for ticket in leases.hold("here:1", ended.append)]
    assert ended == [tickets[0]["token"]]
    with pytest.raises(Unauthenticated):
        leases.claim(ended[0])


async def test_an_idle_session_loses_its_lease() -> None:
    clock, ended = FakeClock(), list[str]()
    leases = book(idle_s=5.0, clock=clock)
    call = leases.hold("here:1", ended.append)
    ticket = await anext(call)
    leases.claim(ticket["token"])
    clock.now_s = 6.0
    assert await anext(call, None) is None
    assert ended == [ticket["token"]]


async def test_an_active_session_keeps_its_lease() -> None:
    clock, ended = FakeClock(), list[str]()
    leases = book(idle_s=5.0, clock=clock)
    call = leases.hold("here:1", ended.append)
    token = (await anext(call))["token"]
    leases.claim(token)
    clock.now_s = 4.0
    leases.touch(token)
    clock.now_s = 6.0
    rest = asyncio.ensure_future(anext(call, None))
    await asyncio.sleep(0)
    assert not ended
    leases.end(token)
    assert await rest is None


async def test_a_caller_that_leaves_ends_its_lease() -> None:
    leases, ended = book(), list[str]()
    call = leases.hold("here:1", ended.append)
    await anext(call)
    await call.aclose()
    assert (len(ended), len(leases)) == (1, 0)


async def test_an_ended_lease_can_be_ended_and_touched_again() -> None:
    leases = book()
    call = leases.hold("here:1", lambda _: None)
    token = (await anext(call))["token"]
    leases.claim(token)
    leases.end(token)
    leases.end(token)
    leases.touch(token)
    assert len(leases) == 0
    assert await anext(call, None) is None


async def test_a_shared_token_needs_no_lease() -> None:
    leases = LeaseBook(connect_timeout_s=1, idle_timeout_s=1, shared_token="shared")  # noqa: S106 - no secret
    leases.claim("shared")
    with pytest.raises(Unauthenticated):
        leases.claim("other")


async def test_a_stream_opens_with_the_token_of_a_lease_that_is_or_just_was() -> None:
    leases = book()
    call = leases.hold("here:1", lambda _: None)
    token = (await anext(call))["token"]
    leases.check(token)
    leases.end(token)
    leases.check(token)
    for _ in range(REMEMBERED):
        other = leases.hold("here:1", lambda _: None)
        leases.end((await anext(other))["token"])
        await other.aclose()
    with pytest.raises(Unauthenticated, match="cascade-lease"):
        leases.check(token)
    await call.aclose()


@pytest.mark.parametrize("token", ["", "none", "Ω"])
async def test_a_stream_without_a_lease_does_not_open(token: str) -> None:
    with pytest.raises(Unauthenticated):
        book().check(token)
