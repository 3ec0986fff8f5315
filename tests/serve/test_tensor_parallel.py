"""An expert over two devices under Ray Serve: where its processes run, and what if one ends."""

from __future__ import annotations

import socket
import time
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import ray
import torch
from ray import serve
from ray.cluster_utils import Cluster

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
    model: Any = toy.expert.model
    prompt = torch.tensor([[ord(letter) - ord("A") for letter in PROMPT]])
    with torch.inference_mode():
        tokens = model.generate(prompt, max_new_tokens=TOKENS, do_sample=False)[0, len(PROMPT) :]
    expected = "".join(chr(ord("A") + token) for token in tokens.tolist())

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
