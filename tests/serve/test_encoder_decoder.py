"""Encoder-decoders under Ray Serve: a replica of the expert is killed while it writes."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from threading import Event
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from ray import serve
from tests.serve.conftest import replicas, wait_answered
from tests.support.encoder_decoder_pairs import PENALTY, greedy_answers, save_pair
from transformers import AutoTokenizer

from cascade.app import build
from cascade.settings import Application

if TYPE_CHECKING:
    from pathlib import Path

TOKENS = 120
PROMPTS = ["hello there", "translate this, please.", "a cat sat", "what is it?", "be quick!", "no"]


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
    serve_url: str, tmp_path: Path
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
    wait_answered(serve_url)
    assert len(replicas("Expert")) == 2

    moved = 0
    for _ in range(3):  # the killed replica may have had no answer
        begun = [Event() for _ in PROMPTS]
        with ThreadPoolExecutor(len(PROMPTS)) as pool:
            found = [
                pool.submit(stream, serve_url, prompt, event)
                for prompt, event in zip(PROMPTS, begun, strict=True)
            ]
            assert all(event.wait(60) for event in begun[:3])
            replicas("Expert")[0].kill()
        assert [one.result()[0] for one in found] == expected
        moved += sum(one.result()[1] for one in found)
        if moved:
            break
        wait_answered(serve_url)
    assert moved > 0
