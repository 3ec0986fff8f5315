"""Proof that every rule gives its target distribution: all drafts and outcomes, enumerated.

The probabilities that the fast path computes are compared with exact rationals.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support import bigram_models, enumeration

from cascade.rules import Chow, ChowLog, Lossy, TokenV1, TokenV2, TokenV3
from cascade.speculation.payload import needs_probs_after_block, sends_ids_only
from cascade.speculation.verify import rows_needed
from cascade.speculation.verify_batch import VerifyTask, build_batch
from cascade.types import Block, Bonus, DecodingParams, RowFormat, Verification

if TYPE_CHECKING:
    from cascade.rules import Rule

VOCAB, DRAFTED, LENGTH = 3, 2, 3

CLOSE = 1e-9

PROOF = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Integer weights of both models' distributions after every text."""

    drafter: tuple[tuple[int, ...], ...]
    expert: tuple[tuple[int, ...], ...]

    def weights_q(self, text: tuple[int, ...]) -> tuple[Fraction, ...]:
        """Return weights that float16 holds exactly."""
        weights = self.drafter[self._index(text)]
        return tuple(Fraction(w, 16) for w in weights)

    def q(self, text: tuple[int, ...]) -> enumeration.Probs:
        return enumeration.norm(self.weights_q(text))

    def p(self, text: tuple[int, ...]) -> enumeration.Probs:
        return enumeration.norm(tuple(Fraction(w) for w in self.expert[self._index(text)]))

    def pair(self, rule: Rule) -> enumeration.ModelPair:
        return enumeration.ModelPair(q=self.q, p=self.p, rule=rule)

    def _index(self, text: tuple[int, ...]) -> int:
        return sum((v + 1) * (VOCAB + 1) ** i for i, v in enumerate(text)) % len(self.drafter)


