"""A drafter whose drafts are all rejected is hardly asked; no single caller brings that about."""

from __future__ import annotations

import random
from itertools import count
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.clock import FakeClock

from cascade.router.circuit_breaker import (
    MAX_BREAKERS,
    PROBE_PERIOD_S,
    PROMPT_TOKENS,
    CircuitBreaker,
)
from cascade.rules import Diff, Lossless, Lossy, Rule, TokenV3, Typical
from cascade.types import DecodingParams, Session, SessionId, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable

HERE, RULE = "drafter:1", Lossless()
PROMPTS = count()  # each a new one


def judge(
    breaker: CircuitBreaker,
    *,
    accepted: int,
    prompt: int = 1,
    rule: Rule = RULE,
    first: bool = False,
) -> None:
    """Let a block of four be judged: of the beginning of an answer, or from later on."""
    policy, tokens = DecodingParams(rule=rule), () if first else (1,)
    session = Session(id=SessionId("s"), prompt=(prompt,), policy=policy, tokens=tokens)
    verdict = Verdict(accepted=accepted, tokens=(), origins=(), judged=min(accepted + 1, 4))
    breaker.record(HERE, session, verdict, prompt=prompt)


def draft(
    breaker: CircuitBreaker,
    *,
    rate: float,
    blocks: int,
    prompts: Iterable[int] = PROMPTS,
    chance: random.Random | None = None,
    **more: Any,
) -> int:
    """Let blocks be judged where each token stands so often; return those until it opens.

    Every block is of the next of `prompts`.
    """
    chance = chance or random.Random(7)  # noqa: S311 - reproducible luck, no secret
    for block, prompt in zip(range(blocks), prompts, strict=False):
        accepted = next((i for i in range(4) if chance.random() >= rate), 4)
        judge(breaker, accepted=accepted, prompt=prompt, **more)
        if breaker.suspects():
            return block + 1
    return blocks


def collapsed(clock: FakeClock | None = None, *, rule: Rule = RULE) -> CircuitBreaker:
    """Return a breaker that has opened for one drafter and rule, and let its first block through.

    The next is due after a period.
    """
    breaker = CircuitBreaker(clock=clock or FakeClock())
    draft(breaker, rate=0.0, blocks=100, rule=rule)
    assert breaker.suspects() == {rule.kind: 1}
    assert breaker.allows(HERE, rule)
    return breaker


@pytest.mark.parametrize("before", [0, 1000])
def test_a_collapse_is_seen_within_rounds(before: int) -> None:
    breaker = CircuitBreaker(clock=FakeClock())
    assert draft(breaker, rate=0.8, blocks=before) == before
    assert draft(breaker, rate=0.0, blocks=1000) <= 40


def test_long_answers_to_five_prompts_show_a_collapse() -> None:
    breaker = CircuitBreaker(clock=FakeClock())
    answers = [prompt for prompt in range(5) for _ in range(100)]
    assert draft(breaker, rate=0.0, blocks=500, prompts=answers) == 400 + PROMPT_TOKENS


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_a_drafter_of_some_use_is_kept(rate: float) -> None:
    breaker = CircuitBreaker(clock=FakeClock())
    assert draft(breaker, rate=rate, blocks=5_000) == 5_000


@given(st.integers(1, 4), st.integers(1, 400), st.randoms(use_true_random=False))
def test_a_few_prompts_show_nothing_however_often_they_are_sent(
    prompts: int, blocks: int, chance: random.Random
) -> None:
    breaker = CircuitBreaker(clock=FakeClock())
    sent = [chance.randrange(prompts) for _ in range(blocks)]
    assert draft(breaker, rate=0.0, blocks=blocks, prompts=sent) == blocks
    assert breaker.allows(HERE, RULE)


def test_rejected_first_tokens_of_answers_show_nothing() -> None:
    breaker = CircuitBreaker(clock=FakeClock())
    assert draft(breaker, rate=0.0, blocks=1000, first=True) == 1000


@pytest.mark.parametrize("rule", [Lossless(), Lossy(alpha=0.1), TokenV3(alpha=0.9), Typical()])
def test_a_collapse_under_one_rule_concerns_no_other_rule_and_no_other_drafter(rule: Rule) -> None:
    breaker = collapsed(rule=rule)
    assert not breaker.allows(HERE, rule)
    assert breaker.allows("another:1", rule)
    others = [kind for kind in get_args(Rule) if kind is not type(rule)]
    assert len(others) > 10
    for other in (Diff(alpha=0.5), Lossy(alpha=0.2), TokenV3(alpha=0.8), TokenV3(alpha=0.91)):
        assert breaker.allows(HERE, other)


def test_an_open_breaker_lets_one_block_through_each_period() -> None:
    clock = FakeClock()
    breaker = collapsed(clock)
    asked = 0
    for _ in range(1000):
        clock.now_s += PROBE_PERIOD_S / 100
        if breaker.allows(HERE, RULE):
            asked += 1
            draft(breaker, rate=0.0, blocks=1)
    assert asked in (9, 10)  # ten periods, give or take rounding


@pytest.mark.parametrize(("rate", "limit_s"), [(0.9, 2), (0.5, 8), (0.25, 30)])
def test_a_drafter_that_drafts_well_again_is_used_again_within_seconds(
    rate: float, limit_s: float, caplog: pytest.LogCaptureFixture
) -> None:
    for seed in range(20):
        clock, chance = FakeClock(), random.Random(seed)  # noqa: S311 - as above
        breaker = collapsed(clock)
        began_s = clock.now_s
        while breaker.suspects():
            clock.now_s += 0.01
            if breaker.allows(HERE, RULE):
                draft(breaker, rate=rate, blocks=1, chance=chance)
        assert clock.now_s - began_s <= limit_s
        assert draft(breaker, rate=0.9, blocks=50, chance=chance) == 50
    assert HERE in caplog.text
    assert "again" in caplog.text


def test_first_tokens_of_answers_also_show_that_drafts_are_good_again() -> None:
    clock = FakeClock()
    breaker = collapsed(clock)
    clock.now_s += PROBE_PERIOD_S
    for _ in range(3):
        assert breaker.allows(HERE, RULE)
        judge(breaker, accepted=1, first=True)
    assert not breaker.suspects()


def test_rules_with_ever_new_parameters_fill_no_memory() -> None:
    """What was not asked for longest is forgotten."""
    breaker = collapsed()
    for number in range(MAX_BREAKERS):
        judge(breaker, accepted=0, rule=TokenV3(alpha=number / MAX_BREAKERS))
    assert breaker.suspects() == {}
