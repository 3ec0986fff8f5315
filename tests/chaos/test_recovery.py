"""One part dies, hangs, slows down or is cut off; how long it takes until streams go on."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections import Counter
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from tests.chaos.checks import assert_exact, assert_no_leaks, burdens
from tests.chaos.cluster import APART, PATIENT, config, until
from tests.chaos.harm import cut, frozen, kill, slowed
from tests.chaos.load import key, questions, references, streams

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from tests.chaos.cluster import Ground, Replica
    from tests.chaos.load import Answer, Body, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1200)]

COUNTS = {"Drafter": 2, "Expert": 2, "Router": 1}
STREAMS = 4
TOKENS = 128
WARM_S = 5.0
DEADLINE_S: float = PATIENT["draft_deadline_s"]
SOON_S = 1.0  # after a harm its silence has begun
HANG_S = 20.0
SLOW = 0.2
DETECTED_S = 15.0  # Ray's own time for a node that is gone, and more


@pytest.fixture(scope="module")
def bodies() -> list[Body]:
    return questions(tokens=TOKENS)[::3]


@pytest.fixture
async def texts(cluster: Ground, asking: Clients, bodies: list[Body]) -> dict[str, str]:
    """What each question's answer is where nothing dies."""
    while len(cluster.nodes) < 2:
        await cluster.add_node()
    await cluster.deploy(config(http=cluster.http, counts=COUNTS, options=APART))
    return await references(asking, bodies)


@asynccontextmanager
async def loaded(
    cluster: Ground, asking: Clients, texts: dict[str, str]
) -> AsyncGenerator[list[Answer]]:
    """Keep a few streams open, each of which must end with its exact text and leave nothing."""
    before = await burdens(cluster)
    bodies = [json.loads(name) for name in texts]
    async with streams(asking, bodies, count=STREAMS) as answers:
        await asyncio.sleep(WARM_S)
        yield answers
        await asyncio.sleep(WARM_S)
    assert_exact(answers, texts)
    await assert_no_leaks(cluster, before)


def silences(answers: list[Answer], moment_s: float, *, for_s: float = SOON_S) -> list[float]:
    """Return the longest silence of each stream that was open at a moment."""
    return [
        one.silence_at(moment_s, for_s=for_s)
        for one in answers
        if one.began_s < moment_s < one.ended_s
    ]


async def back(cluster: Ground, tier: str, dead: list[Replica]) -> float:
    """Wait until a tier is whole again; return the time at which it was."""
    names = {one.name for one in dead}

    async def whole() -> bool:
        return len([r for r in await cluster.replicas(tier) if r.name not in names]) >= 2

    await until(whole, f"the {tier} to be back", timeout_s=300)
    return time.monotonic()


async def returned(answers: list[Answer], moment_s: float) -> float:
    """Wait until a drafter writes again after a moment; return how long it took, in seconds."""
    seen_s: list[float] = []

    def speculates() -> bool:
        seen_s[:] = [s for one in answers if (s := one.drafted_after(moment_s)) is not None]
        return bool(seen_s)

    await until(speculates, "speculation to return")
    return min(seen_s) - moment_s


async def test_without_drafters_streams_go_on_and_speculation_returns(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, asking, texts) as answers:
        dead = await cluster.replicas("Drafter")
        moment_s = time.monotonic()
        for one in dead:
            kill(one)
        names = {one.name for one in dead}

        async def one_back() -> bool:
            return any(one.name not in names for one in await cluster.replicas("Drafter"))

        await until(one_back, "a drafter to be back", timeout_s=300)
        back_s = time.monotonic()
        again_s = await returned(answers, back_s)
    gap_s = max(silences(answers, moment_s))
    report.note("drafters killed", "silence of a stream, longest", gap_s, "s")
    report.note("drafters killed", "silence before, longest", usual(answers, moment_s), "s")
    report.note("drafters killed", "time without drafters", back_s - moment_s, "s")
    report.note("drafters killed", "then drafted words after", again_s, "s")
    assert gap_s <= DEADLINE_S + 2 * usual(answers, moment_s)
    assert again_s <= 5


async def test_when_drafters_hang_streams_wait_one_draft_deadline(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, asking, texts) as answers:
        moment_s = time.monotonic()
        with ExitStack() as stack:
            for one in await cluster.replicas("Drafter"):
                stack.enter_context(frozen(one))
            await asyncio.sleep(6)
        again_s = await returned(answers, time.monotonic())
    gap_s = max(silences(answers, moment_s))
    report.note("drafters hang", "draft deadline", DEADLINE_S, "s")
    report.note("drafters hang", "silence of a stream, longest", gap_s, "s")
    report.note("drafters hang", "silence before, longest", usual(answers, moment_s), "s")
    report.note("drafters hang", "drafted words after their return", again_s, "s")
    assert gap_s <= DEADLINE_S + 2 * usual(answers, moment_s)
    assert again_s <= 5