def weights(least: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    row = st.tuples(*[st.integers(least, 16)] * VOCAB).filter(any)
    return st.tuples(*[row] * 7)


model_pairs = st.builds(Models, drafter=weights(1), expert=weights(0))


def fast_round(
    models: Models, policy: DecodingParams, text: tuple[int, ...]
) -> bigram_models.Floats:
    """Return the distribution of one round after a text, as the fast path computes it."""
    tasks, logits, chances = list[VerifyTask](), list[torch.Tensor](), list[float]()
    for draft in itertools.product(range(VOCAB), repeat=DRAFTED):
        prefixes = [(*text, *draft[:j]) for j in range(DRAFTED + 1)]
        qs = [models.q(prefix) for prefix in prefixes]
        here = [q[v] for q, v in zip(qs, draft, strict=False)]
        count = len(prefixes) if needs_probs_after_block(policy) else DRAFTED
        block = Block(
            tokens=draft,
            likelihoods=tuple(float(x) for x in here),
            unscaled=tuple(float(x) for x in here),
            draft_stats=tuple(bigram_models.draft_stats_of(q) for q in qs[:count]),
            draft_probs=()
            if sends_ids_only(policy)
            else tuple(
                bigram_models.full_probs(models.weights_q(x), unscaled=True)
                for x in prefixes[:count]
            ),
        )
        tasks.append(VerifyTask(policy=policy, position=len(text), block=block))
        judging = prefixes[: rows_needed(policy, draft)]
        p = [[float(x) for x in models.p(prefix)] for prefix in judging]
        logits.append(torch.tensor(p, dtype=torch.float64).log())
        chances.append(float(math.prod(here)))
    return bigram_models.round_probs(build_batch(torch.cat(logits), tasks), chances)


def texts(models: Models, policy: DecodingParams) -> bigram_models.Floats:
    """Return the distribution of the first tokens of an answer, round after round."""
    done: defaultdict[tuple[int, ...], float] = defaultdict(float)
    open_: bigram_models.Floats = {(): 1.0}
    while open_:
        after: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for text, mass in open_.items():
            for more, chance in fast_round(models, policy, text).items():
                longer = (*text, *more)[:LENGTH]
                (done if len(longer) == LENGTH else after)[longer] += mass * chance
        open_ = after
    return done


def assert_same(found: bigram_models.Floats, wanted: enumeration.Texts) -> None:
    for text in found.keys() | wanted.keys():
        assert found.get(text, 0.0) == pytest.approx(float(wanted.get(text, 0)), abs=CLOSE), text


def policy_of(rule: Rule, **changes: object) -> DecodingParams:
    return replace(DecodingParams(rule=rule, rows=RowFormat.FULL), **changes)


@pytest.mark.parametrize(
    ("rule", "bonus"),
    [
        pytest.param(rule, bonus, id=f"{bonus}-{rule.kind}")
        for rule, bonus in itertools.product(enumeration.RULES, Bonus)
        if not sends_ids_only(policy_of(rule, bonus=bonus))
    ],
)
@PROOF
@given(models=model_pairs)
def test_a_round_is_gen_spec_sample(rule: Rule, bonus: Bonus, models: Models) -> None:
    """In token verification, what a round commits follows Algorithm 4, with every bonus."""
    found = fast_round(models, policy_of(rule, bonus=bonus), ())
    wanted = enumeration.gen_spec_sample(models.pair(rule), (), drafted=DRAFTED, bonus=bonus)
    assert_same(found, wanted)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize(
    ("verification", "bonus"),
    [
        (Verification.TOKEN, Bonus.TARGET),
        (Verification.BLOCK, Bonus.NONE),
        pytest.param(Verification.TOKEN, Bonus.NONE, marks=pytest.mark.slow),
        pytest.param(Verification.BLOCK, Bonus.TARGET, marks=pytest.mark.slow),
    ],
)
@settings(parent=PROOF, max_examples=2)
@given(models=model_pairs)
def test_an_answer_follows_the_product_of_pi(
    rule: Rule, verification: Verification, bonus: Bonus, models: Models
) -> None:
    """With bonus none or target, also where an answer is longer than a block."""
    policy = policy_of(rule, bonus=bonus, verification=verification)
    assert_same(texts(models, policy), enumeration.product(models.pair(rule), LENGTH))


@pytest.mark.parametrize(
    "rule",
    [r for r in enumeration.RULES if sends_ids_only(DecodingParams(rule=r))],
    ids=lambda rule: rule.kind,
)
@PROOF
@given(models=model_pairs)
def test_rules_that_need_no_probabilities(rule: Rule, models: Models) -> None:
    """Judging drafts as one-hots gives pi too, and rejects with probability sum r q (1 - p)."""
    policy = DecodingParams(rule=rule, bonus=Bonus.NONE)
    assert sends_ids_only(policy)
    assert_same(texts(models, policy), enumeration.product(models.pair(rule), LENGTH))
    q, p = models.q(()), models.p(())
    deferred: tuple[bool, ...]
    if isinstance(rule, Chow | ChowLog):
        deferred = (enumeration.defers(rule, q, p, q, p),) * VOCAB
    else:
        deferred = enumeration.unacceptable(rule, q, p)
    wanted = sum(float(a * (1 - b)) for a, b, r in zip(q, p, deferred, strict=True) if r)
    rejected = sum(m for text, m in fast_round(models, policy, ()).items() if len(text) == 1)
    assert rejected == pytest.approx(wanted, abs=CLOSE)


@PROOF
@given(models=model_pairs)
def test_the_solved_lossy_target_is_a_distribution(models: Models) -> None:
    """With beta solved, answers follow pi = max(min(q, p / (1 - alpha)), p / beta)."""
    policy = policy_of(Lossy(alpha=0.3137, beta="solved"), bonus=Bonus.NONE)
    first: defaultdict[int, float] = defaultdict(float)
    for text, mass in texts(models, policy).items():
        first[text[0]] += mass
    values = list(zip(models.q(()), models.p(()), strict=True))
    lenient = [min(float(q), float(p) / (1 - 0.3137)) for q, p in values]
    raised = [v for v in range(VOCAB) if first[v] > lenient[v] + CLOSE]
    shares = [first[v] / float(models.p(())[v]) for v in raised]
    assert sum(first.values()) == pytest.approx(1)
    assert all(first[v] >= lenient[v] - CLOSE for v in range(VOCAB))
    assert all(share == pytest.approx(shares[0], rel=1e-6) for share in shares)


@pytest.mark.parametrize(
    "rule",
    [r for r in enumeration.RULES if not sends_ids_only(policy_of(r))],
    ids=lambda rule: rule.kind,
)
@PROOF
@given(models=model_pairs)
def test_no_procedure_rejects_less(rule: Rule, models: Models) -> None:
    """P(reject) = D_TV(pi, q), the lower bound for any procedure that proposes from q."""
    found = fast_round(models, policy_of(rule, bonus=Bonus.NONE), ())
    # A round of one token rejected the first one; one that rejects the second has two tokens.
    rejected = sum(mass for text, mass in found.items() if len(text) == 1)
    least = enumeration.distance(models.pair(rule).pi(()), models.q(()))
    assert rejected == pytest.approx(float(least), abs=CLOSE)


@settings(parent=PROOF, max_examples=15)
@given(models=model_pairs)
def test_block_verification_accepts_no_less(models: Models) -> None:
    """Block verification commits at least as many tokens a round."""
    policy = policy_of(TokenV3(alpha=0.5119), bonus=Bonus.EXPERT)
    tokens = [
        sum(len(text) * mass for text, mass in fast_round(models, p, ()).items())
        for p in (policy, replace(policy, verification=Verification.BLOCK))
    ]
    assert tokens[1] >= tokens[0] - CLOSE


@pytest.mark.parametrize("rule", [TokenV1(alpha=-1), TokenV2(alpha=-0.0137)])
@PROOF
@given(models=model_pairs)
def test_token_rules_that_defer_everything_are_lossless(rule: Rule, models: Models) -> None:
    """`token_v1` at alpha -1 and `token_v2` below 0 give the expert's distribution."""
    lossless = enumeration.product(
        enumeration.ModelPair(q=models.q, p=models.p, rule=enumeration.RULES[0]), LENGTH
    )
    assert_same(texts(models, policy_of(rule, bonus=Bonus.NONE)), lossless)


@pytest.mark.slow
@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("verification", Verification)
@settings(parent=PROOF, max_examples=100)
@given(models=model_pairs)
def test_answers_of_many_model_pairs_follow_the_product_of_pi(
    rule: Rule, verification: Verification, models: Models
) -> None:
    """The proof above, for many more pairs of models."""
    policy = policy_of(rule, bonus=Bonus.TARGET, verification=verification)
    assert_same(texts(models, policy), enumeration.product(models.pair(rule), LENGTH))
