"""What the recipes of cluster/ promise of a real Ray: a token, a node that comes back, a drain."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
from tests.cluster.test_yaml import FOLDER
from typer.testing import CliRunner

from cascade.cli import app

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from pathlib import Path

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
BIN = os.path.dirname(sys.executable)  # noqa: PTH120 - not resolved, which would leave the venv
LIMIT_S = 100.0
SMALL = ["--object-store-memory", str(80 * 2**20)]
# Ray declares a node dead after seconds instead of a minute.
IMPATIENT = {"RAY_health_check_period_ms": "500", "RAY_health_check_failure_threshold": "4"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def until(found: Callable[[], Any], what: str) -> Any:
    """Return what is found, as soon as it is."""
    deadline_s = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline_s:
        if value := found():
            return value
        time.sleep(0.2)
    pytest.fail(f"{what} within {LIMIT_S:g} s")


class Head:
    """A head of its own, and nodes that join it, as the recipes start them."""

    def __init__(self, folder: str, environment: dict[str, str]) -> None:
        self.address = f"127.0.0.1:{free_port()}"
        self.dashboard = f"http://127.0.0.1:{free_port()}"
        self.environment = {
            name: value for name, value in os.environ.items() if not name.startswith("RAY_")
        } | {"PATH": f"{BIN}:/usr/bin:/bin", "RAY_TMPDIR": folder, **IMPATIENT, **environment}
        self.token = environment.get("RAY_AUTH_TOKEN")
        self.processes: list[subprocess.Popen[bytes]] = []

    def start(self, *options: str) -> subprocess.Popen[bytes]:
        """Run `ray start --block`, as the units of systemd do."""
        command = ["ray", "start", "--block", "--num-cpus", "1", *SMALL, *options]
        process = subprocess.Popen(  # noqa: S603 - our own command
            command,
            env=self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def get(self, path: str) -> Any:
        """Return what the dashboard answers, None while it does not."""
        headers = {"authorization": f"Bearer {self.token}"} if self.token else {}
        try:
            return httpx.get(self.dashboard + path, headers=headers, timeout=5).json()
        except (httpx.HTTPError, json.JSONDecodeError):
            return None

    def nodes(self, state: str) -> set[str]:
        """Return the ids of nodes in a state."""
        found = self.get("/nodes?view=summary") or {"data": {"summary": []}}
        return {
            one["raylet"]["nodeId"]
            for one in found["data"]["summary"]
            if one["raylet"].get("state") == state
        }


@contextmanager
def head(**environment: str) -> Generator[Head]:
    with TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True) as folder:
        made = Head(folder, environment)
        port, dashboard = (one.rpartition(":")[2] for one in (made.address, made.dashboard))
        try:
            made.start("--head", "--port", port, "--dashboard-port", dashboard)
            until(lambda: made.nodes("ALIVE"), "the head is there")
            yield made
        finally:
            for process in reversed(made.processes):
                if process.poll() is not None:
                    continue
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()
                process.kill()
                process.wait()


def doctor(made: Head) -> str:
    """Return what the doctor says of the cluster's token."""
    arguments = ["doctor", "--dashboard", made.dashboard, "--url", "http://127.0.0.1:9"]
    result = CliRunner().invoke(app, arguments, env={"RAY_AUTH_TOKEN": made.token})
    return next(line for line in result.output.splitlines() if "token" in line)


def test_the_doctor_fails_on_an_open_cluster_and_says_why() -> None:
    with head(RAY_AUTH_MODE="disabled") as made:
        line = doctor(made)
    assert line.startswith("fail  whoever reaches a node of the Ray cluster can run programs on it")


def test_a_node_that_was_cut_off_ends_and_its_supervisor_brings_it_back() -> None:
    """Its process is stopped instead of its link: Ray hears nothing from it either way."""
    with head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32)) as made:
        assert doctor(made).startswith("ok")
        first = made.nodes("ALIVE")
        process = made.start("--address", made.address)
        joined = until(lambda: made.nodes("ALIVE") - first, "the node is there")
        raylet = next(
            one for one in psutil.Process(process.pid).children() if one.name() == "raylet"
        )
        raylet.send_signal(signal.SIGSTOP)
        until(lambda: joined <= made.nodes("DEAD"), "the node is declared dead")
        raylet.send_signal(signal.SIGCONT)
        assert process.wait(LIMIT_S) != 0  # what Restart=always acts on
        made.start("--address", made.address)
        again = until(lambda: made.nodes("ALIVE") - first, "it is back")
        assert again.isdisjoint(joined)


REPLICA = """
import asyncio
from pathlib import Path
import ray
from ray import serve

@serve.deployment(ray_actor_options={"num_cpus": 0.1, "resources": {"worker": 1}})
class Replica:
    async def __call__(self):
        Path("FOLDER/begun").touch()
        while not Path("FOLDER/end").exists():
            await asyncio.sleep(0.1)
        return ray.get_runtime_context().get_node_id()

app = Replica.options(graceful_shutdown_timeout_s=90).bind()
"""


def test_the_replicas_of_a_node_that_stops_move_and_finish_their_requests(tmp_path: Path) -> None:
    (tmp_path / "draining.py").write_text(REPLICA.replace("FOLDER", str(tmp_path)))
    token, http = secrets.token_hex(32), free_port()
    deployed = {
        "http_options": {"host": "127.0.0.1", "port": http},
        "applications": [{"name": "x", "route_prefix": "/", "import_path": "draining:app"}],
    }
    with head(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token, PYTHONPATH=str(tmp_path)) as made:
        first = made.nodes("ALIVE")
        worker = ["--address", made.address, "--resources", '{"worker": 1}']
        made.start(*worker)
        old = until(lambda: made.nodes("ALIVE") - first, "the node is there")
        serve = made.dashboard + "/api/serve/applications/"
        headers = {"authorization": f"Bearer {token}"}
        httpx.put(serve, json=deployed, headers=headers, timeout=60).raise_for_status()

        def running() -> set[str]:
            found = (made.get("/api/serve/applications/") or {}).get("applications", {}).get("x")
            replicas = found["deployments"].get("Replica", {}).get("replicas", []) if found else []
            return {one["node_id"] for one in replicas if one["state"] == "RUNNING"}

        until(lambda: running() == old, "the replica runs")
        with ThreadPoolExecutor() as pool:
            url = f"http://127.0.0.1:{http}/"
            answer = pool.submit(httpx.get, url, timeout=LIMIT_S)
            until((tmp_path / "begun").exists, "its request has begun")
            made.start(*worker)
            command = [str(FOLDER / "drain-node.sh"), "90", *old]
            drain = subprocess.Popen(  # noqa: S603 - our own command
                command, env=made.environment | {"RAY_ADDRESS": made.address}
            )
            until(lambda: running() - old, "another replica runs on the other node")
            assert drain.poll() is None
            (tmp_path / "end").touch()
            assert {answer.result().text} == old
            assert drain.wait(LIMIT_S) == 0
