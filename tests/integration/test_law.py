"""Every rule is its law, through drafter, expert and router over gRPC."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from scipy import stats
from tests.reference import Place, target

from cascade.rules import Chow, Lossless, Opt, TokenV3
from cascade.types import (
    Bonus,
    Coupling,
    DecodingParams,
    Mode,
    Request,
    SamplingParams,
    Verification,
)

if TYPE_CHECKING:
    from tests.conftest import Pair

    from cascade.local import LocalServer
    from cascade.rules import Rule

PROMPT = (3, 1, 4, 1, 5)

DRAFTED, LENGTH = 2, 3  # an answer is longer than a block: what follows one is judged too

SAMPLES, AT_ONCE = 1000, 50

TEMPERATURE = 1.5  # gates must read the unscaled rows

UNLIKELY = 1e-4


def law(pair: Pair, rule: Rule, *, length: int = LENGTH) -> dict[tuple[int, ...], float]:
    """Return the probability of each answer: the product of pi along it, from plain forwards."""
    answers = {(): 1.0}
    for position in range(length):
        longer = dict[tuple[int, ...], float]()
        for answer, probability in answers.items():
            rows = [
                model.logits((*PROMPT, *answer)).double() for model in (pair.drafter, pair.expert)
            ]
            q, p = ((row / TEMPERATURE).softmax(0) for row in rows)
            q0, p0 = (row.softmax(0) for row in rows)
            pi, _ = target(rule, Place(position=position, q=q, p=p, q0=q0, p0=p0))
            longer |= {(*answer, i): probability * float(pi[i]) for i in range(len(pi))}
        answers = longer
    return answers


async def sample(
    server: LocalServer, policy: DecodingParams, count: int, *, length: int = LENGTH
) -> Counter[tuple[int, ...]]:
    """Return how often each answer came."""
    turn = asyncio.Semaphore(AT_ONCE)

    async def one(seed: int) -> tuple[int, ...]:

        request = Request(
            prompt=PROMPT,
            policy=replace(policy, seed=seed),
            mode=Mode.CASCADE,
            max_tokens=length,
            draft_tokens=DRAFTED,
        )
        async with turn:
            pieces = [piece async for piece in server.router.generate(request)]
        return tuple(token for piece in pieces for token in piece.tokens)

    return Counter(await asyncio.gather(*(one(seed) for seed in range(count))))


def p_value(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Return how probable a worse fit is; rare answers are counted together."""
    count = seen.total()
    common = [answer for answer, probability in expected.items() if probability * count >= 5]
    observed = [seen[answer] for answer in common]
    wanted = [expected[answer] * count for answer in common]
    if len(common) < len(expected):
        observed.append(count - sum(observed))
        wanted.append(count - sum(wanted))
    return float(stats.chisquare(observed, wanted).pvalue)


RULES = {
    "lossless": Lossless(),
    "opt": Opt(alpha=0.3),
    "chow": Chow(alpha=0.55),
    "token_v3": TokenV3(alpha=0.6),
}


@pytest.mark.parametrize("bonus", [Bonus.NONE, Bonus.TARGET])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
async def test_answers_follow_the_product_of_targets(
    toy: Pair, toy_stack: LocalServer, rule: Rule, bonus: Bonus
) -> None:
    policy = DecodingParams(
        rule=rule, bonus=bonus, sampling=SamplingParams(temperature=TEMPERATURE)
    )
    expected = law(toy, rule)
    assert sum(expected.values()) == pytest.approx(1)
    assert p_value(await sample(toy_stack, policy, SAMPLES), expected) > UNLIKELY


@pytest.mark.parametrize("bonus", [Bonus.NONE, Bonus.TARGET])
async def test_the_last_token_follows_its_target_too(
    toy: Pair, toy_stack: LocalServer, bonus: Bonus
) -> None:
    """An answer of one token leaves room for a draft, not for the expert's own choice."""
    rule = RULES["token_v3"]
    policy = DecodingParams(
        rule=rule, bonus=bonus, sampling=SamplingParams(temperature=TEMPERATURE)
    )
    seen = await sample(toy_stack, policy, SAMPLES, length=1)
    assert p_value(seen, law(toy, rule, length=1)) > UNLIKELY
    assert p_value(seen, law(toy, RULES["lossless"], length=1)) < UNLIKELY


VARIANTS = {
    "gumbel": DecodingParams(coupling=Coupling.GUMBEL, bonus=Bonus.TARGET, rule=TokenV3(alpha=0.6)),
    "block": DecodingParams(
        verification=Verification.BLOCK, bonus=Bonus.TARGET, rule=Opt(alpha=0.3)
    ),
}


@pytest.mark.parametrize("policy", VARIANTS.values(), ids=VARIANTS)
async def test_couplings_and_block_verification_change_no_law(
    toy: Pair, toy_stack: LocalServer, policy: DecodingParams
) -> None:

    policy = replace(policy, sampling=SamplingParams(temperature=TEMPERATURE))
    seen = await sample(toy_stack, policy, SAMPLES)
    assert p_value(seen, law(toy, policy.rule)) > UNLIKELY


async def test_the_laws_are_far_enough_apart_to_tell(toy: Pair, toy_stack: LocalServer) -> None:
    """The same samples refute every other rule's law."""
    policy = DecodingParams(
        rule=TokenV3(alpha=0.6), bonus=Bonus.NONE, sampling=SamplingParams(temperature=TEMPERATURE)
    )
    seen = await sample(toy_stack, policy, SAMPLES)
    for name, other in RULES.items():
        if name != "token_v3":
            assert p_value(seen, law(toy, other)) < UNLIKELY
