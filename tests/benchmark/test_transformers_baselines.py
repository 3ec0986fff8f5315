"""Baselines give the same answers as our own loop."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.shipped_pair import SETTINGS

from cascade.benchmark.load import ClosedLoop, run_load
from cascade.benchmark.transformers_baselines import (
    ASSISTANCE,
    Assistance,
    Generate,
    Pair,
    continuous,
    load_pair,
)
from cascade.errors import InvalidMeasurement

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.evaluation.client import Client, CompletionResult, InProcessClient

QUESTIONS = ("Who is Buzz Aldrin?", "Translate to French: 37", "What is the capital of France?")


def greedy(question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24}


async def ask(client: Client, questions: Sequence[str] = QUESTIONS) -> list[CompletionResult]:
    return await asyncio.gather(*(client.complete(greedy(question)) for question in questions))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load_pair(SETTINGS)


@pytest.fixture(scope="module")
async def ours(shipped: InProcessClient) -> list[CompletionResult]:
    """The answers of our own loop."""
    return await ask(shipped)


def same(answers: Sequence[CompletionResult], others: Sequence[CompletionResult]) -> None:
    for one, other in zip(answers, others, strict=True):
        assert (one.text, one.finish_reason) == (other.text, other.finish_reason)
        assert one.prompt_tokens == other.prompt_tokens
        assert one.completion_tokens == other.completion_tokens


@pytest.mark.parametrize("assistance", ASSISTANCE[::3], ids=str)
async def test_assisted_generation_gives_our_answers(
    pair: Pair, ours: list[CompletionResult], assistance: Assistance
) -> None:
    same(await ask(Generate(pair, assistance=assistance)), ours)


async def test_the_assistants_configuration_is_restored(pair: Pair) -> None:
    """The heuristic schedule writes its last length into it, which would affect later answers."""
    before = pair.drafter.generation_config
    await ask(Generate(pair, assistance=Assistance(tokens=5, schedule="heuristic")), QUESTIONS[:1])
    assert pair.drafter.generation_config == before


@pytest.mark.parametrize("limit", [1, 2, 8])
async def test_batched_generation_gives_our_answers(
    pair: Pair, ours: list[CompletionResult], limit: int
) -> None:
    same(await ask(Generate(pair, limit=limit)), ours)


async def test_a_closed_loop_keeps_the_batches_full(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients that get their answers together send their next requests in one batch."""
    sizes: list[int] = []

    def generate(batch: Sequence[object]) -> list[list[int]]:
        sizes.append(len(batch))
        return [[0]] * len(batch)

    client = Generate(pair, limit=3)
    monkeypatch.setattr(client, "_generate", generate)
    await run_load(client, [greedy("Hello")] * 9, ClosedLoop(concurrency=3))
    assert sizes == [3, 3, 3]


async def test_continuous_batching_gives_our_answers(
    pair: Pair, ours: list[CompletionResult]
) -> None:
    async with continuous(pair, tokens=4096) as client:
        same(await ask(client), ours)


async def test_each_token_has_a_time(pair: Pair) -> None:
    answer = (await ask(Generate(pair), QUESTIONS[:1]))[0]
    assert len(answer.chunk_times_s) == answer.completion_tokens
    assert 0 < answer.ttft_s <= answer.latency_s


async def test_a_baseline_refuses_to_sample(pair: Pair) -> None:
    with pytest.raises(InvalidMeasurement, match="greedily"):
        await Generate(pair).complete({**greedy("Hello"), "temperature": 1})
