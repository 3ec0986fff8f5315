"""A pair with Gemma's 262,144 tokens under Ray Serve: the memory of its router, and its start."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import rich
from ray import serve
from tests.integration.test_gemma_pairs import save_pair
from tests.serve.conftest import replicas, wait_answered

from cascade.app import build
from cascade.settings import Application

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_router_of_a_pair_with_all_tokens_of_gemma_stays_below_a_gigabyte(
    serve_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers, _ = save_pair(tmp_path, "gemma3_text")
    actor: dict[str, Any] = {"bind_host": "127.0.0.1"}
    actor["deployment"] = {"ray_actor_options": {"num_cpus": 0.1}}
    router = {"deployment": actor["deployment"]}
    settings = {tier: one | actor for tier, one in tiers.items()} | {"router": router}
    began_s = time.monotonic()
    serve.run(
        build(Application.model_validate(settings)),
        name="cascade",
        route_prefix="/",
        blocking=False,
    )
    wait_answered(serve_url)
    ready_s = time.monotonic() - began_s
    for more in (
        {},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}},
    ):
        body = {"prompt": "Ab Cd", "max_tokens": 16, "temperature": 1, "top_p": 0.9} | more
        assert httpx.post(f"{serve_url}/completions", json=body, timeout=120).is_success
    (one,) = replicas("Router")
    peak = _peak_bytes(one.pid)
    beside = [f"{_peak_bytes(child.pid) / 1e6:.0f}" for child in one.children(recursive=True)]
    with capsys.disabled():
        rich.print(f"ready after {ready_s:.1f} s; MB: router {peak / 1e6:.0f}, its own {beside}")
    assert peak < 1e9


def _peak_bytes(pid: int) -> int:
    """Return the largest resident size that a process has had."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
