"""An expert over two devices under Ray Serve: where its processes run, and what if one ends."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import ray
import torch
import yaml
from ray import serve
from ray.cluster_utils import Cluster
from tests.serve.conftest import ROOT, free_port

from cascade.app import build
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.conftest import Pair

LIMIT_S = 240.0
SMALL = 80 * 2**20  # bytes of a node's object store
PROMPT = "ABCDEFGH"
TOKENS = 24


@pytest.fixture
def large_node(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, int]]:
    """A head, a node with one GPU and one with two: the server's URL, and the latter's raylet."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets want it short
    monkeypatch.setenv("RAY_TMPDIR", folder.name)  # or others' `ray.init()` would find this one
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    common: dict[str, Any] = {"num_cpus": 1, "object_store_memory": SMALL}
    head = common | {"num_gpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    try:
        cluster.add_node(**common, num_gpus=1)
        large = cluster.add_node(**common, num_gpus=2, resources={"accelerator_type:H100": 2})
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
        raylet = large.all_processes["raylet"][0].process.pid
        yield f"http://127.0.0.1:{port}", raylet  # pyright: ignore[reportReturnType] - it runs
        serve.shutdown()
    finally:
        ray.shutdown()  # a driver's own node cannot be removed under it
        cluster.shutdown()
        folder.cleanup()


def processes(raylet: int, title: str) -> list[psutil.Process]:
    """Return the workers of a node whose title begins so."""
    children = psutil.Process(raylet).children()
    return [one for one in children if " ".join(one.cmdline()).startswith(title)]


def eventually(condition: Callable[[], object]) -> None:
    deadline_s = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline_s, "it did not come true"
        time.sleep(0.5)


def complete(url: str) -> str | None:
    """Return the answer to the prompt; None if there is none yet."""
    body = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0}
    try:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
    except httpx.TransportError:
        return None
    return answer.json()["choices"][0]["text"] if answer.is_success else None


def expected_answer(toy: Pair) -> str:
    """Return the answer of `transformers` to the prompt."""
    model: Any = toy.expert.model
    prompt = torch.tensor([[ord(letter) - ord("A") for letter in PROMPT]])
    with torch.inference_mode():
        tokens = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, len(PROMPT) :]
    return "".join(chr(ord("A") + token) for token in tokens.tolist())


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sharded_expert_takes_both_gpus_of_one_node_and_is_replaced_as_a_whole(
    large_node: tuple[str, int], toy: Pair
) -> None:
    url, raylet = large_node
    tier: dict[str, Any] = {"bind_host": "127.0.0.1", "engine": {"threads": 1}}
    each = {"num_cpus": 0.1, "num_gpus": 1, "accelerator_type": "H100"}
    args: dict[str, Any] = {
        "drafter": tier | {"model": str(toy.drafter.path)},
        "expert": tier
        | {
            "model": str(toy.expert.path),
            "engine": {"threads": 1, "tensor_parallel": 2},
            "deployment": {"ray_actor_options": each, "health_check_period_s": 1},
        },
        "router": {"deployment": {"ray_actor_options": {"num_cpus": 0.1}}},
    }
    args["drafter"]["deployment"] = {"ray_actor_options": {"num_cpus": 0.1}}
    expected = expected_answer(toy)

    settings = Application.model_validate(args)
    serve.run(build(settings), name="cascade", route_prefix="/", blocking=False)
    eventually(lambda: complete(url) == expected)

    replicas = processes(raylet, "ray::ServeReplica:cascade:Expert")
    ranks = processes(raylet, "ray::Rank")
    assert (len(replicas), len(ranks)) == (1, 1)
    assert ray.available_resources()["GPU"] == 1  # of the other node

    ranks[0].kill()
    eventually(lambda: not replicas[0].is_running())
    eventually(lambda: complete(url) == expected)
    assert len(processes(raylet, "ray::Rank")) == 1
    assert ray.available_resources()["GPU"] == 1


