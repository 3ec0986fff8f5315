"""Peers answer what we answer."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from cascade.benchmark.transformers_baselines import (
    ASSISTANCE,
    Assistance,
    Assisted,
    Batched,
    Pair,
    continuous,
    load_pair,
)
from cascade.demo import DRAFTER, EXPERT
from cascade.errors import InvalidMeasurement
from cascade.evaluation.client import in_process
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.evaluation.client import Answer, Answerer

QUESTIONS = ("Who is Buzz Aldrin?", "Translate to French: 37", "What is the capital of France?")


def greedy(question: str) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"messages": messages, "temperature": 0, "max_tokens": 24}


async def ask(peer: Answerer, questions: Sequence[str] = QUESTIONS) -> list[Answer]:
    return await asyncio.gather(*(peer.answer(greedy(question)) for question in questions))


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load_pair(drafter=str(DRAFTER), expert=str(EXPERT), threads=1)


@pytest.fixture(scope="module")
async def ours() -> list[Answer]:
    """What our own loop answers."""
    engine = {"threads": 1}
    settings = Application.model_validate(
        {"drafter": {"engine": engine}, "expert": {"engine": engine}}
    )
    async with in_process(settings) as answerer:
        return await ask(answerer)


def same(answers: Sequence[Answer], others: Sequence[Answer]) -> None:
    for one, other in zip(answers, others, strict=True):
        assert (one.text, one.finish) == (other.text, other.finish)
        assert one.prompt_tokens == other.prompt_tokens
        assert one.completion_tokens == other.completion_tokens


@pytest.mark.parametrize("assistance", ASSISTANCE[::3], ids=lambda found: found.name)
async def test_assisted_generation_says_what_we_say(
    pair: Pair, ours: list[Answer], assistance: Assistance
) -> None:
    same(await ask(Assisted(pair, assistance)), ours)


async def test_the_assistants_settings_are_put_back(pair: Pair) -> None:
    """The heuristic schedule writes its last length into them, which would carry over."""
    before = pair.drafter.generation_config
    await ask(Assisted(pair, Assistance(tokens=5, schedule="heuristic")), QUESTIONS[:1])
    assert pair.drafter.generation_config == before


@pytest.mark.parametrize("limit", [1, 2, 8])
async def test_batched_generation_says_what_we_say(
    pair: Pair, ours: list[Answer], limit: int
) -> None:
    same(await ask(Batched(pair, limit=limit)), ours)


async def test_continuous_batching_says_what_we_say(pair: Pair, ours: list[Answer]) -> None:
    async with continuous(pair, tokens=4096) as peer:
        same(await ask(peer), ours)


async def test_peers_time_their_tokens(pair: Pair) -> None:
    answer = (await ask(Batched(pair, limit=1), QUESTIONS[:1]))[0]
    assert len(answer.marks_s) == answer.completion_tokens
    assert 0 < answer.ttft_s <= answer.latency_s


async def test_a_peer_refuses_to_sample(pair: Pair) -> None:
    with pytest.raises(InvalidMeasurement, match="greedily"):
        await Batched(pair, limit=1).answer({**greedy("Hello"), "temperature": 1})
