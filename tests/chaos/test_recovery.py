"""One replica is killed, hangs, slows down or loses connections: when do streams go on?"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from tests.chaos.checks import assert_exact, assert_no_leaks, process_resources
from tests.chaos.cluster import APART, LONG_TIMEOUTS, config, wait_until
from tests.chaos.faults import cut, frozen, kill, slowed
from tests.chaos.load import key, references, request_bodies, streams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.chaos.cluster import ChaosCluster, Replica
    from tests.chaos.load import Answer, Body, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

COUNTS = {"Drafter": 2, "Expert": 2, "Router": 1}
STREAMS = 4
TOKENS = 128
WARM_S = 5.0
DEADLINE_S: float = LONG_TIMEOUTS["draft_deadline_s"]
SOON_S = 1.0  # after a fault its gap has begun
HANG_S = 20.0
SLOW = 0.2
DETECTED_S = 15.0  # Ray's own time to notice that a node is gone, and some more


@pytest.fixture(scope="module")
def bodies() -> list[Body]:
    return request_bodies(tokens=TOKENS)[::3]


@pytest.fixture
async def texts(cluster: ChaosCluster, clients: Clients, bodies: list[Body]) -> dict[str, str]:
    """The text of each request without faults."""
    while len(cluster.nodes) < 2:
        await cluster.add_node()
    await cluster.deploy(config(http=cluster.http, counts=COUNTS, options=APART))
    return await references(clients, bodies)


@asynccontextmanager
async def loaded(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str]
) -> AsyncGenerator[list[Answer]]:
    """Keep a few streams open; each must end with its exact text and leak nothing."""
    before = await process_resources(cluster)
    bodies = [json.loads(name) for name in texts]
    async with streams(clients, bodies, count=STREAMS) as answers:
        await asyncio.sleep(WARM_S)
        yield answers
        await asyncio.sleep(WARM_S)
    assert_exact(answers, texts)
    await assert_no_leaks(cluster, before)


def gaps_at(answers: list[Answer], moment_s: float, *, for_s: float = SOON_S) -> list[float]:
    """Return the longest gap of each stream that was open at a moment."""
    return [
        one.gap_at(moment_s, for_s=for_s) for one in answers if one.began_s < moment_s < one.ended_s
    ]


async def back(cluster: ChaosCluster, tier: str, dead: list[Replica]) -> float:
    """Wait until a tier is complete again; return the time at which it was."""
    names = {one.name for one in dead}

    async def complete() -> bool:
        return len([r for r in await cluster.replicas(tier) if r.name not in names]) >= 2

    await wait_until(complete, f"the {tier} to be back", timeout_s=300)
    return time.monotonic()


async def returned(answers: list[Answer], moment_s: float) -> float:
    """Wait until drafted text comes after a moment; return how long it took, in seconds."""
    seen_s: list[float] = []

    def drafts() -> bool:
        seen_s[:] = [s for one in answers if (s := one.drafted_after(moment_s)) is not None]
        return bool(seen_s)

    await wait_until(drafts, "speculation to return")
    return min(seen_s) - moment_s


async def test_without_drafters_streams_go_on_until_speculation_returns(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, clients, texts) as answers:
        dead = await cluster.replicas("Drafter")
        moment_s = time.monotonic()
        for one in dead:
            kill(one)
        names = {one.name for one in dead}

        async def one_back() -> bool:
            return any(one.name not in names for one in await cluster.replicas("Drafter"))

        await wait_until(one_back, "a drafter to be back", timeout_s=300)
        back_s = time.monotonic()
        again_s = await returned(answers, back_s)
    gap_s = max(gaps_at(answers, moment_s))
    report.add("drafters killed", "longest gap of a stream", gap_s, "s")
    report.add("drafters killed", "longest gap before", baseline_gap(answers, moment_s), "s")
    report.add("drafters killed", "time without drafters", back_s - moment_s, "s")
    report.add("drafters killed", "then drafted text after", again_s, "s")
    assert gap_s <= DEADLINE_S + 2 * baseline_gap(answers, moment_s)
    assert again_s <= 5


async def test_when_drafters_hang_streams_wait_one_draft_deadline(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, clients, texts) as answers:
        moment_s = time.monotonic()
        with ExitStack() as stack:
            for one in await cluster.replicas("Drafter"):
                stack.enter_context(frozen(one))
            await asyncio.sleep(6)
        again_s = await returned(answers, time.monotonic())
    gap_s = max(gaps_at(answers, moment_s))
    report.add("drafters hang", "draft deadline", DEADLINE_S, "s")
    report.add("drafters hang", "longest gap of a stream", gap_s, "s")
    report.add("drafters hang", "longest gap before", baseline_gap(answers, moment_s), "s")
    report.add("drafters hang", "drafted text after their return", again_s, "s")
    assert gap_s <= DEADLINE_S + 2 * baseline_gap(answers, moment_s)
    assert again_s <= 5


async def test_a_killed_experts_streams_resume_on_another(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, clients, texts) as answers:
        victim = (await cluster.replicas("Expert"))[0]
        moment_s = time.monotonic()
        kill(victim)
        back_s = await back(cluster, "Expert", [victim])
    moved = [one for one in answers if one.causes.get("expert lost")]
    gaps_s = gaps_at(moved, moment_s)
    report.add("expert killed", "streams that moved", len(moved))
    report.add("expert killed", "their longest gap", max(gaps_s), "s")
    report.add("expert killed", "longest gap before", baseline_gap(answers, moment_s), "s")
    report.add("expert killed", "replica back after", back_s - moment_s, "s")
    assert max(gaps_s) <= 1 + 2 * baseline_gap(answers, moment_s)


async def test_a_hanging_experts_streams_resume_on_another(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, clients, texts) as answers:
        victim = (await cluster.replicas("Expert"))[0]
        moment_s = time.monotonic()
        with frozen(victim):
            await asyncio.sleep(HANG_S)
    moved = [one for one in answers if any(cause.startswith("expert") for cause in one.causes)]
    gaps_s = gaps_at(moved, moment_s)
    report.add("expert hangs", "for", HANG_S, "s")
    report.add("expert hangs", "streams that moved", len(moved))
    report.add("expert hangs", "their longest gap", max(gaps_s), "s")
    assert max(gaps_s) < HANG_S


async def test_a_cut_connection_changes_no_text(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    moments_s: list[float] = []
    connections = 0
    async with loaded(cluster, clients, texts) as answers:
        routers = await cluster.replicas("Router")
        for one in await cluster.replicas("Drafter", "Expert"):
            moments_s.append(time.monotonic())
            connections += cut(one, routers)
            await asyncio.sleep(3)
    gap_s = max(gap for moment_s in moments_s for gap in gaps_at(answers, moment_s))
    report.add("gRPC cut", "connections cut", connections)
    report.add("gRPC cut", "longest gap of a stream", gap_s, "s")
    report.add("gRPC cut", "longest gap before", baseline_gap(answers, moments_s[0]), "s")
    assert connections >= len(moments_s)
    assert gap_s <= 1 + 2 * baseline_gap(answers, moments_s[0])


async def test_slow_replicas_change_no_text(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, clients, texts) as answers:
        slow = [(await cluster.replicas(name))[0] for name in ("Drafter", "Expert")]
        moment_s = time.monotonic()
        async with slowed(slow[0], share=SLOW), slowed(slow[1], share=SLOW):
            await asyncio.sleep(20)
    gap_s = max(gaps_at(answers, moment_s, for_s=20))
    report.add("slow replicas", "share of their speed", SLOW)
    report.add("slow replicas", "longest gap of a stream", gap_s, "s")
    assert gap_s < 10


async def test_the_streams_of_a_lost_node_resume_elsewhere(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, clients, texts) as answers:
        moment_s = time.monotonic()
        await cluster.remove_node(cluster.nodes[0])
        await asyncio.sleep(10)
    moved = [one for one in answers if any("lost" in cause for cause in one.causes)]
    gap_s = max(gaps_at(moved, moment_s))
    report.add("node removed", "streams that moved", len(moved))
    report.add("node removed", "their longest gap", gap_s, "s")
    assert gap_s < DETECTED_S


async def test_without_experts_streams_resume_or_end_with_an_error(
    cluster: ChaosCluster, clients: Clients, texts: dict[str, str], report: Report
) -> None:
    """None hangs: open streams resume or end with an error, new ones get Retry-After."""
    before = await process_resources(cluster)
    bodies = [json.loads(name) for name in texts]
    async with streams(clients, bodies, count=STREAMS) as answers:
        await asyncio.sleep(WARM_S)
        dead = await cluster.replicas("Expert")
        moment_s = time.monotonic()
        for one in dead:
            kill(one)
        back_s = await back(cluster, "Expert", dead)
        await asyncio.sleep(WARM_S)
    ends = Counter(end_of(one, texts) for one in answers)
    report.add("experts killed", "time without experts", back_s - moment_s, "s")
    for what, count in ends.items():
        report.add("experts killed", f"streams that {what}", count)
    assert ends["ended with their text"] > 0
    await assert_no_leaks(cluster, before)


def end_of(one: Answer, texts: dict[str, str]) -> str:
    """Return how a stream ended, which must be one of three ways."""
    assert not one.broken, one.broken
    assert texts[key(one.body)].startswith(one.text)
    if one.done:
        assert one.text == texts[key(one.body)]
        return "ended with their text"
    if one.status == 200:
        assert one.error in {"expert_unavailable", "overloaded"}, one.error
        return "ended with a clean error"
    assert one.status in {429, 503}, (one.status, one.error)
    assert one.retry_after
    return "were refused with Retry-After"


def baseline_gap(answers: list[Answer], moment_s: float) -> float:
    """Return the longest gap shortly before a moment: what any stream has on this machine."""
    pairs = [pair for one in answers for pair in itertools.pairwise(one.chunk_times_s)]
    return max((b - a for a, b in pairs if moment_s - WARM_S < a and b < moment_s), default=0.0)
