"""New `args` while streams are open: with two replicas of each part, and with one and a spare."""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
from tests.chaos.checks import assert_exact, assert_no_leaks, process_resources
from tests.chaos.cluster import SETTLE_S, TIERS, config, wait_until
from tests.chaos.faults import lower_priority
from tests.chaos.grpc_load import open_grpc_clients
from tests.chaos.load import references, request_bodies, streams
from tests.chaos.test_changes import pids, serve_deploy

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.chaos.cluster import ChaosCluster, Config
    from tests.chaos.load import Answer, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]

OVER_HTTP, OVER_GRPC = 12, 4
PAUSE_S = 3.0  # between two changes


@asynccontextmanager
async def both_doors(
    cluster: ChaosCluster, clients: Clients, bodies: list[dict[str, object]]
) -> AsyncGenerator[list[Answer]]:
    """Keep sixteen streams open; yield the answers when all have ended."""
    answers: list[Answer] = []
    async with open_grpc_clients(f"127.0.0.1:{cluster.grpc}") as grpc_clients:
        async with (
            streams(clients, bodies, count=OVER_HTTP) as over_http,
            streams(grpc_clients, bodies, count=OVER_GRPC) as over_grpc,
        ):
            yield answers
        answers += over_http + over_grpc


def upgraded(old: Config) -> Config:
    """Return settings that replace every replica, and change no answer."""
    new = deepcopy(old)
    args = new["applications"][0]["args"]
    args["limits"] = {"choices": 8}
    for name in ("drafter", "expert"):
        args[name]["idle_timeout_s"] = 90
    return new


@pytest.mark.parametrize("count", [2, 1], ids=["two of each", "one and a spare"])
async def test_an_upgrade_and_its_rollback_lose_no_stream(
    cluster: ChaosCluster,
    clients: Clients,
    report: Report,
    tmp_path: Path,
    count: int,
) -> None:
    counts = dict.fromkeys(TIERS, count)
    # Two are as many as there is room for; one starts its successor first, by default.
    options = dict.fromkeys(TIERS, {"max_surge_percent": 0} if count > 1 else {})
    await cluster.deploy(config(http=cluster.http, counts=counts, options=options))
    old = cluster.deployed
    bodies = request_bodies(tokens=64)
    texts = await references(clients, bodies)
    before = await process_resources(cluster)
    scenario = f"upgrade with {count} of each"
    async with both_doors(cluster, clients, bodies) as answers:
        await asyncio.sleep(PAUSE_S)
        for what, new in (("upgraded", upgraded(old)), ("rolled back", old)):
            lower_priority(await cluster.replicas())
            seen, began_s = await pids(cluster), time.monotonic()
            await serve_deploy(cluster, new, tmp_path)
            report.add(scenario, f"{what} after", time.monotonic() - began_s, "s")
            now = await pids(cluster)
            assert not any(now[name] & seen[name] for name in TIERS), "every replica is new"
            await asyncio.sleep(PAUSE_S)
    assert_exact(answers, texts)
    report.add(scenario, "streams that ended with their text", len(answers))
    report.add(scenario, "longest gap", max(one.gap_s for one in answers), "s")
    await assert_no_leaks(cluster, before)


async def test_a_version_whose_expert_cannot_start_keeps_the_old_one_and_is_rolled_back(
    cluster: ChaosCluster, clients: Clients, report: Report, tmp_path: Path
) -> None:
    """It wants a GPU. Other parts are replaced twice meanwhile; answers stay the same."""
    await cluster.deploy(config(http=cluster.http, counts=dict.fromkeys(TIERS, 1)))
    old = cluster.deployed
    bodies = request_bodies(tokens=64)
    texts = await references(clients, bodies)
    lower_priority(await cluster.replicas())
    seen = await pids(cluster)
    wrong = deepcopy(old)
    wrong["applications"][0]["args"]["expert"]["engine"]["device"] = "cuda"

    async def failed() -> bool:
        application = (await cluster.serve_status())["applications"]["cascade"]
        return "failed" in str(application["deployments"].get("Expert", {}).get("message"))

    async with both_doors(cluster, clients, bodies) as answers:
        await cluster.put(wrong)
        await wait_until(failed, "the new expert to fail", timeout_s=SETTLE_S)
        assert seen["Expert"] == (await pids(cluster))["Expert"]
        await serve_deploy(cluster, old, tmp_path)
        assert seen["Expert"] == (await pids(cluster))["Expert"]
    assert_exact(answers, texts)
    report.add("a version that cannot start", "streams that ended with their text", len(answers))
