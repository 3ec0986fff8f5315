"""Replicas of every tier are killed repeatedly while many streams are open."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import pytest
from tests.chaos.checks import assert_exact, assert_no_leaks, process_resources
from tests.chaos.cluster import APART, config, wait_until
from tests.chaos.conftest import KILLS, LONGEST_S, STREAMS
from tests.chaos.faults import kill, lower_priority
from tests.chaos.load import key, references, request_bodies, streams
from tests.chaos.report import quantile

if TYPE_CHECKING:
    from tests.chaos.cluster import ChaosCluster
    from tests.chaos.load import Answer, Clients
    from tests.chaos.report import Report

TOKENS = 32
START_TIMEOUT_S = 900.0  # for a replica to start while all others are busy
COUNTS = {"Drafter": 2, "Expert": 2, "Router": 2}


async def kill_repeatedly(cluster: ChaosCluster, tier: str, *, kills: int) -> list[float]:
    """Kill replicas of a tier, one whenever all run; return how long each took to be replaced.

    Stops after `LONGEST_S` seconds, perhaps with fewer kills; the report has their number.
    """
    rng, missing_s = random.Random(tier), list[float]()  # noqa: S311 - which one dies is no secret
    count = COUNTS[tier]
    dead: set[str] = set()

    async def all_there() -> bool:
        alive = {one.name for one in await cluster.replicas(tier)} - dead
        return len(alive) >= count

    end_s = time.monotonic() + LONGEST_S
    while len(missing_s) < kills and time.monotonic() < end_s:
        await wait_until(all_there, f"{count} of {tier}", timeout_s=START_TIMEOUT_S, every_s=0.5)
        victim = rng.choice([one for one in await cluster.replicas(tier) if one.name not in dead])
        dead.add(victim.name)
        kill(victim)
        missing_s.append(
            await wait_until(all_there, f"another {tier}", timeout_s=START_TIMEOUT_S, every_s=0.5)
        )
        lower_priority(await cluster.replicas(tier))
    return missing_s


def failed_over(answers: list[Answer], tier: str) -> list[Answer]:
    return [one for one in answers if any(cause.startswith(tier) for cause in one.causes)]


@pytest.mark.chaos
@pytest.mark.timeout(3600)
async def test_killed_drafters_and_experts_change_no_text(
    cluster: ChaosCluster, clients: Clients, report: Report
) -> None:
    await cluster.deploy(config(http=cluster.http, counts=COUNTS, options=APART))
    lower_priority(await cluster.replicas())
    bodies = request_bodies(tokens=TOKENS)
    texts = await references(clients, bodies)
    before = await process_resources(cluster)
    began_s = time.monotonic()
    async with streams(clients, bodies, count=STREAMS) as answers:
        missing_s = dict(
            zip(
                ("Drafter", "Expert"),
                await asyncio.gather(
                    kill_repeatedly(cluster, "Drafter", kills=KILLS),
                    kill_repeatedly(cluster, "Expert", kills=KILLS),
                ),
                strict=True,
            )
        )
    assert_exact(answers, texts)
    await assert_no_leaks(cluster, before)
    add = report.add
    add("storm", "streams open at once", clients.most)
    add("storm", "streams that ended, each with its exact text", len(answers))
    add("storm", "lasted", time.monotonic() - began_s, "s")
    for tier, times_s in missing_s.items():
        hit = failed_over(answers, tier.lower())
        gaps_s = [one.gap_s for one in hit]
        add("storm", f"kills of {tier}", len(times_s))
        add("storm", f"{tier} back, median", quantile(times_s, 0.5), "s")
        add("storm", f"streams that lost a {tier}", len(hit))
        add("storm", "their longest gap, median", quantile(gaps_s, 0.5), "s")
        add("storm", "their longest gap, p95", quantile(gaps_s, 0.95), "s")
    others_s = [one.gap_s for one in answers if not one.causes]
    add("storm", "longest gap of the others, median", quantile(others_s, 0.5), "s")
    add("storm", "longest gap of the others, p95", quantile(others_s, 0.95), "s")


@pytest.mark.chaos
@pytest.mark.timeout(3600)
async def test_killed_routers_close_their_streams_and_leak_nothing(
    cluster: ChaosCluster, clients: Clients, report: Report
) -> None:
    """Their clients see a closed stream; other streams, and new requests, get the exact text."""
    await cluster.deploy(config(http=cluster.http, counts=COUNTS, options=APART))
    lower_priority(await cluster.replicas())
    bodies = request_bodies(tokens=TOKENS)
    texts = await references(clients, bodies)
    before = await process_resources(cluster)
    async with streams(clients, bodies, count=STREAMS) as answers:
        missing_s = await kill_repeatedly(cluster, "Router", kills=KILLS)
    complete = [one for one in answers if one.done]
    closed = [one for one in answers if one.broken]
    assert_exact(complete, texts)
    for one in closed:
        assert "hung" not in one.broken
        assert texts[key(one.body)].startswith(one.text), one.text
    assert_exact([await clients.complete(body) for body in bodies], texts)
    await assert_no_leaks(cluster, before)
    report.add("router storm", "streams open at once", clients.most)
    report.add("router storm", "kills of Router", len(missing_s))
    report.add("router storm", "Router back, median", quantile(missing_s, 0.5), "s")
    report.add("router storm", "streams that ended, each with its exact text", len(complete))
    report.add("router storm", "streams that closed, each with its beginning", len(closed))
    others = len(answers) - len(complete) - len(closed)
    report.add("router storm", "refused or ended by an error event", others)
