"""`serve deploy` with other counts or another version, while streams are open."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from tests.chaos.checks import assert_exact, assert_no_leaks, burdens
from tests.chaos.cluster import TIERS, config
from tests.chaos.harm import give_way
from tests.chaos.load import questions, references, streams

if TYPE_CHECKING:
    from tests.chaos.cluster import Config, Ground
    from tests.chaos.load import Answer, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]

STREAMS = 12
LONG_S = 3.0  # between a change and the next


async def pids(cluster: Ground) -> dict[str, set[int]]:
    return {name: {one.pid for one in await cluster.replicas(name)} for name in TIERS}


async def serve_deploy(cluster: Ground, wanted: Config, folder: Path) -> None:
    """Do as an operator does."""
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(wanted))
    command = [str(Path(sys.executable).with_name("serve")), "deploy", "-a", cluster.dashboard]
    run = await asyncio.to_thread(
        subprocess.run,
        [*command, str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "RAY_AUTH_MODE": "disabled"},
    )
    assert run.returncode == 0, run.stderr
    cluster.deployed = wanted
    await cluster.settled()


def with_count(wanted: Config, name: str, count: int) -> Config:
    changed = deepcopy(wanted)
    for one in changed["applications"][0]["deployments"]:
        if one["name"] == name:
            one["num_replicas"] = count
    return changed


async def test_other_counts_lose_no_stream_and_touch_no_other_tier(
    cluster: Ground, asking: Clients, report: Report, tmp_path: Path
) -> None:
    """Each tier goes from one replica to two and back, by the list beside `args`."""
    counts = dict.fromkeys(TIERS, 1)
    await cluster.deploy(config(http=cluster.http, counts=counts))
    bodies = questions(tokens=96)
    texts = await references(asking, bodies)
    before = await burdens(cluster)
    give_way(await cluster.replicas())
    async with streams(asking, bodies, count=STREAMS) as answers:
        for name in TIERS:
            for count in (2, 1):
                old = await pids(cluster)
                began_s = time.monotonic()
                await serve_deploy(cluster, with_count(cluster.deployed, name, count), tmp_path)
                what = f"{name}: {3 - count} to {count} replicas, until settled"
                report.note("other counts", what, time.monotonic() - began_s, "s")
                now = await pids(cluster)
                assert len(now[name]) == count
                assert now[name] & old[name], "the tier keeps the replicas that it need not end"
                assert all(now[other] == old[other] for other in TIERS if other != name)
                await asyncio.sleep(LONG_S)
    check(answers, texts, report, "other counts")
    await assert_no_leaks(cluster, before)


async def test_a_rolling_update_loses_no_stream(
    cluster: Ground, asking: Clients, report: Report, tmp_path: Path
) -> None:
    """A change under `args` replaces every replica; each finishes its sessions first."""
    counts = dict.fromkeys(TIERS, 2)
    await cluster.deploy(config(http=cluster.http, counts=counts))
    bodies = questions(tokens=96)
    texts = await references(asking, bodies)
    before, old = await burdens(cluster), await pids(cluster)
    give_way(await cluster.replicas())
    changed = deepcopy(cluster.deployed)
    args = changed["applications"][0]["args"]
    args["limits"] = {"choices": 8}
    for name in ("drafter", "expert"):
        args[name]["idle_timeout_s"] = 90
    async with streams(asking, bodies, count=STREAMS) as answers:
        await asyncio.sleep(LONG_S)
        began_s = time.monotonic()
        await serve_deploy(cluster, changed, tmp_path)
        report.note("rolling update", "all six replaced after", time.monotonic() - began_s, "s")
        now = await pids(cluster)
        await asyncio.sleep(LONG_S)
    assert not any(now[name] & old[name] for name in TIERS), "every replica is new"
    check(answers, texts, report, "rolling update")
    await assert_no_leaks(cluster, before)


def check(answers: list[Answer], texts: dict[str, str], report: Report, scenario: str) -> None:
    assert_exact(answers, texts)
    report.note(scenario, "streams that ended with their text", len(answers))
    report.note(scenario, "longest silence", max(one.gap_s for one in answers), "s")
