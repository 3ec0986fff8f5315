"""Lossless is lossless: the text is the expert's own, token for token.

The reference is plain `transformers` on the pair that ships, computed once per set of prompts.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.support.answers import generate, generate_all
from tests.support.generation import greedy_answer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cascade import demo
from cascade.engine.backends.cuda_graph import CudaGraphRunner
from cascade.evaluation.tasks.generate import held_out
from cascade.evaluation.tasks.item import TaskFamily
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

LENGTHS = range(1, 17)  # of drafts


@dataclass(frozen=True)
class Prompts:
    """Prompts for the shipped pair, and the answers of plain `transformers`."""

    prompts: tuple[tuple[int, ...], ...]
    stop_ids: tuple[int, ...]

    @cached_property
    def expected(self) -> tuple[tuple[int, ...], ...]:
        """Return the expert's own greedy answers."""
        model: Any = AutoModelForCausalLM.from_pretrained(demo.EXPERT, dtype=torch.float32)
        return tuple(tuple(self._answer(model, prompt)) for prompt in self.prompts)

    def request(self, number: int, policy: DecodingParams, **more: Any) -> Request:
        """Return the request for a prompt; the maximum lengths of answers differ."""
        defaults: dict[str, Any] = {"mode": Mode.SPECULATIVE, "max_tokens": LONGEST - number % 5}
        return Request(
            prompt=self.prompts[number],
            policy=replace(policy, stop_ids=self.stop_ids),
            **(defaults | more),
        )

    def requests(self, policy: DecodingParams, **more: Any) -> list[Request]:
        """Return the requests for all prompts."""
        return [self.request(i, policy, **more) for i in range(len(self.prompts))]

    def mixed_lengths(self, shift: int) -> list[Request]:
        """Return greedy requests whose draft lengths go through 1 .. 16, from a prompt on."""
        return [
            self.request(i, GREEDY, draft_tokens=LENGTHS[(i + shift) % len(LENGTHS)])
            for i in range(len(self.prompts))
        ]

    def greedy(self, requests: Sequence[Request]) -> list[tuple[int, ...]]:
        """Return the expected greedy answers to requests for all prompts."""
        return [
            answer[: request.max_tokens]
            for answer, request in zip(self.expected, requests, strict=True)
        ]

    def _answer(self, model: Any, prompt: tuple[int, ...]) -> Sequence[int]:
        return greedy_answer(model, prompt, max_tokens=LONGEST)


def prompts_of(count: int) -> Prompts:
    """Return prompts of all task families, in the chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.EXPERT)
    each = -(-count // len(TaskFamily))
    items = [item for family in TaskFamily for item in held_out(family, count=each, seed=5)]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": item.prompt}], add_generation_prompt=True
        )["input_ids"]
        for item in islice(items, count)
    ]
    return Prompts(tuple(map(tuple, prompts)), (tokenizer.eos_token_id,))


@pytest.fixture(scope="module")
def few() -> Prompts:
    return prompts_of(12)


@pytest.fixture(scope="module")
def many() -> Prompts:
    return prompts_of(200)


def shipped(**engine: Any) -> Application:
    """Return settings of the pair that ships, the same for both engines."""
    tier = {"model": "demo", "engine": {"threads": 1, **engine}}
    return Application.model_validate({"drafter": tier, "expert": tier})


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[LocalServer]:
    async with local_server(shipped()) as running:
        yield running


@pytest.mark.parametrize("shift", [0, 8])  # 12 prompts: each length is there
async def test_greedy_text_is_the_experts_own_at_every_draft_length(
    few: Prompts, server: LocalServer, shift: int
) -> None:
    """Sessions with different draft lengths share batches; one runs alone."""
    requests = few.mixed_lengths(shift)
    answers = await generate_all(server, requests)
    assert answers == few.greedy(requests)
    assert await generate(server, requests[shift // 2]) == answers[shift // 2]


async def test_the_captured_path_writes_the_experts_own_text_too(few: Prompts) -> None:
    async with local_server(shipped(path="captured")) as server:
        for mode in (Mode.SPECULATIVE, Mode.EXPERT_ONLY):
            requests = few.requests(GREEDY, mode=mode)
            assert await generate_all(server, requests) == few.greedy(requests)
        for tier in (server.drafter, server.expert):
            assert isinstance(tier.engine.runner, CudaGraphRunner)
            assert tier.engine.runner.captured_buckets


async def test_expert_only_writes_the_same(few: Prompts, server: LocalServer) -> None:
    requests = few.requests(GREEDY, mode=Mode.EXPERT_ONLY)
    assert await generate_all(server, requests) == few.greedy(requests)


async def test_seeded_gumbel_text_depends_on_the_expert_alone(
    few: Prompts, server: LocalServer
) -> None:
    """Draft length, batch and drafting change nothing."""
    expected = await generate_all(server, few.requests(SEEDED, mode=Mode.EXPERT_ONLY))
    for length in (1, 5, 16):
        requests = few.requests(SEEDED, draft_tokens=length)
        assert await generate_all(server, requests) == expected
    assert await generate(server, few.request(3, SEEDED)) == expected[3]
    other_seed = few.requests(replace(SEEDED, seed=12))
    assert await generate_all(server, other_seed) != expected


@pytest.fixture(scope="module")
async def random_drafter_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[LocalServer]:
    """A server whose drafter has random weights."""
    folder: Path = tmp_path_factory.mktemp("random_drafter")
    torch.manual_seed(0)
    random_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(demo.DRAFTER))
    random_model.save_pretrained(folder)
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
    few: Prompts, server: LocalServer, random_drafter_server: LocalServer
) -> None:
    """Nor does prefix reuse of the expert, which is off there."""
    greedy, seeded = (few.requests(policy, draft_tokens=4) for policy in (GREEDY, SEEDED))
    assert await generate_all(random_drafter_server, greedy) == few.greedy(greedy)
    found = await generate_all(random_drafter_server, seeded)
    assert found == await generate_all(server, seeded)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("reuse", [True, False])
async def test_two_hundred_prompts_at_every_draft_length(many: Prompts, *, reuse: bool) -> None:
    """Every prompt at every length in shared batches, and at one length alone."""
    async with local_server(shipped(prefix_reuse=reuse)) as server:
        for shift in range(len(LENGTHS)):
            requests = many.mixed_lengths(shift)
            assert await generate_all(server, requests) == many.greedy(requests)
        requests = many.mixed_lengths(0)
        alone = [await generate(server, request) for request in requests]
        assert alone == many.greedy(requests)
