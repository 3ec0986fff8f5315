"""Lossless is lossless: the text is the expert's own, token for token."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cascade import demo
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.evaluation.tasks.generate import held_out
from cascade.evaluation.tasks.item import Family
from cascade.local import LocalServer, local_server
from cascade.settings import Application
from cascade.types import Coupling, DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))

SEEDED = DecodingParams(
    sampling=SamplingParams(temperature=0.9, top_p=0.95), coupling=Coupling.GUMBEL, seed=11
)

LONGEST = 24

BLOCKS = range(1, 17)


@dataclass(frozen=True)
class Work:
    """Prompts of the shipped pair, and what plain `transformers` makes of them."""

    prompts: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...]

    @cached_property
    def expected(self) -> tuple[tuple[int, ...], ...]:
        """Return the expert's own greedy answers."""
        model: Any = AutoModelForCausalLM.from_pretrained(demo.EXPERT, dtype=torch.float32)
        return tuple(tuple(self._answer(model, prompt)) for prompt in self.prompts)

    def request(self, number: int, policy: DecodingParams, **more: Any) -> Request:
        """Return the request for a prompt; answers differ in their longest length."""
        defaults: dict[str, Any] = {"mode": Mode.SPECULATIVE, "max_tokens": LONGEST - number % 5}
        return Request(
            prompt=self.prompts[number],
            policy=replace(policy, stop_ids=self.stop_ids),
            **(defaults | more),
        )

    def _answer(self, model: Any, prompt: tuple[int, ...]) -> Sequence[int]:
        with torch.inference_mode():
            text = model.generate(
                torch.tensor([prompt]),
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
                max_new_tokens=LONGEST,
                do_sample=False,
            )
        return text[0, len(prompt) :].tolist()


def work(count: int) -> Work:
    """Return prompts of all families, as the chat template makes them."""
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.EXPERT)
    each = -(-count // len(Family))
    items = [item for family in Family for item in held_out(family, count=each, seed=5)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.prompt}], add_generation_prompt=True
        )["input_ids"]
        for item in islice(items, count)
    ]
    return Work(tuple(map(tuple, prompts)), (tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def few() -> Work:
    return work(12)


def shipped(**engine: Any) -> Application:
    """Return the pair that ships, both engines with the same settings."""
    tier = {"model": "demo", "engine": {"threads": 1, **engine}}
    return Application.model_validate({"drafter": tier, "expert": tier})


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[LocalServer]:
    async with local_server(shipped()) as running:
        yield running


async def write(server: LocalServer, request: Request) -> tuple[int, ...]:
    """Return the tokens of one answer."""
    pieces = [piece async for piece in server.router.generate(request)]
    return tuple(token for piece in pieces for token in piece.tokens)


async def write_all(server: LocalServer, requests: Sequence[Request]) -> list[tuple[int, ...]]:
    """Return answers written at once, 16 at a time."""
    turn = asyncio.Semaphore(16)

    async def one(request: Request) -> tuple[int, ...]:
        async with turn:
            return await write(server, request)

    return list(await asyncio.gather(*map(one, requests)))


def own(works: Work, number: int, *, longest: int) -> tuple[int, ...]:
    return works.expected[number][:longest]


@pytest.mark.parametrize("block", BLOCKS)
async def test_greedy_text_is_the_experts_own_at_every_block_length(
    few: Work, server: LocalServer, block: int
) -> None:
    """Sixteen sessions of different lengths at once, and one alone."""
    requests = [few.request(i, GREEDY, draft_tokens=block) for i in range(len(few.prompts))]
    answers = await write_all(server, requests)
    for number, (request, answer) in enumerate(zip(requests, answers, strict=True)):
        assert answer == own(few, number, longest=request.max_tokens)
    alone = block % len(requests)
    assert await write(server, requests[alone]) == answers[alone]


async def test_replayed_steps_write_the_experts_own_text_too(few: Work) -> None:
    async with local_server(shipped(path="captured")) as server:
        for mode in (Mode.SPECULATIVE, Mode.EXPERT_ONLY):
            requests = [few.request(i, GREEDY, mode=mode) for i in range(len(few.prompts))]
            for number, answer in enumerate(await write_all(server, requests)):
                assert answer == own(few, number, longest=requests[number].max_tokens)
        for tier in (server.drafter, server.expert):
            assert isinstance(tier.engine.runner, CudaGraphRunner)
            assert tier.engine.runner.recorded


async def test_the_expert_alone_writes_the_same(few: Work, server: LocalServer) -> None:
    requests = [few.request(i, GREEDY, mode=Mode.EXPERT_ONLY) for i in range(len(few.prompts))]
    for number, answer in enumerate(await write_all(server, requests)):
        assert answer == own(few, number, longest=requests[number].max_tokens)


async def test_seeded_text_depends_on_the_expert_alone(few: Work, server: LocalServer) -> None:
    """Under the gumbel coupling block length, company and drafting change nothing."""
    alone = [few.request(i, SEEDED, mode=Mode.EXPERT_ONLY) for i in range(len(few.prompts))]
    expected = await write_all(server, alone)
    for block in (1, 2, 3, 5, 8, 16):
        requests = [few.request(i, SEEDED, draft_tokens=block) for i in range(len(few.prompts))]
        assert await write_all(server, requests) == expected
    assert await write(server, few.request(3, SEEDED)) == expected[3]
    other = [few.request(i, replace(SEEDED, seed=12)) for i in range(len(few.prompts))]
    assert await write_all(server, other) != expected


@pytest.fixture(scope="module")
async def guessing(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalServer]:
    """A server whose drafter knows the words and nothing else."""
    folder: Path = tmp_path_factory.mktemp("guessing")
    torch.manual_seed(0)
    guesser = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo.DRAFTER))
    guesser.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo.DRAFTER).save_pretrained(folder)
    settings = Application.model_validate(
        {
            "drafter": {"model": str(folder), "engine": {"threads": 1}},
            "expert": {"model": "demo", "engine": {"threads": 1, "prefix_reuse": False}},
        }
    )
    async with local_server(settings) as running:
        yield running


async def test_a_random_drafter_changes_no_token(
    few: Work, server: LocalServer, guessing: LocalServer
) -> None:
    """Nor does the expert's reuse of prefixes, which is off there."""
    for policy in (GREEDY, SEEDED):
        requests = [few.request(i, policy, draft_tokens=4) for i in range(len(few.prompts))]
        assert await write_all(guessing, requests) == await write_all(server, requests)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("reuse", [True, False])
async def test_two_hundred_prompts_at_every_block_length(*, reuse: bool) -> None:
    """Alone and sixteen at once, with and without prefix reuse."""
    many = work(200)
    tier = {"model": "demo", "engine": {"threads": 1, "prefix_reuse": reuse}}
    settings = Application.model_validate({"drafter": tier, "expert": tier})
    async with local_server(settings) as running:
        for block in BLOCKS:
            requests = [many.request(i, GREEDY, draft_tokens=block) for i in range(200)]
            together = await write_all(running, requests)
            alone = [await write(running, request) for request in requests]
            for number, request in enumerate(requests):
                wanted = own(many, number, longest=request.max_tokens)
                assert together[number] == alone[number] == wanted
