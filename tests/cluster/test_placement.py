"""The tiers of `production.yaml` land where they belong, on a cluster of several nodes."""

from __future__ import annotations

import time
from collections import Counter
from copy import deepcopy
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import ray
from ray import serve
from ray.cluster_utils import Cluster
from tests.cluster.test_yaml import CONFIGS

from cascade.app import build
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Iterator

JOIN_S = 120.0
LIMIT_S = 400.0
SMALL = 80 * 2**20  # bytes of a node's object store


def on_a_cpu(config: dict[str, Any], *, expert_gpus: int) -> Application:
    """Return the application of a configuration with the pair that ships, which needs no GPU."""
    args: dict[str, Any] = deepcopy(config["applications"][0]["args"])
    for tier in ("drafter", "expert"):
        args[tier] |= {"model": "demo", "bind_host": "127.0.0.1", "scaling": None}
        args[tier]["engine"] = {"device": "cpu", "threads": 1, "cache_tokens": 4096}
        args[tier]["deployment"]["ray_actor_options"]["num_cpus"] = 0.1
    args["drafter"]["deployment"]["num_replicas"] = 3
    args["expert"]["deployment"]["ray_actor_options"]["num_gpus"] = expert_gpus
    args["router"]["deployment"] = {"ray_actor_options": {"num_cpus": 0.1}}
    return Application.model_validate(args)


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, str]]:
    """A head, a node with a small GPU and one with two large ones: the name of each raylet."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets want it short
    monkeypatch.setenv("RAY_TMPDIR", folder.name)  # or others' `ray.init()` would find this one
    common: dict[str, Any] = {"num_cpus": 1, "object_store_memory": SMALL}
    head = common | {"num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        common["wait"] = False
        small = cluster.add_node(**common, num_gpus=1, resources={"accelerator_type:L4": 1})
        large = cluster.add_node(**common, num_gpus=2, resources={"accelerator_type:H100": 2})
        cluster.wait_for_nodes(timeout=JOIN_S)
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="Disabled")
        yield {
            node.all_processes["raylet"][0].process.pid: name  # pyright: ignore[reportOptionalMemberAccess] - they run
            for name, node in (("head", cluster.head_node), ("small", small), ("large", large))
        }
        serve.shutdown()
    finally:
        ray.shutdown()  # a driver's own node cannot be removed under it
        cluster.shutdown()
        folder.cleanup()


def replicas(raylets: dict[int, str]) -> Counter[tuple[str, str]]:
    """Return how many replicas of each deployment run on each node."""
    found = Counter[tuple[str, str]]()
    for process in psutil.process_iter(["name", "ppid", "cmdline"]):
        title = " ".join(process.info["cmdline"] or ())
        node = raylets.get(process.info["ppid"])
        if node is not None and title.startswith("ray::ServeReplica:cascade:"):
            found[title.split(":")[4].split(".")[0].strip(), node] += 1  # titles are padded
    return found


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_drafters_share_the_small_gpu_and_the_expert_takes_both_large_ones(
    nodes: dict[int, str],
) -> None:
    settings = on_a_cpu(CONFIGS["production.yaml"], expert_gpus=2)
    serve.run(build(settings), name="cascade", route_prefix="/", blocking=False)
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        deployments = serve.status().applications["cascade"].deployments
        if all(one.status.value == "HEALTHY" for one in deployments.values()):
            break
        time.sleep(1)
    where = replicas(nodes)
    assert where["Drafter", "small"] == 3
    assert where["Expert", "large"] == 1
    assert sum(where.values()) == 5
    assert ray.available_resources()["GPU"] == pytest.approx(0.25)  # of the small node's one
