"""Replicas of every tier are killed, over and over, while many streams are open."""

from __future__ import annotations

import asyncio
import random
import time
from typing import TYPE_CHECKING

import pytest
from tests.chaos.checks import assert_exact, assert_no_leaks, burdens
from tests.chaos.cluster import APART, config, until
from tests.chaos.conftest import KILLS, LONGEST_S, STREAMS
from tests.chaos.harm import give_way, kill
from tests.chaos.load import key, questions, references, streams
from tests.chaos.report import quantile

if TYPE_CHECKING:
    from tests.chaos.cluster import Ground
    from tests.chaos.load import Answer, Clients
    from tests.chaos.report import Report

TOKENS = 32
PATIENCE_S = 900.0  # for one replica to start while all others are busy
COUNTS = {"Drafter": 2, "Expert": 2, "Router": 2}


async def reap(cluster: Ground, tier: str, *, kills: int) -> list[float]:
    """Kill replicas of a tier, one whenever all are there; return how long each was missed.

    Ends after `LONGEST_S` seconds with fewer kills, which the report then tells.
    """
    chance, missed_s = random.Random(tier), list[float]()  # noqa: S311 - which one dies is no secret
    wanted = COUNTS[tier]
    dead: set[str] = set()

    async def all_there() -> bool:
        alive = {one.name for one in await cluster.replicas(tier)} - dead
        return len(alive) >= wanted

    end_s = time.monotonic() + LONGEST_S
    while len(missed_s) < kills and time.monotonic() < end_s:
        await until(all_there, f"{wanted} of {tier}", timeout_s=PATIENCE_S, every_s=0.5)
        victim = chance.choice(
            [one for one in await cluster.replicas(tier) if one.name not in dead]
        )
        dead.add(victim.name)
        kill(victim)
        missed_s.append(
            await until(all_there, f"another {tier}", timeout_s=PATIENCE_S, every_s=0.5)
        )
        give_way(await cluster.replicas(tier))
    return missed_s


def failed_over(answers: list[Answer], tier: str) -> list[Answer]:
    return [one for one in answers if any(cause.startswith(tier) for cause in one.causes)]


@pytest.mark.chaos
@pytest.mark.timeout(3600)
async def test_killed_drafters_and_experts_change_no_word(
    cluster: Ground, asking: Clients, report: Report
) -> None:
    await cluster.deploy(config(http=cluster.http, counts=COUNTS, options=APART))
    give_way(await cluster.replicas())
    bodies = questions(tokens=TOKENS)
    texts = await references(asking, bodies)
    before = await burdens(cluster)
    began_s = time.monotonic()
    async with streams(asking, bodies, count=STREAMS) as answers:
        missed_s = dict(
            zip(
                ("Drafter", "Expert"),
                await asyncio.gather(
                    reap(cluster, "Drafter", kills=KILLS), reap(cluster, "Expert", kills=KILLS)
                ),
                strict=True,
            )
        )
    assert_exact(answers, texts)
    await assert_no_leaks(cluster, before)
    note = report.note
    note("storm", "streams open at once", asking.most)
    note("storm", "streams that ended, each with its exact text", len(answers))
    note("storm", "lasted", time.monotonic() - began_s, "s")
    for tier, times_s in missed_s.items():
        hit = failed_over(answers, tier.lower())
        gaps_s = [one.gap_s for one in hit]
        note("storm", f"kills of {tier}", len(times_s))
        note("storm", f"{tier} back, median", quantile(times_s, 0.5), "s")
        note("storm", f"streams that lost a {tier}", len(hit))
        note("storm", "their longest silence, median", quantile(gaps_s, 0.5), "s")
        note("storm", "their longest silence, p95", quantile(gaps_s, 0.95), "s")
    others_s = [one.gap_s for one in answers if not one.causes]
    note("storm", "longest silence of the others, median", quantile(others_s, 0.5), "s")
    note("storm", "longest silence of the others, p95", quantile(others_s, 0.95), "s")


@pytest.mark.chaos
@pytest.mark.timeout(3600)
async def test_killed_routers_close_their_streams_and_leave_nothing(
    cluster: Ground, asking: Clients, report: Report
) -> None:
    """A router's clients see their streams close; all others, and who asks again, hear the rest."""
    await cluster.deploy(config(http=cluster.http, counts=COUNTS, options=APART))
    give_way(await cluster.replicas())
    bodies = questions(tokens=TOKENS)
    texts = await references(asking, bodies)
    before = await burdens(cluster)
    async with streams(asking, bodies, count=STREAMS) as answers:
        missed_s = await reap(cluster, "Router", kills=KILLS)
    whole = [one for one in answers if one.done]
    closed = [one for one in answers if one.broken]
    assert_exact(whole, texts)
    for one in closed:
        assert "hung" not in one.broken
        assert texts[key(one.asked)].startswith(one.text), one.text
    assert_exact([await asking.ask(body) for body in bodies], texts)
    await assert_no_leaks(cluster, before)
    report.note("router storm", "streams open at once", asking.most)
    report.note("router storm", "kills of Router", len(missed_s))
    report.note("router storm", "Router back, median", quantile(missed_s, 0.5), "s")
    report.note("router storm", "streams that ended, each with its exact text", len(whole))
    report.note("router storm", "streams that closed, each with its beginning", len(closed))
    others = len(answers) - len(whole) - len(closed)
    report.note("router storm", "refused or ended by an error event", others)
