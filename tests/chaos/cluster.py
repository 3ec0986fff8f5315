"""A Ray cluster of several nodes on one machine, with the application on it."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import time
from contextlib import asynccontextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from unittest import mock

import httpx
import psutil
import ray
import yaml
from ray import serve
from ray.cluster_utils import Cluster

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Mapping

ROOT = Path(__file__).parents[2]
TIERS: tuple[str, ...] = ("Drafter", "Expert", "Router")
SETTLE_S = 600.0  # for replicas to start on a busy machine
STORE_BYTES = 80 * 2**20  # of a node's object store
SLOTS = 4  # for replicas of each tier on a node

Config = dict[str, Any]

# Two hundred streams on two cores take minutes: no timeout may end one.
LONG_TIMEOUTS: Config = {"max_generation_s": 3000, "lease_timeout_s": 120, "draft_deadline_s": 1}
APART: Config = {name: {"max_replicas_per_node": 1} for name in ("Drafter", "Expert")}


@dataclass(frozen=True, kw_only=True)
class Replica:
    """A replica as Serve's controller reports it."""

    tier: str
    name: str
    pid: int
    node: str
    state: str


def free_port() -> int:
    """Return a port that is free, and that no connection and no worker of Ray is given later."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(20_000, 32_000)))  # noqa: S311 - any will do
            return probe.getsockname()[1]


def merged(base: Mapping[str, Any], more: Mapping[str, Any]) -> Config:
    """Return a configuration with some values replaced."""
    tree = dict(base)
    for key, value in more.items():
        old = tree.get(key, {})
        tree[key] = merged(old, value) if isinstance(value, dict) else value
    return tree


def tier(name: str) -> Config:
    """Return a tier's settings; the expert's results do not depend on the batch."""
    return {
        "model": "demo",
        "bind_host": "127.0.0.1",
        "engine": {"threads": 1, "cache_tokens": 65536, "deterministic": name == "expert"},
        "deployment": deployment(name, sessions=512),
        "idle_timeout_s": 600,
    }


def deployment(name: str, *, sessions: int) -> Config:
    """Return where a tier's replicas run, and how many sessions each accepts."""
    return {
        "max_ongoing_requests": sessions,
        "ray_actor_options": {"num_cpus": 0, "resources": {name: 1}},
        "health_check_period_s": 2,
    }


def config(
    *,
    http: int,
    counts: Mapping[str, int],
    options: Mapping[str, Config] | None = None,
    args: Mapping[str, Any] | None = None,
) -> Config:
    """Return what `serve deploy` takes: `local.yaml` spread over nodes.

    Args:
        http: Port of the HTTP API.
        counts: Replicas by deployment; others keep their own settings.
        options: More Serve options by deployment; changing them replaces no replica.
        args: Merged into the application's settings.
    """
    chosen: Config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    chosen["http_options"]["port"] = http
    base = {
        "drafter": tier("drafter"),
        "expert": tier("expert"),
        "router": LONG_TIMEOUTS | {"deployment": deployment("router", sessions=1024)},
    }
    application = chosen["applications"][0]
    application["args"] = merged(base, args or {})
    application["deployments"] = [
        {"name": name, "num_replicas": count, **(options or {}).get(name, {})}
        for name, count in counts.items()
    ]
    return chosen


