"""A Ray cluster over three hosts, with tokens and TLS, and the application on it."""

from __future__ import annotations

import os
import secrets
import ssl
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import trustme
import yaml
from tests.hosts.network import SWITCH, Host, hosts
from tests.support.certificates import write_certificate

from cascade.api.keys import ApiKey, as_yaml, hash_of
from cascade.protocol.tls import ROLES, role_name

if TYPE_CHECKING:
    from collections.abc import Generator

    from cascade.protocol.tls import TlsFiles

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
READY_S = 300.0
STORE_BYTES = 80 * 2**20
HTTPS = 8443
TIER_PORTS = "7100-7109"
API_KEY = "sk-of-the-tests"
DASHBOARD = "http://127.0.0.1:8265"  # on the head
# Takes a lease as a router does, prints it, and holds it until its input ends.
TAKE_LEASE = """
import asyncio, sys
import ray
from ray import serve
from cascade.protocol.services import {kind}
from cascade.router.leases import ServeLeases

async def main():
    handle = serve.get_deployment_handle("{name}", "cascade")
    lease = await ServeLeases(handle, kind={kind}, timeout_s=60).take()
    print("lease", lease.address, lease.token, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    lease.close()

ray.init(address="{address}:6379", log_to_driver=False)
asyncio.run(main())
"""
ASK = """
import os, sys, urllib.request
headers = {"authorization": "Bearer " + os.environ["RAY_AUTH_TOKEN"]}
request = urllib.request.Request(sys.argv[1], headers=headers)
print(urllib.request.urlopen(request, timeout=60).read().decode())
"""


