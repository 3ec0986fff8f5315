"""More load than capacity: full caches, many clients that leave at once, overload."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from typing import TYPE_CHECKING

import pytest
from tests.chaos.checks import assert_exact, assert_no_leaks, process_resources, wait_until_free
from tests.chaos.cluster import config
from tests.chaos.load import references, request_bodies, streams
from tests.chaos.report import quantile

if TYPE_CHECKING:
    from tests.chaos.cluster import ChaosCluster
    from tests.chaos.load import Answer, Body, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1800)]

LEAVING = int(os.environ.get("CHAOS_CLIENTS", "1000"))
STARTING = 50  # of them at a time: Serve's proxy queues no more than 256
CACHE_TOKENS = 2048
OVERLOAD = 3  # times the capacity
OVERLOAD_S = 60.0
CONCURRENCY = 2  # answers that the overloaded server generates at once, on two cores


async def test_a_full_cache_delays_streams_and_changes_no_text(
    cluster: ChaosCluster, clients: Clients, report: Report
) -> None:
    """Sixty-four sessions share a cache for about ten and preempt each other."""
    full = {"engine": {"cache_tokens": CACHE_TOKENS}}
    counts = {"Drafter": 1, "Expert": 1, "Router": 1}
    await cluster.deploy(
        config(http=cluster.http, counts=counts, args={"drafter": full, "expert": full})
    )
    bodies = request_bodies(tokens=128)
    texts = await references(clients, bodies)
    before = await process_resources(cluster)
    async with streams(clients, bodies, count=64) as answers:
        await asyncio.sleep(20)
    assert_exact(answers, texts)
    states = await cluster.debug_state("Expert")
    report.add("full cache", "streams that ended with their text", len(answers))
    report.add("full cache", "open at once", clients.most)
    report.add("full cache", "caches dropped to make room", states[0]["preemptions"])
    assert states[0]["preemptions"] > 0
    await assert_no_leaks(cluster, before)


async def test_a_thousand_clients_leave_at_once(
    cluster: ChaosCluster, clients: Clients, report: Report
) -> None:
    counts = {"Drafter": 2, "Expert": 2, "Router": 2}
    many = {name: {"max_ongoing_requests": LEAVING + 24} for name in ("Drafter", "Expert")}
    # No text is compared here, and results that do not depend on the batch cost time.
    usual = {"expert": {"engine": {"deterministic": False}}}
    await cluster.deploy(config(http=cluster.http, counts=counts, options=many, args=usual))
    before = await process_resources(cluster)
    bodies = itertools.cycle(request_bodies(tokens=400))
    began_s = time.monotonic()
    answers: list[Answer] = []
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Answer]] = []
        while waiting(answers) or len(answers) < LEAVING:
            if len(tasks) < LEAVING and len(tasks) - len(answers) + waiting(answers) < STARTING:
                tasks.append(group.create_task(clients.complete(next(bodies), into=answers)))
            await asyncio.sleep(0.002)
        assert not any(one.done or one.error for one in answers), [one.error for one in answers]
        held = await cluster.held()
        opened_s = time.monotonic()
        cpu_s = await cluster.cpu_seconds()
        for task in tasks:
            task.cancel()
    free_s = await wait_until_free(cluster)
    for tier, total_s in (await cluster.cpu_seconds()).items():
        what = f"CPU time of both replicas of {tier} meanwhile"
        report.add("disconnect storm", what, total_s - cpu_s[tier], "s")
    report.add("disconnect storm", "streams open at once", LEAVING)
    report.add("disconnect storm", "leases held then", held["leases"])
    report.add("disconnect storm", "taken to open them", opened_s - began_s, "s")
    report.add("disconnect storm", "all leases and caches free after", free_s, "s")
    await assert_no_leaks(cluster, before)
    assert held["leases"] >= LEAVING
    assert free_s <= 2


async def test_overload_slows_no_accepted_stream(
    cluster: ChaosCluster, clients: Clients, report: Report
) -> None:
    """Accepted requests run at most twice as slow; refused ones get Retry-After."""
    counts = {"Drafter": 1, "Expert": 1, "Router": 1}
    few = {"Router": {"max_ongoing_requests": CONCURRENCY, "max_queued_requests": 1}}
    await cluster.deploy(config(http=cluster.http, counts=counts, options=few))
    bodies = request_bodies(tokens=64)
    texts = await references_one_by_one(clients, bodies)
    unloaded = [await clients.complete(body) for body in bodies]
    base_s = quantile([one.token_s for one in unloaded], 0.95)
    began_s = time.monotonic()
    async with streams(clients, bodies, count=CONCURRENCY) as closed:
        await asyncio.sleep(20)
    capacity = len(closed) / (time.monotonic() - began_s)
    answers = await offered(clients, bodies, rate=OVERLOAD * capacity, for_s=OVERLOAD_S)
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
        report.add("3 times the capacity", what, value, unit)
    assert_exact(accepted, texts)
    for one in refused:
        assert one.status in {429, 503}, (one.status, one.error, one.broken)
        assert one.retry_after
    await wait_until_free(cluster)
    assert len(accepted) > 0.8 * capacity * OVERLOAD_S
    assert loaded_s <= 2 * base_s


def waiting(answers: list[Answer]) -> int:
    """Return how many have received nothing yet."""
    return sum(not one.chunk_times_s and not one.error for one in answers)


async def references_one_by_one(clients: Clients, bodies: list[Body]) -> dict[str, str]:
    texts: dict[str, str] = {}
    for body in bodies:
        texts |= await references(clients, [body])
    return texts


async def offered(
    clients: Clients, bodies: list[Body], *, rate: float, for_s: float
) -> list[Answer]:
    """Send requests at a steady rate; return all answers once they have ended."""
    endless = itertools.cycle(bodies)
    began_s = time.monotonic()
    async with asyncio.TaskGroup() as group:
        tasks: list[asyncio.Task[Answer]] = []
        while (wait_s := began_s + len(tasks) / rate - time.monotonic()) < for_s:
            await asyncio.sleep(max(0.0, wait_s))
            if time.monotonic() - began_s > for_s:
                break
            tasks.append(group.create_task(clients.complete(next(endless))))
    return [task.result() for task in tasks]
