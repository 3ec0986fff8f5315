"""`serve deploy` with other replica counts or settings, while streams are open."""

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
from tests.chaos.checks import assert_exact, assert_no_leaks, process_resources
from tests.chaos.cluster import TIERS, config
from tests.chaos.faults import lower_priority
from tests.chaos.load import references, request_bodies, streams

if TYPE_CHECKING:
    from tests.chaos.cluster import ChaosCluster, Config
    from tests.chaos.load import Answer, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]

STREAMS = 12
PAUSE_S = 3.0  # between two changes


async def pids(cluster: ChaosCluster) -> dict[str, set[int]]:
    return {name: {one.pid for one in await cluster.replicas(name)} for name in TIERS}


async def serve_deploy(cluster: ChaosCluster, new: Config, folder: Path) -> None:
    """Deploy with the command line, as an operator does."""
    path = folder / "changed.yaml"
    path.write_text(yaml.safe_dump(new))
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
    cluster.deployed = new
    await cluster.settled()


def with_count(new: Config, name: str, count: int) -> Config:
    changed = deepcopy(new)
    for one in changed["applications"][0]["deployments"]:
        if one["name"] == name:
            one["num_replicas"] = count
    return changed


async def test_other_replica_counts_break_no_stream_and_replace_no_other_tier(
    cluster: ChaosCluster, clients: Clients, report: Report, tmp_path: Path
) -> None:
    """Each tier goes from one replica to two and back, by Serve options alone."""
    counts = dict.fromkeys(TIERS, 1)
    await cluster.deploy(config(http=cluster.http, counts=counts))
    bodies = request_bodies(tokens=96)
    texts = await references(clients, bodies)
    before = await process_resources(cluster)
    lower_priority(await cluster.replicas())
    async with streams(clients, bodies, count=STREAMS) as answers:
        for name in TIERS:
            for count in (2, 1):
                old = await pids(cluster)
                began_s = time.monotonic()
                await serve_deploy(cluster, with_count(cluster.deployed, name, count), tmp_path)
                what = f"{name}: {3 - count} to {count} replicas, until settled"
                report.add("other counts", what, time.monotonic() - began_s, "s")
                now = await pids(cluster)
                assert len(now[name]) == count
                assert now[name] & old[name], "the tier keeps the replicas that it need not stop"
                assert all(now[other] == old[other] for other in TIERS if other != name)
                await asyncio.sleep(PAUSE_S)
    check(answers, texts, report, "other counts")
    await assert_no_leaks(cluster, before)


async def test_a_rolling_update_breaks_no_stream(
    cluster: ChaosCluster, clients: Clients, report: Report, tmp_path: Path
) -> None:
    """A change under `args` replaces every replica; each finishes its sessions first."""
    counts = dict.fromkeys(TIERS, 2)
    await cluster.deploy(config(http=cluster.http, counts=counts))
    bodies = request_bodies(tokens=96)
    texts = await references(clients, bodies)
    before, old = await process_resources(cluster), await pids(cluster)
    lower_priority(await cluster.replicas())
    changed = deepcopy(cluster.deployed)
    args = changed["applications"][0]["args"]
    args["limits"] = {"choices": 8}
    for name in ("drafter", "expert"):
        args[name]["idle_timeout_s"] = 90
    async with streams(clients, bodies, count=STREAMS) as answers:
        await asyncio.sleep(PAUSE_S)
        began_s = time.monotonic()
        await serve_deploy(cluster, changed, tmp_path)
        report.add("rolling update", "all six replaced after", time.monotonic() - began_s, "s")
        now = await pids(cluster)
        await asyncio.sleep(PAUSE_S)
    assert not any(now[name] & old[name] for name in TIERS), "every replica is new"
    check(answers, texts, report, "rolling update")
    await assert_no_leaks(cluster, before)


def check(answers: list[Answer], texts: dict[str, str], report: Report, scenario: str) -> None:
    assert_exact(answers, texts)
    report.add(scenario, "streams that ended with their text", len(answers))
    report.add(scenario, "longest gap", max(one.gap_s for one in answers), "s")