@dataclass(frozen=True, kw_only=True)
class HostCluster:
    """Three hosts: routers on the head, and one for each tier."""

    head: Host
    drafters: Host
    experts: Host
    folder: Path
    ca: trustme.CA
    roles: TlsFiles  # a certificate for every role
    variables: dict[str, dict[str, str]]  # of the environment, by host
    token: str

    @property
    def url(self) -> str:
        return f"https://{self.head.address}:{HTTPS}"

    @property
    def private_keys(self) -> list[str]:
        """A line of each private key: of all roles, and of each host, whose head has the door's."""
        files = [self.roles.key, *(one["RAY_TLS_SERVER_KEY"] for one in self.variables.values())]
        return [Path(file).read_text().splitlines()[2] for file in files]

    def trusted(self) -> ssl.SSLContext:
        """Return what a client needs to trust the door."""
        context = ssl.create_default_context()
        self.ca.configure_trust(context)
        return context

    def client(self, *, key: str = API_KEY, timeout_s: float = 120.0) -> httpx.AsyncClient:
        """Return a client of the HTTP API, outside of all hosts."""
        headers = {"authorization": f"Bearer {key}"}
        return httpx.AsyncClient(
            base_url=self.url, verify=self.trusted(), headers=headers, timeout=timeout_s
        )

    def run(self, host: Host, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run one of our programs on a host, with its variables and more."""
        program, *arguments = words
        return subprocess.run(  # noqa: S603 - our own words
            host.command(str(PROGRAMS / program), *arguments),
            env=self.variables[host.name] | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=180,
        )

    def ask_dashboard(self, path: str) -> str:
        """Return what Ray's dashboard on the head answers to a caller with the token."""
        asked = self.run(self.head, "python", "-c", ASK, f"{DASHBOARD}{path}")
        assert asked.returncode == 0, asked.stderr
        return asked.stdout

    @contextmanager
    def holding_lease(self, name: str) -> Generator[tuple[str, str]]:
        """Hold a lease of a tier, taken on the head; yield its address and its token."""
        script = TAKE_LEASE.format(name=name, kind=name.upper(), address=self.head.address)
        process = subprocess.Popen(  # noqa: S603 - our own words
            self.head.command(str(PROGRAMS / "python"), "-c", script),
            env=self.variables[self.head.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        with process:
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                taken = next((line for line in process.stdout if line.startswith("lease ")), "")
                _, address, token = taken.split()
                yield address, token
            finally:
                process.stdin.close()

    @contextmanager
    def captured(self) -> Generator[bytearray]:
        """Collect all packets between the hosts, and those of clients."""
        script = Path(__file__).with_name("capture.py")
        path = self.folder / f"packets-{secrets.token_hex(4)}"
        found = bytearray()
        with path.open("wb") as file:
            process = subprocess.Popen(  # noqa: S603 - our own words
                ["ip", "netns", "exec", SWITCH, sys.executable, str(script)],  # noqa: S607 - by PATH
                stdout=file,
                stderr=subprocess.PIPE,
            )
        assert process.stderr is not None
        assert process.stderr.readline() == b"capturing\n"
        try:
            yield found
        finally:
            process.terminate()
            process.wait()
            found += path.read_bytes()


def configuration(roles: TlsFiles, door: dict[str, str], keys: str) -> dict[str, Any]:
    """Return production.yaml for the shipped pair on hosts without GPUs."""
    found = yaml.safe_load((ROOT / "cluster" / "production.yaml").read_text())
    found["proxy_location"] = "HeadOnly"
    found["http_options"] |= {
        "port": HTTPS,
        "ssl_certfile": door["certificate"],
        "ssl_keyfile": door["key"],
    }
    del found["grpc_options"]
    args = found["applications"][0]["args"]
    for name in ("drafter", "expert"):
        args[name] = {
            "model": "demo",
            "engine": {"threads": 1, "cache_tokens": 32768},
            "bind_ports": TIER_PORTS,
            "deployment": {
                "num_replicas": 1,
                "ray_actor_options": {"num_cpus": 0, "resources": {name: 1}},
                "health_check_period_s": 2,
            },
        }
    args["router"] = {
        "draft_deadline_s": 1,
        "deployment": {
            "max_ongoing_requests": 512,
            "ray_actor_options": {"num_cpus": 0, "resources": {"router": 1}},
        },
    }
    args["tls"] = {"ca": roles.ca, "certificate": roles.certificate, "key": roles.key}
    args["api_keys_file"] = keys
    return found


@contextmanager
def host_cluster(folder: Path) -> Generator[HostCluster]:
    """Start Ray on three hosts and the application on it; stop all of it at the end."""
    ca, token = trustme.CA(), secrets.token_hex(32)
    roles = write_certificate(folder / "roles", ca, *map(role_name, ROLES))
    keys = folder / "keys.yaml"
    keys.write_text(as_yaml(ApiKey(name="tests", sha256=hash_of(API_KEY))))
    with hosts("head", "drafters", "experts") as (head, drafters, experts):
        variables: dict[str, dict[str, str]] = {}
        supervisors: list[subprocess.Popen[bytes]] = []
        for host in (head, drafters, experts):
            own = write_certificate(folder / host.name, ca, host.address, "127.0.0.1", "localhost")
            variables[host.name] = {
                **os.environ,
                "OMP_NUM_THREADS": "1",
                "RAY_AUTH_MODE": "token",
                "RAY_AUTH_TOKEN": token,
                "RAY_USE_TLS": "1",
                "RAY_TLS_CA_CERT": own.ca,
                "RAY_TLS_SERVER_CERT": own.certificate,
                "RAY_TLS_SERVER_KEY": own.key,
            }
            variables[host.name].pop("RAY_ADDRESS", None)
        door = {
            "certificate": variables[head.name]["RAY_TLS_SERVER_CERT"],
            "key": variables[head.name]["RAY_TLS_SERVER_KEY"],
        }
        made = HostCluster(
            head=head,
            drafters=drafters,
            experts=experts,
            folder=folder,
            ca=ca,
            roles=roles,
            variables=variables,
            token=token,
        )
        try:
            _start_head(made)
            supervisors.append(_keep_started(made, drafters, of="drafter"))
            supervisors.append(_keep_started(made, experts, of="expert"))
            path = folder / "hosts.yaml"
            path.write_text(yaml.safe_dump(configuration(roles, door, str(keys))))
            deployed = made.run(head, "serve", "deploy", str(path), "-a", DASHBOARD)
            assert deployed.returncode == 0, deployed.stderr[-4000:]
            _wait_ready(made)
            yield made
        finally:
            for host in (experts, drafters, head):
                _stop(host)
            for supervisor in supervisors:
                supervisor.wait()


def _ray_start(host: Host, *words: str, of: str) -> tuple[str, ...]:
    """Return the command that starts Ray on a host, which has room for a replica of one part."""
    return (
        *("ray", "start", *words, f"--node-ip-address={host.address}", "--num-cpus=1"),
        *("--disable-usage-stats", f"--object-store-memory={STORE_BYTES}"),
        f'--resources={{"{of}": 1}}',
    )


def _start_head(cluster: HostCluster) -> None:
    words = "--head", "--port=6379", f"--temp-dir={cluster.folder / 'ray'}"
    started = cluster.run(cluster.head, *_ray_start(cluster.head, *words, of="router"))
    assert started.returncode == 0, started.stdout[-2000:] + started.stderr[-2000:]


def _keep_started(cluster: HostCluster, host: Host, *, of: str) -> subprocess.Popen[bytes]:
    """Start Ray on a host again whenever it ends, as `cluster/systemd/ray-node.service` does."""
    words = "--block", f"--address={cluster.head.address}:6379"
    program, *arguments = _ray_start(host, *words, of=of)
    again = 'while true; do "$@"; sleep 5; done'
    with (cluster.folder / f"{host.name}.log").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - our own words
            host.command("bash", "-c", again, "bash", str(PROGRAMS / program), *arguments),
            env=cluster.variables[host.name],
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _stop(host: Host) -> None:
    """Kill every process of a host."""
    found = subprocess.run(  # noqa: S603 - our own words
        ["ip", "netns", "pids", host.name],  # noqa: S607 - our own words; by PATH
        check=False,
        capture_output=True,
        text=True,
    )
    for pid in map(int, found.stdout.split()):
        try:
            os.kill(pid, 9)
        except ProcessLookupError:
            continue


def _wait_ready(cluster: HostCluster) -> None:
    deadline_s = time.monotonic() + READY_S
    with httpx.Client(base_url=cluster.url, verify=cluster.trusted(), timeout=5) as client:
        while time.monotonic() < deadline_s:
            try:
                if client.get("/health").is_success:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
    status = cluster.run(cluster.head, "serve", "status", "-a", DASHBOARD)
    raise TimeoutError(f"not ready within {READY_S} s:\n{status.stdout}\n{status.stderr}"[-6000:])
