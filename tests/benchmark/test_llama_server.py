"""llama.cpp's own server, over GGUF files of the shipped pair."""

from __future__ import annotations

import asyncio
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import psutil
import pytest
import torch
from tests.support.shipped_pair import SETTINGS

from cascade.benchmark.llama_server import DraftOptions, LlamaServer, Servers, command_of, prepare
from cascade.benchmark.plan import greedy
from cascade.benchmark.systems import child_process
from cascade.benchmark.transformers_baselines import load_pair
from cascade.errors import InvalidMeasurement, StartupError, Unavailable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from cascade.evaluation.client import InProcessClient

QUESTIONS = ("Who is Buzz Aldrin?", "Translate to French: 37", "What is the capital of France?")
BODIES = [greedy(question) | {"max_tokens": 24} for question in QUESTIONS]


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Servers:
    """Servers of a program, which is the server of xllamacpp under another name."""
    folder = tmp_path_factory.mktemp("llama")
    program = folder / "llama-server"
    program.write_text(
        f'#!/bin/sh\nexec {sys.executable} -m cascade.benchmark.xllamacpp_server "$@"'
    )
    program.chmod(0o755)
    command = command_of(str(program))
    assert command == (str(program),)
    return prepare(SETTINGS, BODIES, command=command, concurrency=2, folder=folder)


@pytest.fixture(scope="module")
async def alone(servers: Servers) -> AsyncIterator[LlamaServer]:
    async with servers.start() as client:
        yield client


@pytest.fixture(scope="module")
async def drafted(servers: Servers) -> AsyncIterator[LlamaServer]:
    async with servers.start(DraftOptions(tokens=4)) as client:
        yield client


async def tokens_of(client: LlamaServer, prompt: tuple[int, ...]) -> list[int]:
    """Return the ids of an answer, of which `complete` makes a text."""
    asked = {"prompt": prompt, "n_predict": 24, "top_k": 1, "return_tokens": True}
    return (await client.http.post("/completion", json=asked)).json()["tokens"]


async def test_greedy_ids_are_those_of_generate(alone: LlamaServer, drafted: LlamaServer) -> None:
    pair = load_pair(SETTINGS)
    generate: Any = pair.expert.generate
    for body in BODIES:
        prompt = pair.prompts.request(body).prompt
        with torch.inference_mode():
            ids = generate(torch.tensor([prompt]), generation_config=pair.generation_config(24))
        expected = ids[0, len(prompt) :].tolist()
        assert await tokens_of(alone, prompt) == expected
        assert await tokens_of(drafted, prompt) == expected


async def test_answers_are_ours(
    alone: LlamaServer, drafted: LlamaServer, shipped: InProcessClient
) -> None:
    """Several requests at once, as in a benchmark."""
    ours, *theirs = [
        await asyncio.gather(*(client.complete(body) for body in BODIES))
        for client in (shipped, alone, drafted)
    ]
    for answers in theirs:
        for one, other in zip(ours, answers, strict=True):
            assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
            assert one.prompt_tokens == other.prompt_tokens
            assert one.completion_tokens == other.completion_tokens
            assert 0 < other.ttft_s < other.latency_s
            assert 0 < other.statistics["prompt_ms"] <= 1e3 * other.ttft_s
    assert sum(answer.statistics["accepted"] for answer in theirs[0]) == 0
    assert sum(answer.statistics["accepted"] for answer in theirs[1]) > 0


async def test_a_prompt_is_computed_each_time(alone: LlamaServer) -> None:
    """Requests repeat from round to round, and prompts would otherwise be free."""
    asked = alone.asked(alone.prompts.request(BODIES[0]))
    for _ in range(2):
        answer = (await alone.http.post("/completion", json=asked)).json()
        assert answer["timings"]["prompt_n"] == len(asked["prompt"])


async def test_a_request_that_samples_is_refused(alone: LlamaServer) -> None:
    with pytest.raises(InvalidMeasurement, match="greedily"):
        await alone.complete(BODIES[0] | {"temperature": 1})


async def test_a_request_that_the_server_refuses_is_an_error(alone: LlamaServer) -> None:
    body = {"prompt": [5] * 2000, "max_tokens": 8, "temperature": 0}
    with pytest.raises(Unavailable, match="exceeds the available context size"):
        await alone.complete(body)


async def test_a_server_that_does_not_start_is_an_error_with_its_words(
    servers: Servers, tmp_path: Path
) -> None:
    (tmp_path / "expert.gguf").write_bytes(b"no model")
    with pytest.raises(StartupError, match=r"(?s)ended before it served; .*failed to load"):
        async with replace(servers, folder=tmp_path).start():
            raise AssertionError


async def test_a_server_is_gone_after_its_use(servers: Servers) -> None:
    async with servers.start():
        (process,) = serving(servers.folder)
    assert not psutil.wait_procs([process], timeout=0)[1]


async def test_a_server_ends_with_a_benchmark_that_was_killed(servers: Servers) -> None:
    """Whoever started it holds the other end of its input, which ends then in any case."""
    command = (*command_of(""), *servers.options(0, None))
    async with child_process(*command, stdin=asyncio.subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.close()
        assert await process.wait() == 0


def serving(folder: Path) -> list[psutil.Process]:
    """Return the children that serve the models of a folder, but not those of fixtures."""
    started = [
        child for child in psutil.Process().children() if str(folder) in str(child.cmdline())
    ]
    return sorted(started, key=psutil.Process.create_time)[-1:]


def test_a_program_that_is_not_there_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="no program /nowhere/llama-server; give the path"):
        command_of("/nowhere/llama-server")


@pytest.mark.parametrize("missing", ["gguf", "xllamacpp"])
def test_a_missing_package_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InvalidMeasurement, match=rf"{missing} is not installed.*\[peers\]"):
        command_of("")


def test_a_context_has_room_for_the_longest_request(servers: Servers) -> None:
    assert servers.slots == 2
    assert servers.context_tokens == 256
    options = servers.options(8080, DraftOptions(tokens=16, confidence=0.4))
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given["--ctx-size"] == "512"
    assert given["--threads"] == given["--threads-draft"] == "1"
    assert (given["--spec-draft-n-max"], given["--spec-draft-p-min"]) == ("16", "0.4")
