"""Divergence, budgets and costs of answers of a whole server, against the formulas."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests import reference

from cascade.local import local_server
from cascade.rules import Chow, Diff, Lossless, Rule, TokenV3
from cascade.types import (
    Bonus,
    Coupling,
    DecodingParams,
    Mode,
    Request,
    SequenceCascadeParams,
    Statistics,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.conftest import Pair
    from torch import Tensor

    from cascade.local import LocalServer

PROMPT = (3, 1, 4, 1, 5)
RULES: tuple[Rule, ...] = (TokenV3(alpha=0.7), Diff(alpha=0.1), Chow(alpha=0.8))


@pytest.fixture(scope="module")
async def server(toy: Pair) -> AsyncIterator[LocalServer]:
    async with local_server(toy.settings(router={"draft_deadline_s": 60}), direct=True) as running:
        yield running


async def answer(
    server: LocalServer, *, mode: Mode = Mode.CASCADE, **policy: Any
) -> tuple[list[int], Statistics]:
    """Return the tokens of one answer and what it says of itself."""
    request = Request(
        prompt=PROMPT,
        policy=replace(DecodingParams(bonus=Bonus.NONE), **policy),
        mode=mode,
        max_tokens=12,
        draft_tokens=3,
        patience=SequenceCascadeParams(threshold=-1e9),
        trace=True,
    )
    chunks = [chunk async for chunk in server.router.generate(request)]
    statistics = chunks[-1].statistics
    assert statistics is not None
    return [token for chunk in chunks for token in chunk.tokens], statistics


def _logits(model: Any, ids: Sequence[int]) -> Tensor:
    return model(torch.tensor([list(ids)])).logits[0, -1]


def distances(toy: Pair, tokens: list[int], rule: Rule) -> list[float]:
    """Return the total variation between the rule's distributions and the expert's."""
    models = [partial(_logits, folder.model) for folder in (toy.drafter, toy.expert)]
    policy = DecodingParams(rule=rule, divergence_budget=0.0)
    pair = reference.ModelPair(prompt=PROMPT, drafter=models[0], expert=models[1], policy=policy)
    with torch.inference_mode():
        return [
            reference.divergence(rule, pair.probs_after(tokens[:length]))
            for length in range(len(tokens))
        ]


@pytest.mark.parametrize("coupling", Coupling)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.kind)
async def test_an_answer_says_its_divergence_and_stays_within_its_budget(
    server: LocalServer, toy: Pair, rule: Rule, coupling: Coupling
) -> None:
    """Up to the first token that would exceed it, then the expert writes."""
    for seed, budget in enumerate((1e6, 1.2, 0.0)):
        tokens, found = await answer(
            server, rule=rule, coupling=coupling, seed=seed, divergence_budget=budget
        )
        wanted, spent = 0.0, False
        for distance in distances(toy, tokens, rule):
            spent = spent or wanted + distance > budget
            wanted += 0.0 if spent else distance
        assert found.divergence == pytest.approx(wanted, abs=1e-4)
        assert found.divergence <= budget + 1e-6
        assert (found.unmeasured_tokens, found.spent_budgets) == (0, int(spent or not budget))
        assert sum(one.divergence or 0.0 for one in found.trace) == pytest.approx(found.divergence)
        assert found.undrafted_rounds == {}


async def test_what_is_not_known_is_counted_apart_and_what_is_lossless_is_zero(
    server: LocalServer,
) -> None:
    for mode, policy in (
        (Mode.CASCADE, {"rule": Lossless()}),
        (Mode.EXPERT_ONLY, {"rule": TokenV3(alpha=0.7)}),
        (Mode.CASCADE, {"rule": TokenV3(alpha=0.7), "divergence_budget": 0.0}),
    ):
        _, found = await answer(server, mode=mode, **policy)
        assert (found.divergence, found.unmeasured_tokens) == (0.0, 0)
    for mode, policy in (
        (Mode.DRAFTER_ONLY, {}),
        (Mode.SEQUENCE_CASCADE, {}),
        (Mode.CASCADE, {"rule": TokenV3(alpha=0.7)}),
    ):
        _, found = await answer(server, mode=mode, **policy)
        assert (found.divergence, found.unmeasured_tokens) == (0.0, found.tokens)
    for mode in (Mode.TOKEN_CASCADE, Mode.CASCADE):
        _, found = await answer(server, mode=mode, rule=Chow(alpha=0.8))
        assert found.unmeasured_tokens == found.kept_tokens > 0
        assert found.expert_tokens > 0


async def test_an_answer_says_what_it_took_of_each_tier(server: LocalServer) -> None:
    _, found = await answer(server, rule=Diff(alpha=0.1))
    assert found.drafter_pass_s > 0
    assert found.expert_pass_s > 0
    _, alone = await answer(server, mode=Mode.EXPERT_ONLY)
    assert (alone.drafter_pass_s, alone.drafter_passes) == (0, 0)
