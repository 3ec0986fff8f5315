"""Phases and thinking budgets with the shipped pair: both tiers, drafting ahead, real blocks."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from cascade import demo
from cascade.expert.expert import Expert
from cascade.local import LocalServer, local_server
from cascade.rules import Diff, Lossless
from cascade.types import (
    Bonus,
    DecodingParams,
    Mode,
    Origin,
    Phase,
    PhaseRules,
    PhaseSwitch,
    Request,
    SamplingParams,
)

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Pair

    from cascade.rules import Rule

ASK: Any = [{"role": "user", "content": "Who is Buzz Aldrin?"}]

LENGTH = 32

KEEP_ALL = Diff(alpha=1)  # every token of the drafter


@pytest.fixture
def pair(shipped_server: LocalServer) -> LocalServer:
    return shipped_server


@cache
def model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@cache
@torch.inference_mode()
def greedy(path: Path, tokens: tuple[int, ...], count: int) -> list[int]:
    whole = list(tokens)
    for _ in range(count):
        whole.append(int(model(path)(torch.tensor([whole])).logits[0, -1].argmax()))
    return whole[len(tokens) :]


async def generate(
    pair: LocalServer, phases: PhaseRules, *, draft_tokens: int | None
) -> tuple[list[int], list[Origin]]:
    request = Request(
        prompt=tuple(pair.service.tokenizer.chat(ASK)),
        policy=DecodingParams(
            sampling=SamplingParams(temperature=0), phases=phases, bonus=Bonus.NONE
        ),
        mode=Mode.CASCADE,
        max_tokens=LENGTH,
        draft_tokens=draft_tokens,
    )
    tokens, origins = list[int](), list[Origin]()
    async for chunk in pair.service.generator.generate(request):
        tokens += chunk.tokens
        origins += chunk.origins
    return tokens, origins


@pytest.mark.parametrize("draft_tokens", [1, 5, None])
@pytest.mark.parametrize("rules", [(Lossless(), KEEP_ALL), (KEEP_ALL, Lossless())])
async def test_a_rule_holds_from_the_token_after_the_marker(
    pair: LocalServer, rules: tuple[Rule, Rule], draft_tokens: int | None
) -> None:
    """Lossless, the text is the expert's; under a rule that keeps all drafts, the drafter's."""
    paths: dict[Any, Path] = {Lossless: demo.EXPERT, Diff: demo.DRAFTER}
    prompt = list(pair.service.tokenizer.chat(ASK))
    before = greedy(paths[type(rules[0])], tuple(prompt), LENGTH)
    marker = next(
        (before[at - 1], before[at])
        for at in range(7, LENGTH)
        if (before[at - 1], before[at]) not in pairwise(before[:at])
    )
    at = 1 + next(i for i in range(1, LENGTH) if (before[i - 1], before[i]) == marker)
    switch = PhaseSwitch(phase=Phase.THINKING, tokens=marker, next=Phase.TOOL)
    phases = PhaseRules(
        start=Phase.THINKING,
        switches=(switch,),
        rules=((Phase.THINKING, rules[0]), (Phase.TOOL, rules[1])),
    )
    tokens, origins = await generate(pair, phases, draft_tokens=draft_tokens)
    after = greedy(paths[type(rules[1])], (*prompt, *before[:at]), LENGTH - at)
    assert tokens == before[:at] + after
    kept = slice(at, None) if rules[1] is KEEP_ALL else slice(0, at)
    assert Origin.EXPERT not in origins[kept]


@pytest.mark.parametrize("draft_tokens", [0, 1, 5, 16, None])
async def test_thoughts_end_when_their_budget_is_spent(
    pair: LocalServer, draft_tokens: int | None
) -> None:
    """The rest is what the expert says after them."""
    prompt = list(pair.service.tokenizer.chat(ASK))
    end = pair.service.tokenizer.encode("</think>", add_special=False)
    assert len(end) > 1
    switch = PhaseSwitch(phase=Phase.THINKING, tokens=end, next=Phase.ANSWER)
    phases = PhaseRules(start=Phase.THINKING, switches=(switch,), thinking_tokens=7)
    tokens, _ = await generate(pair, phases, draft_tokens=draft_tokens)
    thoughts = [*greedy(demo.EXPERT, tuple(prompt), 7), *end]
    rest = greedy(demo.EXPERT, (*prompt, *thoughts), LENGTH - len(thoughts))
    assert tokens == [*thoughts, *rest]


async def test_answers_with_different_budgets_do_not_disturb_each_other(pair: LocalServer) -> None:

    end = pair.service.tokenizer.encode("</think>", add_special=False)
    switch = PhaseSwitch(phase=Phase.THINKING, tokens=end, next=Phase.ANSWER)
    phases = PhaseRules(start=Phase.THINKING, switches=(switch,))
    found = await asyncio.gather(
        *(
            generate(pair, replace(phases, thinking_tokens=budget), draft_tokens=None)
            for budget in (0, 3, 9)
        )
    )
    for (tokens, _), budget in zip(found, (0, 3, 9), strict=True):
        assert tokens[budget : budget + len(end)] == list(end)


async def test_an_expert_that_dies_among_phases_changes_no_token(toy: Pair) -> None:
    """The next replica finds phase and budget in the committed tokens."""
    end: tuple[int, ...] = (4, 1)
    reborn: Expert | None = None
    phases = PhaseRules(
        start=Phase.THINKING,
        switches=(PhaseSwitch(phase=Phase.THINKING, tokens=end, next=Phase.ANSWER),),
        rules=((Phase.THINKING, Lossless()), (Phase.ANSWER, KEEP_ALL)),
        thinking_tokens=6,
    )
    policy = DecodingParams(sampling=SamplingParams(temperature=0), phases=phases, bonus=Bonus.NONE)
    request = Request(prompt=(3, 1, 4), policy=policy, max_tokens=20, draft_tokens=2)
    answers = list[list[int]]()
    for dies in (False, True):
        tokens, failovers = list[int](), 0
        async with local_server(toy.settings(router={"draft_deadline_s": 120})) as server:
            async for chunk in server.router.generate(request):
                tokens += chunk.tokens
                failovers = chunk.statistics.failovers if chunk.statistics else failovers
                if dies and reborn is None and len(tokens) >= 4:
                    await server.expert.stop()
                    reborn = await Expert.start(
                        toy.settings().expert.options(),
                        address=server.expert.address,
                        token=server.token,
                    )
        assert (failovers >= 1) == dies
        answers.append(tokens)
    assert reborn is not None
    await reborn.stop()
    assert answers[0] == answers[1]
    assert tuple(answers[0][6:8]) == end
