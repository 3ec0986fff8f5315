"""`serve run` of the shipped pair behind both doors, and what its processes hold."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import psutil
import yaml
from tests.serve.conftest import free_port

if TYPE_CHECKING:
    from collections.abc import Generator

ROOT = Path(__file__).parents[2]
PARTS = {  # of the application, by a part of the command line
    "ray::ProxyActor": "proxy",
    "ray::ServeReplica:cascade:Router": "router",
    "ray::ServeReplica:cascade:Drafter": "drafter",
    "ray::ServeReplica:cascade:Expert": "expert",
}
READY_S = 600.0
MESSAGE_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Held:
    """What one process holds."""

    pid: int
    memory_mib: float
    files: int


@dataclass(frozen=True, kw_only=True)
class Server:
    """A running application, with a port for each of its doors."""

    http: int
    grpc: int
    tiers: dict[str, int]
    process: subprocess.Popen[bytes]
    folder: Path

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http}"

    def held(self) -> dict[str, Held]:
        """Return what the proxy and the replica of each deployment hold."""
        found: dict[str, Held] = {}
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
                command = " ".join(process.cmdline())
                for words, part in PARTS.items():
                    if words in command:
                        found[part] = Held(
                            pid=process.pid,
                            memory_mib=process.memory_info().rss / 2**20,
                            files=process.num_fds(),
                        )
        assert set(found) == set(PARTS.values()), found
        return found


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s and process.poll() is None:
        with suppress(httpx.TransportError):
            if httpx.get(url, timeout=5).is_success:
                return
        time.sleep(1)
    raise RuntimeError(f"the server did not start:\n{log.read_text()[-4000:]}")


@contextmanager
def serve_run(folder: Path) -> Generator[Server]:
    """Start the application as `cluster/local.yaml` has it, with gRPC; stop it at the end."""
    config = yaml.safe_load((ROOT / "cluster" / "local.yaml").read_text())
    other = yaml.safe_load((ROOT / "cluster" / "cluster.yaml").read_text())
    http, grpc = free_port(), free_port()
    config["http_options"]["port"] = http
    config["grpc_options"] = other["grpc_options"] | {"port": grpc}
    args = config["applications"][0]["args"]
    tiers = {name: free_port() for name in ("drafter", "expert")}
    for name, port in tiers.items():
        args[name]["bind_ports"] = str(port)
    args["expert"]["engine"]["deterministic"] = True
    path, log = folder / "local.yaml", folder / "serve.log"
    path.write_text(yaml.safe_dump(config))
    command = [str(Path(sys.executable).with_name("serve")), "run", str(path)]
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "NO_COLOR": "1",
        "RAY_SERVE_GRPC_MAX_MESSAGE_SIZE": str(MESSAGE_BYTES),
    }
    environment.pop("RAY_ADDRESS", None)
    with log.open("wb") as out:
        process = subprocess.Popen(  # noqa: S603 - our own command
            command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    try:
        _wait_ready(f"http://127.0.0.1:{http}/health", process, log)
        yield Server(http=http, grpc=grpc, tiers=tiers, process=process, folder=folder)
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
