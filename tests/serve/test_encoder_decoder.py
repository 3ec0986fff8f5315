"""Encoder-decoders under Ray Serve: a replica of the expert is killed while it writes."""

from __future__ import annotations

import json
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from tempfile import TemporaryDirectory
from threading import Event
from typing import TYPE_CHECKING, Any

import httpx
import psutil
import pytest
import ray
from ray import serve
from tests.support.encoder_decoder_pairs import PENALTY, greedy_answers, save_pair
from transformers import AutoTokenizer

from cascade.app import build
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

TOKENS = 120
PROMPTS = ["hello there", "translate this, please.", "a cat sat", "what is it?", "be quick!", "no"]
READY_S = 240.0


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A Ray cluster of this test's own, and where Serve will listen."""
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    folder = TemporaryDirectory(prefix="ray-", ignore_cleanup_errors=True)  # sockets want it short
    monkeypatch.setenv("RAY_TMPDIR", folder.name)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    try:
        ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}/v1"
        serve.shutdown()
    finally:
        ray.shutdown()
        folder.cleanup()


def experts() -> list[psutil.Process]:
    """Return the processes of the expert's replicas."""
    found = psutil.Process().children(recursive=True)
    title = "ray::ServeReplica:cascade:Expert"
    return [one for one in found if " ".join(one.cmdline()).startswith(title)]


def wait_ready(url: str) -> None:
    deadline_s = time.monotonic() + READY_S
    while time.monotonic() < deadline_s:
        body = {"prompt": PROMPTS[0], "max_tokens": 2}
        try:
            if httpx.post(f"{url}/completions", json=body, timeout=60).is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    pytest.fail(f"not ready within {READY_S} s")


def stream(url: str, prompt: str, begun: Event) -> tuple[str, int]:
    """Return a streamed answer, and how often it moved to another expert; say when it begins."""
    body = {
        "prompt": prompt,
        "max_tokens": TOKENS,
        "temperature": 0,
        "repetition_penalty": PENALTY,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cascade": {"mode": "speculative", "draft_tokens": 2},
    }
    text, failovers = "", 0
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=120) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            text += "".join(choice["text"] for choice in event["choices"])
            if event.get("usage"):
                failovers = event["usage"]["cascade"]["failovers"]
            if text:
                begun.set()
    return text, failovers


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_streams_go_on_with_the_experts_own_text_when_a_replica_is_killed(
    url: str, tmp_path: Path
) -> None:
    pair = save_pair(tmp_path, "t5")
    tokenizer: Any = AutoTokenizer.from_pretrained(pair.expert)
    sources = [tuple(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    answers = greedy_answers(pair.load(), sources, longest=TOKENS)
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]
    actor = {"ray_actor_options": {"num_cpus": 0.1}}
    tier: dict[str, Any] = {"bind_host": "127.0.0.1", "engine": {"threads": 1}}
    settings = Application.model_validate(
        {
            "drafter": tier | {"model": str(pair.drafter), "deployment": actor},
            "expert": tier | {"model": str(pair.expert), "deployment": actor | {"num_replicas": 2}},
            "router": {"deployment": actor},
        }
    )
    serve.run(build(settings), name="cascade", route_prefix="/", blocking=False)
    wait_ready(url)
    assert len(experts()) == 2

    moved = 0
    for _ in range(3):  # the killed replica may have had no answer
        begun = [Event() for _ in PROMPTS]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            found = [
                pool.submit(stream, url, prompt, event)
                for prompt, event in zip(PROMPTS, begun, strict=True)
            ]
            assert all(event.wait(60) for event in begun[:3])
            experts()[0].kill()
        assert [one.result()[0] for one in found] == expected
        moved += sum(one.result()[1] for one in found)
        if moved:
            break
        wait_ready(url)
    assert moved > 0