@dataclass(frozen=True, kw_only=True)
class Node:
    """A node that `ray start` has started, with two GPUs that Ray only counts."""

    raylet: int
    address: str
    dashboard: str
    environment: dict[str, str]

    def start(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a command of this environment, such as `serve`."""
        command = [str(Path(sys.executable).with_name(words[0])), *words[1:]]
        return subprocess.Popen(command, env=self.environment)  # noqa: S603 - our own command

    def placement_groups(self) -> list[dict[str, Any]]:
        """Return what Ray has placed."""
        program = (
            "import json, ray; from ray.util import placement_group_table as table; "
            "ray.init(log_to_driver=False); print(json.dumps(list(table().values())))"
        )
        said = subprocess.run(  # noqa: S603 - our own program
            [sys.executable, "-c", program], env=self.environment, capture_output=True, check=True
        )
        return json.loads(said.stdout)


@pytest.fixture
def node() -> Iterator[Node]:
    folder = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)
    port, dashboard = free_port(), free_port()
    environment = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ADDRESS": f"127.0.0.1:{port}",
    }
    options = {
        "port": port,
        "dashboard-port": dashboard,
        "ray-client-server-port": free_port(),
        "dashboard-agent-listen-port": free_port(),
        "node-ip-address": "127.0.0.1",
        "num-cpus": 2,
        "num-gpus": 2,
        "object-store-memory": SMALL,
        "resources": json.dumps({"accelerator_type:H100": 2}),
        "temp-dir": folder.name,
    }
    command = [str(Path(sys.executable).with_name("ray")), "start", "--head", "--block"]
    command += [f"--{name}={value}" for name, value in options.items()]
    running = subprocess.Popen(  # noqa: S603 - our own command
        command, env={name: v for name, v in environment.items() if name != "RAY_ADDRESS"}
    )
    with ExitStack() as stack:
        stack.callback(folder.cleanup)
        stack.callback(running.wait, 60)
        stack.callback(running.terminate)
        raylets: list[psutil.Process] = []

        def started() -> bool:
            assert running.poll() is None, "`ray start` has ended"
            raylets[:] = [
                one for one in psutil.Process(running.pid).children() if one.name() == "raylet"
            ]
            url = f"http://127.0.0.1:{dashboard}/api/version"
            headers = {"authorization": f"Bearer {environment['RAY_AUTH_TOKEN']}"}
            try:
                return bool(raylets) and httpx.get(url, headers=headers).is_success
            except httpx.TransportError:
                return False

        eventually(started)
        yield Node(
            raylet=raylets[0].pid,
            address=f"127.0.0.1:{port}",
            dashboard=f"http://127.0.0.1:{dashboard}",
            environment=environment,
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("command", ["run", "deploy"])
def test_a_yaml_file_places_a_sharded_expert_on_both_gpus_of_a_node(
    command: str, node: Node, toy: Pair, tmp_path: Path
) -> None:
    config = yaml.safe_load((ROOT / "cluster" / "cluster.yaml").read_text())
    config["http_options"] |= {"host": "127.0.0.1", "port": free_port()}
    config["grpc_options"]["port"] = free_port()
    args = config["applications"][0]["args"]
    args["drafter"] = {
        "model": str(toy.drafter.path),
        "engine": {"threads": 1},
        "deployment": {"ray_actor_options": {"num_cpus": 0.1}},
    }
    args["expert"] = {
        "model": str(toy.expert.path),
        "engine": {"tensor_parallel": 2, "threads": 1},
        "deployment": {
            "ray_actor_options": {"num_cpus": 0.5, "num_gpus": 1, "accelerator_type": "H100"}
        },
    }
    args["router"] = {"deployment": {"ray_actor_options": {"num_cpus": 0.1}}}
    path = tmp_path / "two-gpus.yaml"
    path.write_text(yaml.safe_dump(config))
    url = f"http://127.0.0.1:{config['http_options']['port']}"
    address = {"run": node.address, "deploy": node.dashboard}[command]

    serving = node.start("serve", command, str(path), f"--address={address}")
    eventually(lambda: complete(url))
    assert complete(url) == expected_answer(toy)

    (group,) = node.placement_groups()
    assert (group["strategy"], group["state"]) == ("STRICT_PACK", "CREATED")
    bundle = {"CPU": 0.5, "GPU": 1, "accelerator_type:H100": 0.001}
    assert group["bundles"] == {"0": bundle, "1": bundle}
    assert len(set(group["bundles_to_node_id"].values())) == 1
    assert len(processes(node.raylet, "ray::ServeReplica:cascade:Expert")) == 1
    assert len(processes(node.raylet, "ray::Rank")) == 1
    node.start("serve", "shutdown", "-y", f"--address={node.dashboard}").wait(60)
    serving.terminate()
    serving.wait(60)