async def test_a_killed_experts_streams_resume_on_another(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, asking, texts) as answers:
        victim = (await cluster.replicas("Expert"))[0]
        moment_s = time.monotonic()
        kill(victim)
        back_s = await back(cluster, "Expert", [victim])
    moved = [one for one in answers if one.causes.get("expert lost")]
    gaps_s = silences(moved, moment_s)
    report.note("expert killed", "streams that moved", len(moved))
    report.note("expert killed", "their silence, longest", max(gaps_s), "s")
    report.note("expert killed", "silence before, longest", usual(answers, moment_s), "s")
    report.note("expert killed", "replica back after", back_s - moment_s, "s")
    assert max(gaps_s) <= 1 + 2 * usual(answers, moment_s)


async def test_a_hanging_experts_streams_resume_on_another(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, asking, texts) as answers:
        victim = (await cluster.replicas("Expert"))[0]
        moment_s = time.monotonic()
        with frozen(victim):
            await asyncio.sleep(HANG_S)
    moved = [one for one in answers if any(cause.startswith("expert") for cause in one.causes)]
    gaps_s = silences(moved, moment_s)
    report.note("expert hangs", "for", HANG_S, "s")
    report.note("expert hangs", "streams that moved", len(moved))
    report.note("expert hangs", "their silence, longest", max(gaps_s), "s")
    assert max(gaps_s) < HANG_S


async def test_a_cut_connection_costs_no_word(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    moments_s: list[float] = []
    connections = 0
    async with loaded(cluster, asking, texts) as answers:
        routers = await cluster.replicas("Router")
        for one in await cluster.replicas("Drafter", "Expert"):
            moments_s.append(time.monotonic())
            connections += cut(one, routers)
            await asyncio.sleep(3)
    gap_s = max(gap for moment_s in moments_s for gap in silences(answers, moment_s))
    report.note("gRPC cut", "connections cut", connections)
    report.note("gRPC cut", "silence of a stream, longest", gap_s, "s")
    report.note("gRPC cut", "silence before, longest", usual(answers, moments_s[0]), "s")
    assert connections >= len(moments_s)
    assert gap_s <= 1 + 2 * usual(answers, moments_s[0])


async def test_slow_replicas_slow_streams_and_change_no_word(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, asking, texts) as answers:
        slow = [(await cluster.replicas(name))[0] for name in ("Drafter", "Expert")]
        moment_s = time.monotonic()
        async with slowed(slow[0], share=SLOW), slowed(slow[1], share=SLOW):
            await asyncio.sleep(20)
    gap_s = max(silences(answers, moment_s, for_s=20))
    report.note("slow replicas", "share of their speed", SLOW)
    report.note("slow replicas", "silence of a stream, longest", gap_s, "s")
    assert gap_s < 10


async def test_a_nodes_streams_resume_when_ray_finds_it_gone(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    async with loaded(cluster, asking, texts) as answers:
        moment_s = time.monotonic()
        await cluster.remove_node(cluster.nodes[0])
        await asyncio.sleep(10)
    moved = [one for one in answers if any("lost" in cause for cause in one.causes)]
    gap_s = max(silences(moved, moment_s))
    report.note("node removed", "streams that moved", len(moved))
    report.note("node removed", "their silence, longest", gap_s, "s")
    assert gap_s < DETECTED_S


async def test_without_experts_streams_wait_and_then_end_with_an_error(
    cluster: Ground, asking: Clients, texts: dict[str, str], report: Report
) -> None:
    """Neither hangs: those in flight resume or say why not, new ones are told to come again."""
    before = await burdens(cluster)
    bodies = [json.loads(name) for name in texts]
    async with streams(asking, bodies, count=STREAMS) as answers:
        await asyncio.sleep(WARM_S)
        dead = await cluster.replicas("Expert")
        moment_s = time.monotonic()
        for one in dead:
            kill(one)
        back_s = await back(cluster, "Expert", dead)
        await asyncio.sleep(WARM_S)
    ends = Counter(end_of(one, texts) for one in answers)
    report.note("experts killed", "time without experts", back_s - moment_s, "s")
    for what, count in ends.items():
        report.note("experts killed", f"streams that {what}", count)
    assert ends["ended with their text"] > 0
    await assert_no_leaks(cluster, before)


def end_of(one: Answer, texts: dict[str, str]) -> str:
    """Return how a stream ended, which must be one of three ways."""
    assert not one.broken, one.broken
    assert texts[key(one.asked)].startswith(one.text)
    if one.done:
        assert one.text == texts[key(one.asked)]
        return "ended with their text"
    if one.status == 200:
        assert one.error in {"expert_unavailable", "overloaded"}, one.error
        return "ended with a clean error"
    assert one.status in {429, 503}, (one.status, one.error)
    assert one.retry_after
    return "were refused, to come again"


def usual(answers: list[Answer], moment_s: float) -> float:
    """Return the longest silence shortly before a moment: what this machine does to any stream."""
    pairs = [pair for one in answers for pair in itertools.pairwise(one.heard_s)]
    return max((b - a for a, b in pairs if moment_s - WARM_S < a and b < moment_s), default=0.0)
