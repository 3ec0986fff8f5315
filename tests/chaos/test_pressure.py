"""More is asked than there is room for: caches fill, clients leave all at once, load exceeds."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from typing import TYPE_CHECKING

import pytest
from tests.chaos.checks import assert_exact, assert_no_leaks, burdens, until_free
from tests.chaos.cluster import config
from tests.chaos.load import questions, references, streams
from tests.chaos.report import quantile

if TYPE_CHECKING:
    from tests.chaos.cluster import Ground
    from tests.chaos.load import Answer, Body, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

LEAVING = int(os.environ.get("CHAOS_CLIENTS", "1000"))
ENTERING = 50  # of them at a time: Serve's proxy holds no more than 256 that wait
CACHE_TOKENS = 2048
OVERLOAD = 3  # times the capacity
OVERLOAD_S = 60.0
ROOM = 2  # answers that the server under overload writes at once, on two cores


async def test_a_full_cache_delays_streams_and_changes_no_word(
    cluster: Ground, asking: Clients, report: Report
) -> None:
    """Sixty-four sessions share a cache with room for about ten: they push each other out."""
    full = {"engine": {"cache_tokens": CACHE_TOKENS}}
    counts = {"Drafter": 1, "Expert": 1, "Router": 1}
    await cluster.deploy(
        config(http=cluster.http, counts=counts, args={"drafter": full, "expert": full})
    )
    bodies = questions(tokens=128)
    texts = await references(asking, bodies)
    before = await burdens(cluster)
    async with streams(asking, bodies, count=64) as answers:
        await asyncio.sleep(20)
    assert_exact(answers, texts)
    looked = await cluster.debug_state("Expert")
    report.note("full cache", "streams that ended with their text", len(answers))
    report.note("full cache", "open at once", asking.most)
    report.note("full cache", "caches dropped to make room", looked[0]["preemptions"])
    assert looked[0]["preemptions"] > 0
    await assert_no_leaks(cluster, before)


async def test_a_thousand_clients_leave_at_once(
    cluster: Ground, asking: Clients, report: Report
) -> None:
    counts = {"Drafter": 2, "Expert": 2, "Router": 2}
    many = {name: {"max_ongoing_requests": LEAVING + 24} for name in ("Drafter", "Expert")}
    # No text is compared, and rows that do not depend on the batch are read one by one.
    usual = {"expert": {"engine": {"deterministic": False}}}
    await cluster.deploy(config(http=cluster.http, counts=counts, options=many, args=usual))
    before = await burdens(cluster)
    bodies = itertools.cycle(questions(tokens=400))
    began_s = time.monotonic()
    heard: list[Answer] = []
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Answer]] = []
        while silent(heard) or len(heard) < LEAVING:
            if len(tasks) < LEAVING and len(tasks) - len(heard) + silent(heard) < ENTERING:
                tasks.append(group.create_task(asking.ask(next(bodies), into=heard)))
            await asyncio.sleep(0.002)
        assert not any(one.done or one.error for one in heard), [one.error for one in heard]
        held = await cluster.held()
        opened_s = time.monotonic()
        spent_s = await cluster.spent_s()
        for task in tasks:
            task.cancel()
    free_s = await until_free(cluster)
    for tier, by_now_s in (await cluster.spent_s()).items():
        what = f"processor time of both replicas of {tier} meanwhile"
        report.note("disconnect storm", what, by_now_s - spent_s[tier], "s")
    report.note("disconnect storm", "streams open at once", LEAVING)
    report.note("disconnect storm", "leases held then", held["leases"])
    report.note("disconnect storm", "taken to open them", opened_s - began_s, "s")
    report.note("disconnect storm", "all leases and pages free after", free_s, "s")
    await assert_no_leaks(cluster, before)
    assert held["leases"] >= LEAVING
    assert free_s <= 2


async def test_three_times_the_capacity_for_a_minute(
    cluster: Ground, asking: Clients, report: Report
) -> None:
    """Who is let in is served at a decent pace; who is not is told to come again."""
    counts = {"Drafter": 1, "Expert": 1, "Router": 1}
    few = {"Router": {"max_ongoing_requests": ROOM, "max_queued_requests": 1}}
    await cluster.deploy(config(http=cluster.http, counts=counts, options=few))
    bodies = questions(tokens=64)
    texts = await references_one_by_one(asking, bodies)
    unloaded = [await asking.ask(body) for body in bodies]
    base_s = quantile([one.token_s for one in unloaded], 0.95)
    began_s = time.monotonic()
    async with streams(asking, bodies, count=ROOM) as closed:
        await asyncio.sleep(20)
    capacity = len(closed) / (time.monotonic() - began_s)
    answers = await offered(asking, bodies, rate=OVERLOAD * capacity, for_s=OVERLOAD_S)
    accepted = [one for one in answers if one.status == 200]
    refused = [one for one in answers if one.status != 200]
    loaded_s = quantile([one.token_s for one in accepted], 0.95)
    for what, value, unit in (
        ("capacity", capacity, "answers/s"),
        ("offered", len(answers) / OVERLOAD_S, "answers/s"),
        ("accepted and finished", len(accepted), ""),
        ("refused with Retry-After", len(refused), ""),
        ("time per token, p95, unloaded", 1e3 * base_s, "ms"),
        ("time per token, p95, of the accepted", 1e3 * loaded_s, "ms"),
    ):
        report.note("3 times the capacity", what, value, unit)
    assert_exact(accepted, texts)
    for one in refused:
        assert one.status in {429, 503}, (one.status, one.error, one.broken)
        assert one.retry_after
    await until_free(cluster)
    assert len(accepted) > 0.8 * capacity * OVERLOAD_S
    assert loaded_s <= 2 * base_s


def silent(heard: list[Answer]) -> int:
    """Return how many have heard nothing yet."""
    return sum(not one.heard_s and not one.error for one in heard)


async def references_one_by_one(asking: Clients, bodies: list[Body]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for body in bodies:
        texts |= await references(asking, [body])
    return texts


async def offered(
    asking: Clients, bodies: list[Body], *, rate: float, for_s: float
) -> list[Answer]:
    """Ask at a steady rate, whatever comes back; return all answers once they have ended."""
    endless = itertools.cycle(bodies)
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Answer]] = []
        while (wait_s := began_s + len(tasks) / rate - time.monotonic()) < for_s:
            await asyncio.sleep(max(0.0, wait_s))
            if time.monotonic() - began_s > for_s:
                break
            tasks.append(group.create_task(asking.ask(next(endless))))
    return [task.result() for task in tasks]
