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

import httpx
import pytest
import trustme
import yaml
from tests.chaos.checks import assert_exact, assert_no_leaks, process_resources
from tests.chaos.cluster import TIERS, Config, config, wait_until
from tests.chaos.faults import lower_priority
from tests.chaos.load import open_clients, references, request_bodies, streams
from tests.support.certificates import write_certificate

from cascade.api.keys import ApiKey, as_yaml, hash_of
from cascade.protocol.tls import ROLES, role_name

if TYPE_CHECKING:
    from tests.chaos.cluster import ChaosCluster
    from tests.chaos.load import Answer, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]

STREAMS = 16
PROMPT = "Who is Buzz Aldrin?"
LENIENT: Config = {
    "kind": "token_v3",
    "alpha": 0.99,
}  # keeps drafts that the expert would not write
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


async def test_certificates_keys_rule_and_limits_change_without_a_restart(
    cluster: ChaosCluster, report: Report, tmp_path: Path
) -> None:
    """Connections made after the change use the new certificates: those to a second expert."""
    ca, successor = trustme.CA(), trustme.CA()
    names = [role_name(role) for role in ROLES]
    files = write_certificate(tmp_path / "tls", ca, *names)
    keys = tmp_path / "keys.yaml"
    keys.write_text(entries("mine", "goes"))
    args = {
        "tls": {"ca": files.ca, "certificate": files.certificate, "key": files.key},
        "api_keys_file": str(keys),
    }
    counts = dict.fromkeys(TIERS, 1)
    await cluster.deploy(config(http=cluster.http, counts=counts, args=args))
    bodies = request_bodies(tokens=96)
    async with open_clients(cluster.url, key="mine") as clients:
        texts = await references(clients, bodies)
        lossless, lenient = await asked(cluster, {}), await asked(cluster, {"rule": LENIENT})
        assert lossless != lenient
        old = await pids(cluster)
        lower_priority(await cluster.replicas())
        async with streams(clients, bodies, count=STREAMS) as answers:
            await asyncio.sleep(PAUSE_S)
            # Both authorities are trusted while certificates of both are in use.
            both = ca.cert_pem.bytes() + successor.cert_pem.bytes()
            write_certificate(tmp_path / "tls", successor, *names)
            (tmp_path / "tls" / "ca.pem").write_bytes(both)
            await serve_deploy(cluster, with_count(cluster.deployed, "Expert", 2), tmp_path)
            keys.write_text(entries("mine", "comes"))
            assert await status(cluster, "goes") == 401
            assert await status(cluster, "comes") == 200
            assert await status(cluster, "comes", choices=16) == 200
            changed = {"limits": {"choices": 2}, "defaults": {"rule": LENIENT}}
            await serve_deploy(cluster, with_user_config(cluster.deployed, changed), tmp_path)
            await wait_until(lambda: refused(cluster, choices=3), "the new limit")
            assert await asked(cluster, {}) == lenient
            await serve_deploy(cluster, with_user_config(cluster.deployed, {}), tmp_path)
            await wait_until(lambda: allowed(cluster, choices=3), "the old limit")
            assert await asked(cluster, {}) == lossless
            await asyncio.sleep(PAUSE_S)
        now = await pids(cluster)
        assert all(old[name] <= now[name] for name in TIERS), "no replica started anew"
        check(answers, texts, report, "certificates, keys and settings")


def entries(*names: str) -> str:
    """Return a file of keys, each named like itself."""
    return "".join(as_yaml(ApiKey(name=name, sha256=hash_of(name))) for name in names)


def with_user_config(new: Config, user_config: Config) -> Config:
    changed = deepcopy(new)
    for one in changed["applications"][0]["deployments"]:
        if one["name"] == "Router":
            one["user_config"] = user_config
    return changed


async def asked(cluster: ChaosCluster, options: Config) -> str:
    """Return an answer whose text shows its rule, however long drafts take."""
    options = {"draft_tokens": 4, "on_drafter_loss": "wait", **options}
    body = {"prompt": PROMPT, "max_tokens": 48, "temperature": 0, "cascade": options}
    async with httpx.AsyncClient(base_url=cluster.url, timeout=300) as client:
        headers = {"authorization": "Bearer mine"}
        response = await client.post("/v1/completions", json=body, headers=headers)
        return response.raise_for_status().json()["choices"][0]["text"]


async def status(cluster: ChaosCluster, key: str, *, choices: int = 1) -> int:
    body = {"prompt": "x", "max_tokens": 1, "n": choices}
    async with httpx.AsyncClient(base_url=cluster.url, timeout=120) as client:
        headers = {"authorization": f"Bearer {key}"}
        return (await client.post("/v1/completions", json=body, headers=headers)).status_code


async def refused(cluster: ChaosCluster, *, choices: int) -> bool:
    return await status(cluster, "mine", choices=choices) == 400


async def allowed(cluster: ChaosCluster, *, choices: int) -> bool:
    return await status(cluster, "mine", choices=choices) == 200


def check(answers: list[Answer], texts: dict[str, str], report: Report, scenario: str) -> None:
    assert_exact(answers, texts)
    report.add(scenario, "streams that ended with their text", len(answers))
    report.add(scenario, "longest gap", max(one.gap_s for one in answers), "s")
