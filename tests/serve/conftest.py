"""`serve run` as a user types it, on ports of its own."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import ray
import yaml
from ray import serve

from cascade.cli.certs import certs

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
READY_S = 180.0


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running `serve run`."""

    http: str
    grpc: str
    dashboard: str
    token: str  # of its Ray cluster
    process: subprocess.Popen[bytes]
    config: dict[str, Any]
    early: list[httpx.Response]  # what was answered before the application was there

    def command(self, *words: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run a command that knows the cluster's token, or another."""
        program, *arguments = words
        variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token or self.token}
        return subprocess.run(  # noqa: S603 - our own command
            [str(Path(sys.executable).with_name(program)), *arguments],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, **variables, "COLUMNS": "200"},
        )

    async def ask_dashboard(self, path: str) -> Any:
        """Return what Ray's dashboard answers to a caller with the token."""
        headers = {"authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(timeout=60, headers=headers) as client:
            return (await client.get(f"{self.dashboard}{path}")).raise_for_status().json()

    async def deploy(self, config: dict[str, Any]) -> None:
        """Send a configuration to the cluster, as `serve deploy` does."""
        headers = {"authorization": f"Bearer {self.token}"}
        async with httpx.AsyncClient(timeout=60, headers=headers) as client:
            url = f"{self.dashboard}/api/serve/applications/"
            (await client.put(url, json=config)).raise_for_status()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> list[httpx.Response]:
    """Return when the server is well, with its answers until then."""
    early: list[httpx.Response] = []
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            pytest.fail(f"serve run ended with {process.returncode}:\n{log.read_text()[-4000:]}")
        try:
            early.append(httpx.get(f"{url}/health", timeout=2))
            if early[-1].is_success:
                return early[:-1]
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"not ready within {READY_S} s:\n{log.read_text()[-4000:]}")


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"{pattern} is not in:\n{text[-2000:]}"
    return match[1]


def tls_files(folder: Path) -> dict[str, str]:
    """Write certificates for all roles; return the setting that names them."""
    certs(folder)
    names = {"ca": "ca.pem", "certificate": "cert.pem", "key": "key.pem"}
    return {name: str(folder / "all" / file) for name, file in names.items()}


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`serve run cluster/local.yaml`, with gRPC, TLS among its parts, and ports of its own."""
    config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    http, grpc = free_port(), free_port()
    config["http_options"]["port"] = http
    other = yaml.safe_load((ROOT / "cluster" / "cluster.yaml").read_text())
    config["grpc_options"] = other["grpc_options"] | {"port": grpc}
    folder = tmp_path_factory.mktemp("serve")
    config["applications"][0]["args"]["tls"] = tls_files(folder / "tls")
    path, log = folder / "local.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
    token = secrets.token_hex(32)
    environment = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "NO_COLOR": "1"}
    environment.pop("RAY_ADDRESS", None)
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        url = f"http://127.0.0.1:{http}"
        early = wait_ready(url, process, log)
        text = log.read_text()
        yield Server(
            http=url,
            grpc=f"127.0.0.1:{grpc}",
            token=token,
            dashboard=found(r"dashboard at .*?(http://[\d.:]+)", text),
            process=process,
            config=config,
            early=early,
        )
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def serve_url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster of one test, in its process, and where Serve will listen."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets want it short
    monkeypatch.setenv("RAY_TMPDIR", folder.name)
    port = free_port()
    try:
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}/v1"
        serve.shutdown()
    finally:
        ray.shutdown()
        folder.cleanup()


def replicas(deployment: str) -> list[psutil.Process]:
    """Return the processes of a deployment's replicas, of the cluster in this process."""
    found = psutil.Process().children(recursive=True)
    title = f"ray::ServeReplica:cascade:{deployment}"
    return [one for one in found if " ".join(one.cmdline()).startswith(title)]


def wait_answered(url: str) -> None:
    """Return when a request is answered."""
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        body = {"prompt": "hello there", "max_tokens": 2}
        try:
            if httpx.post(f"{url}/completions", json=body, timeout=60).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"not ready within {READY_S} s")