@dataclass(kw_only=True)
class ChaosCluster:
    """A head node for routers and proxies, and nodes for the two tiers."""

    cluster: Cluster
    http: int
    grpc: int
    dashboard: str
    deployed: Config = field(default_factory=dict)
    nodes: list[Any] = field(default_factory=list)
    _client: httpx.AsyncClient = field(default_factory=lambda: httpx.AsyncClient(timeout=60))

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    async def add_node(self) -> Any:
        """Start a node for some replicas of both tiers; blocks the event loop."""
        resources = {"drafter": SLOTS, "expert": SLOTS}
        node = self.cluster.add_node(
            wait=False,
            num_cpus=0,
            resources=resources,
            object_store_memory=STORE_BYTES,
        )
        self.nodes.append(node)
        await wait_until(lambda: self._alive() == len(self.nodes) + 1, "the node to join")
        return node

    async def remove_node(self, node: Any) -> None:
        """Kill every process of a node, as when its machine loses power."""
        self.nodes.remove(node)
        raylet = node.all_processes["raylet"][0].process
        for process in [*psutil.Process(raylet.pid).children(recursive=True), raylet]:
            with suppress(psutil.NoSuchProcess, ProcessLookupError):
                process.send_signal(signal.SIGKILL)
        await asyncio.to_thread(self.cluster.remove_node, node, allow_graceful=False)

    def _alive(self) -> int:
        return sum(one["Alive"] for one in ray.nodes())

    async def deploy(self, new: Config) -> None:
        """Do what `serve deploy` does, if anything changed, and wait until all of it runs.

        Serve takes ports with the first configuration only, so each has that of gRPC.
        """
        other = yaml.safe_load((ROOT / "cluster" / "cluster.yaml").read_text())
        new = new | {"grpc_options": other["grpc_options"] | {"port": self.grpc}}
        if new != self.deployed:
            self.deployed = deepcopy(new)
            await self.put(new)
        await self.settled()

    async def put(self, new: Config) -> None:
        """Do what `serve deploy` does."""
        response = await self._client.put(f"{self.dashboard}/api/serve/applications/", json=new)
        assert response.is_success, response.text

    async def scale(self, **counts: int) -> None:
        """Deploy other replica counts."""
        new = deepcopy(self.deployed)
        for one in new["applications"][0]["deployments"]:
            one["num_replicas"] = counts.get(one["name"], one["num_replicas"])
        await self.deploy(new)

    async def settled(self) -> None:
        """Wait until every replica runs and the HTTP API answers."""
        await wait_until(self._is_settled, "the application to run", timeout_s=SETTLE_S)

    async def _is_settled(self) -> bool:
        with suppress(httpx.TransportError, KeyError):
            application = (await self.serve_status())["applications"]["cascade"]
            running = application["status"] == "RUNNING"
            counts = all(
                len(one["replicas"]) == one["target_num_replicas"]
                and all(replica["state"] == "RUNNING" for replica in one["replicas"])
                for one in application["deployments"].values()
            )
            return running and counts and (await self._client.get(f"{self.url}/health")).is_success
        return False

    async def serve_status(self) -> Config:
        """Return the state of Serve from the dashboard."""
        response = await self._client.get(f"{self.dashboard}/api/serve/applications/")
        return response.json()

    async def replicas(self, *tiers: str, state: str = "RUNNING") -> list[Replica]:
        """Return the replicas of some tiers, of all if none is named."""
        deployments = (await self.serve_status())["applications"]["cascade"]["deployments"]
        return [
            Replica(
                tier=name,
                name=one["replica_id"],
                pid=one.get("pid") or 0,
                node=one.get("node_id") or "",
                state=one["state"],
            )
            for name in tiers or TIERS
            for one in deployments[name]["replicas"]
            if one["state"] == state and one.get("pid")
        ]

    async def debug_state(self, name: str) -> list[dict[str, int]]:
        """Return the resource counts of every running replica of a tier, with its open files."""
        handle = serve.get_deployment_handle(name, "cascade")
        found = await handle.broadcast("debug_state").results_async(timeout_s=60)
        return [one | {"files": psutil.Process(one["pid"]).num_fds()} for one in found]

    async def cpu_seconds(self) -> dict[str, float]:
        """Return the CPU time of the running replicas of each tier, in seconds."""
        cpu_s = dict.fromkeys(TIERS, 0.0)
        for one in await self.replicas():
            times = psutil.Process(one.pid).cpu_times()
            cpu_s[one.tier] += times.user + times.system
        return cpu_s

    async def held(self) -> dict[str, int]:
        """Return what both tiers hold for sessions; all counts are 0 when none is open."""
        found = [one for name in ("Drafter", "Expert") for one in await self.debug_state(name)]
        return {
            name: sum(one[name] for one in found) for name in ("leases", "sessions", "cache_tokens")
        }

    async def close(self) -> None:
        await self._client.aclose()


async def wait_until(
    holds: Callable[[], Any], what: str, *, timeout_s: float = 120.0, every_s: float = 0.25
) -> float:
    """Poll until a condition holds; return how long it took, in seconds.

    Args:
        holds: The condition, a plain or an async function.
        what: Named in the TimeoutError.
        timeout_s: Longest wait, in seconds.
        every_s: Between polls, in seconds.
    """
    began_s = time.monotonic()
    while True:
        found = holds()
        if await found if asyncio.iscoroutine(found) else found:
            return time.monotonic() - began_s
        if time.monotonic() - began_s > timeout_s:
            raise TimeoutError(f"waited {timeout_s:g} s for {what}")
        await asyncio.sleep(every_s)


@asynccontextmanager
async def chaos_cluster(*, nodes: int) -> AsyncGenerator[ChaosCluster]:
    """Start a head and some nodes, with a folder and ports of their own; stop them at the end."""
    with TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True) as folder:
        patient = {"RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60"}  # the machine is busy
        variables = {"RAY_AUTH_MODE": "disabled", "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1"}
        variables |= patient
        with mock.patch.dict(os.environ, variables):
            os.environ.pop("RAY_ADDRESS", None)
            dashboard = free_port()
            head = {
                "num_cpus": 0,
                "resources": {"router": SLOTS},
                "object_store_memory": STORE_BYTES,
                "include_dashboard": True,
                "dashboard_port": dashboard,
                "gcs_server_port": free_port(),
                "dashboard_agent_listen_port": free_port(),
            }
            cluster = Cluster(initialize_head=True, head_node_args=head)
            try:
                ray.init(address=cluster.address, log_to_driver=False)
                made = ChaosCluster(
                    cluster=cluster,
                    http=free_port(),
                    grpc=free_port(),
                    dashboard=f"http://127.0.0.1:{dashboard}",
                )
                for _ in range(nodes):
                    await made.add_node()
                yield made
                await made.close()
                serve.shutdown()
            finally:
                ray.shutdown()
                cluster.shutdown()
