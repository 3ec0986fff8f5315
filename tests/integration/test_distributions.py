"""Answers sampled through router, drafter and expert follow the product of target distributions.

tests/speculation/test_distributions.py proves this for every rule by enumeration, without servers.
Here one rule of each kind of payload is sampled over the network path; the other combinations of
rule and bonus, which send the same fields, run in the slow suite.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
import torch
from scipy import stats
from tests.reference import PositionProbs, target_distribution
from tests.support.shipped_pair import SETTINGS
from transformers import AutoModelForCausalLM

from cascade import demo
from cascade.local import local_server
from cascade.rules import Chow, Diff, Lossless, Lossy, Opt, TokenV3
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
    from torch import Tensor

    from cascade.local import LocalServer
    from cascade.rules import Rule

PROMPT = (3, 1, 4, 1, 5)

DRAFTED, LENGTH = 2, 3  # an answer is longer than a block, so a second round is judged too

CONCURRENCY = 50

SAMPLES, MORE = 500, 1000  # fewer than more could not tell all four rules apart

SAMPLING = SamplingParams(temperature=1.5)  # q differs from q0, which rules must read

UNLIKELY = 1e-4

Answer: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class Experiment:
    """Expected and sampled answers; each is computed once, though several tests read it."""

    pair: Pair
    server: LocalServer
    _logits: dict[Answer, tuple[Tensor, Tensor]] = field(default_factory=dict)
    _samples: dict[tuple[DecodingParams, int], Counter[Answer]] = field(default_factory=dict)

    def expected(self, rule: Rule, *, length: int = LENGTH) -> dict[Answer, float]:
        """Return the probability of each answer: the product of pi, from plain forward passes."""
        answers: dict[Answer, float] = {(): 1.0}
        for position in range(length):
            longer = dict[Answer, float]()
            for answer, probability in answers.items():
                logits = self._plain_logits(answer)
                q, p = ((one / SAMPLING.temperature).softmax(0) for one in logits)
                q0, p0 = (one.softmax(0) for one in logits)
                at = PositionProbs(position=position, q=q, p=p, q0=q0, p0=p0)
                pi, _ = target_distribution(rule, at)
                longer |= {(*answer, i): probability * x for i, x in enumerate(pi.tolist())}
            answers = longer
        return answers

    async def sample(
        self, policy: DecodingParams, *, length: int = LENGTH, count: int = SAMPLES
    ) -> Counter[Answer]:
        """Return how often each answer was generated, over many seeds."""
        if (policy, length) not in self._samples:
            semaphore = asyncio.Semaphore(CONCURRENCY)

            async def one(seed: int) -> Answer:
                request = Request(
                    prompt=PROMPT,
                    # Two entries of eight: only lossless text may not depend on such a cut.
                    policy=replace(policy, seed=seed, row_entries=2),
                    mode=Mode.CASCADE,
                    max_tokens=length,
                    draft_tokens=DRAFTED,
                )
                async with semaphore:
                    chunks = [chunk async for chunk in self.server.router.generate(request)]
                return tuple(token for chunk in chunks for token in chunk.tokens)

            answers = await asyncio.gather(*map(one, range(count)))
            self._samples[policy, length] = Counter(answers)
        return self._samples[policy, length]

    def _plain_logits(self, answer: Answer) -> tuple[Tensor, Tensor]:
        if answer not in self._logits:
            text = (*PROMPT, *answer)
            drafter, expert = self.pair.drafter.logits(text), self.pair.expert.logits(text)
            self._logits[answer] = drafter.double(), expert.double()
        return self._logits[answer]


@pytest.fixture(scope="module")
def experiment(toy: Pair, toy_stack: LocalServer) -> Experiment:
    return Experiment(toy, toy_stack)


def p_value(seen: Counter[Answer], expected: dict[Answer, float]) -> float:
    """Return the p-value of a chi-square test; rare answers are counted together."""
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


@pytest.mark.parametrize(
    ("rule", "bonus"),
    [
        ("lossless", Bonus.NONE),
        ("chow", Bonus.NONE),  # its bonus is ignored: the expert is asked at deferrals only
        pytest.param("opt", Bonus.TARGET, marks=pytest.mark.slow),  # as block verification sends
        pytest.param("token_v3", Bonus.NONE, marks=pytest.mark.slow),
        pytest.param("lossless", Bonus.TARGET, marks=pytest.mark.slow),
        pytest.param("opt", Bonus.NONE, marks=pytest.mark.slow),
        pytest.param("token_v3", Bonus.TARGET, marks=pytest.mark.slow),
    ],
)
async def test_answers_follow_the_product_of_pi(
    experiment: Experiment, rule: str, bonus: Bonus
) -> None:
    policy = DecodingParams(rule=RULES[rule], bonus=bonus, sampling=SAMPLING)
    expected = experiment.expected(RULES[rule])
    assert sum(expected.values()) == pytest.approx(1)
    assert p_value(await experiment.sample(policy), expected) > UNLIKELY


async def test_the_samples_of_one_rule_refute_every_other_rule(experiment: Experiment) -> None:
    """So these tests can tell the distributions apart."""
    policy = DecodingParams(rule=RULES["token_v3"], bonus=Bonus.NONE, sampling=SAMPLING)
    seen = await experiment.sample(policy, count=MORE)
    for name, other in RULES.items():
        if name != "token_v3":
            assert p_value(seen, experiment.expected(other)) < UNLIKELY


@pytest.mark.parametrize("bonus", [Bonus.NONE, pytest.param(Bonus.TARGET, marks=pytest.mark.slow)])
async def test_the_last_token_follows_pi_too(experiment: Experiment, bonus: Bonus) -> None:
    """With a budget of one token, a draft is judged and no bonus follows."""
    rule = RULES["token_v3"]
    policy = DecodingParams(rule=rule, bonus=bonus, sampling=SAMPLING)
    seen = await experiment.sample(policy, length=1)
    assert p_value(seen, experiment.expected(rule, length=1)) > UNLIKELY
    assert p_value(seen, experiment.expected(RULES["lossless"], length=1)) < UNLIKELY


VARIANTS = {
    "gumbel": DecodingParams(coupling=Coupling.GUMBEL, bonus=Bonus.TARGET, rule=TokenV3(alpha=0.6)),
    "block": DecodingParams(
        verification=Verification.BLOCK, bonus=Bonus.TARGET, rule=Opt(alpha=0.3)
    ),
}


@pytest.mark.parametrize("policy", VARIANTS.values(), ids=VARIANTS)
async def test_gumbel_coupling_and_block_verification_follow_pi_too(
    experiment: Experiment, policy: DecodingParams
) -> None:
    seen = await experiment.sample(replace(policy, sampling=SAMPLING))
    assert p_value(seen, experiment.expected(policy.rule)) > UNLIKELY


@pytest.mark.slow
async def test_a_large_vocabulary_is_followed_to_its_tail() -> None:
    """The pair that ships spreads much of a token's probability over thousands of tokens."""
    prompt, samples = tuple(range(5, 25)), 1500
    logits: list[Tensor] = []
    for path in (demo.DRAFTER, demo.EXPERT):
        model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        with torch.inference_mode():
            logits.append(model(torch.tensor([prompt])).logits[0, -1].double())
    q, p = ((one / SAMPLING.temperature).softmax(0) for one in logits)
    q0, p0 = (one.softmax(0) for one in logits)
    at = PositionProbs(position=0, q=q, p=p, q0=q0, p0=p0)
    async with local_server(SETTINGS) as server:
        for rule in (Diff(alpha=1), Opt(alpha=0.3), Lossy(alpha=0.3)):
            policy = DecodingParams(rule=rule, bonus=Bonus.NONE, sampling=SAMPLING)

            async def one(seed: int, policy: DecodingParams = policy) -> Answer:
                request = Request(
                    prompt=prompt,
                    policy=replace(policy, seed=seed),
                    mode=Mode.CASCADE,
                    max_tokens=1,
                    draft_tokens=1,
                )
                chunks = [chunk async for chunk in server.router.generate(request)]
                return tuple(token for chunk in chunks for token in chunk.tokens)

            seen = Counter[Answer]()
            for first in range(0, samples, CONCURRENCY):
                seen.update(await asyncio.gather(*map(one, range(first, first + CONCURRENCY))))
            pi, _ = target_distribution(rule, at)
            expected = {(i,): x for i, x in enumerate(pi.tolist())}
            assert p_value(seen, expected) > UNLIKELY
            likeliest = set(q.topk(64).indices.tolist())
            tail = sum(count for (token,), count in seen.items() if token not in likeliest)
            wanted = float(sum(x for (i,), x in expected.items() if i not in likeliest))
            assert wanted * samples > 5
            assert stats.binomtest(tail, samples, wanted).pvalue > UNLIKELY
