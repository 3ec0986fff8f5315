"""Every rule is its law: what the fast path would do to every draft, counted, against rationals."""

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

from cascade.rules import Lossy, TokenV1, TokenV2, TokenV3
from cascade.speculation.payload import sends_ids_only, wants_target
from cascade.speculation.verify import rows_needed
from cascade.speculation.verify_batch import VerifyTask, build_batch
from cascade.types import Block, Bonus, DecodingParams, RowFormat, Verification

if TYPE_CHECKING:
    from cascade.rules import Rule

VOCAB, DRAFTED, LENGTH = 3, 2, 3

CLOSE = 1e-9

PROOF = settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """Integer weights of both models' rows after every text, as few as hypothesis likes."""

    drafter: tuple[tuple[int, ...], ...]
    expert: tuple[tuple[int, ...], ...]

    def weights_q(self, text: tuple[int, ...]) -> tuple[Fraction, ...]:
        """Return weights that float16 holds exactly."""
        weights = self.drafter[self._index(text)]
        return tuple(Fraction(w, 16) for w in weights)

    def q(self, text: tuple[int, ...]) -> enumeration.Row:
        return enumeration.norm(self.weights_q(text))

    def p(self, text: tuple[int, ...]) -> enumeration.Row:
        return enumeration.norm(tuple(Fraction(w) for w in self.expert[self._index(text)]))

    def tree(self, rule: Rule) -> enumeration.Tree:
        return enumeration.Tree(q=self.q, p=self.p, rule=rule)

    def _index(self, text: tuple[int, ...]) -> int:
        return sum((v + 1) * (VOCAB + 1) ** i for i, v in enumerate(text)) % len(self.drafter)


def rows(least: int) -> st.SearchStrategy[tuple[tuple[int, ...], ...]]:
    row = st.tuples(*[st.integers(least, 16)] * VOCAB).filter(any)
    return st.tuples(*[row] * 7)


worlds = st.builds(World, drafter=rows(1), expert=rows(0))


def fast_round(world: World, policy: DecodingParams, text: tuple[int, ...]) -> bigram_models.Floats:
    """Return the law of one round after a text, as the fast path computes it, in float64."""
    tasks, logits, chances = list[VerifyTask](), list[torch.Tensor](), list[float]()
    for draft in itertools.product(range(VOCAB), repeat=DRAFTED):
        prefixes = [(*text, *draft[:j]) for j in range(DRAFTED + 1)]
        qs = [world.q(prefix) for prefix in prefixes]
        here = [q[v] for q, v in zip(qs, draft, strict=False)]
        told = len(prefixes) if wants_target(policy) else DRAFTED
        block = Block(
            tokens=draft,
            likelihoods=tuple(float(x) for x in here),
            unscaled=tuple(float(x) for x in here),
            draft_stats=tuple(bigram_models.gates_of(q) for q in qs[:told]),
            rows=()
            if sends_ids_only(policy)
            else tuple(
                bigram_models.wire_row(world.weights_q(x), unscaled=True) for x in prefixes[:told]
            ),
        )
        tasks.append(VerifyTask(policy=policy, position=len(text), block=block))
        count = rows_needed(policy, draft)
        p = [[float(x) for x in world.p(prefix)] for prefix in prefixes[:count]]
        logits.append(torch.tensor(p, dtype=torch.float64).log())
        chances.append(float(math.prod(here)))
    return bigram_models.round_law(build_batch(torch.cat(logits), tasks), chances)


def texts(world: World, policy: DecodingParams) -> bigram_models.Floats:
    """Return the law of the first tokens of an answer, round after round."""
    done: defaultdict[tuple[int, ...], float] = defaultdict(float)
    open_: bigram_models.Floats = {(): 1.0}
    while open_:
        after: defaultdict[tuple[int, ...], float] = defaultdict(float)
        for text, mass in open_.items():
            for more, chance in fast_round(world, policy, text).items():
                longer = (*text, *more)[:LENGTH]
                (done if len(longer) == LENGTH else after)[longer] += mass * chance
        open_ = after
    return done


def assert_same(found: bigram_models.Floats, wanted: enumeration.Texts) -> None:
    for text in found.keys() | wanted.keys():
        assert found.get(text, 0.0) == pytest.approx(float(wanted.get(text, 0)), abs=CLOSE), text


def policies(rule: Rule, **changes: object) -> DecodingParams:
    return replace(DecodingParams(rule=rule, rows=RowFormat.FULL), **changes)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("bonus", Bonus)
@PROOF
@given(world=worlds)
def test_a_round_is_gen_spec_sample(rule: Rule, bonus: Bonus, world: World) -> None:
    """Token by token, what a round commits has the law of Algorithm 4, whatever the bonus."""
    found = fast_round(world, policies(rule, bonus=bonus), ())
    wanted = enumeration.gen_spec_sample(world.tree(rule), (), drafted=DRAFTED, bonus=bonus)
    assert_same(found, wanted)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("verification", Verification)
@pytest.mark.parametrize("bonus", [Bonus.NONE, Bonus.TARGET])
@settings(parent=PROOF, max_examples=2)
@given(world=worlds)
def test_an_answer_is_the_product_of_pi(
    rule: Rule, verification: Verification, bonus: Bonus, world: World
) -> None:
    """With bonus none or target, texts longer than a block follow the product of pi exactly."""
    policy = policies(rule, bonus=bonus, verification=verification)
    assert_same(texts(world, policy), enumeration.product(world.tree(rule), LENGTH))


@pytest.mark.parametrize(
    "rule",
    [r for r in enumeration.RULES if sends_ids_only(DecodingParams(rule=r))],
    ids=lambda rule: rule.kind,
)
@PROOF
@given(world=worlds)
def test_token_rules_need_no_rows(rule: Rule, world: World) -> None:
    """Judged as one-hots, drafts give the same law, and it refuses sum r q (1 - p)."""
    policy = DecodingParams(rule=rule, bonus=Bonus.NONE)
    assert sends_ids_only(policy)
    assert_same(texts(world, policy), enumeration.product(world.tree(rule), LENGTH))
    q, p = world.q(()), world.p(())
    deferred = enumeration.unacceptable(rule, q, p)
    wanted = sum(float(a * (1 - b)) for a, b, r in zip(q, p, deferred, strict=True) if r)
    refused = sum(m for text, m in fast_round(world, policy, ()).items() if len(text) == 1)
    assert refused == pytest.approx(wanted, abs=CLOSE)


@PROOF
@given(world=worlds)
def test_the_solved_lossy_law_is_one(world: World) -> None:
    """With beta solved, pi is max(min(q, p / (1 - alpha)), p / beta), and answers follow it."""
    policy = policies(Lossy(alpha=0.3137, beta="solved"), bonus=Bonus.NONE)
    first: defaultdict[int, float] = defaultdict(float)
    for text, mass in texts(world, policy).items():
        first[text[0]] += mass
    pairs = list(zip(world.q(()), world.p(()), strict=True))
    lenient = [min(float(q), float(p) / (1 - 0.3137)) for q, p in pairs]
    raised = [v for v in range(VOCAB) if first[v] > lenient[v] + CLOSE]
    shares = [first[v] / float(world.p(())[v]) for v in raised]
    assert sum(first.values()) == pytest.approx(1)
    assert all(first[v] >= lenient[v] - CLOSE for v in range(VOCAB))
    assert all(share == pytest.approx(shares[0], rel=1e-6) for share in shares)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
@PROOF
@given(world=worlds)
def test_nothing_refuses_less(rule: Rule, world: World) -> None:
    """P(refuse) = D_TV(pi, q): no procedure that proposes from q can refuse less."""
    found = fast_round(world, policies(rule, bonus=Bonus.NONE), ())
    # A text of one token is a refusal of the first: a refused second has two tokens again.
    refused = sum(mass for text, mass in found.items() if len(text) == 1)
    least = enumeration.distance(world.tree(rule).pi(()), world.q(()))
    assert refused == pytest.approx(float(least), abs=CLOSE)


@settings(parent=PROOF, max_examples=15)
@given(world=worlds)
def test_block_verification_keeps_no_less(world: World) -> None:
    """Block verification commits at least as many tokens a round."""
    policy = policies(TokenV3(alpha=0.5119), bonus=Bonus.EXPERT)
    tokens = [
        sum(len(text) * mass for text, mass in fast_round(world, p, ()).items())
        for p in (policy, replace(policy, verification=Verification.BLOCK))
    ]
    assert tokens[1] >= tokens[0] - CLOSE


@pytest.mark.parametrize("rule", [TokenV1(alpha=-1), TokenV2(alpha=-0.0137)])
@PROOF
@given(world=worlds)
def test_token_rules_that_defer_everything_are_lossless(rule: Rule, world: World) -> None:
    """`token_v1` at alpha -1 and `token_v2` under 0 give the expert's law."""
    lossless = enumeration.product(
        enumeration.Tree(q=world.q, p=world.p, rule=enumeration.RULES[0]), LENGTH
    )
    assert_same(texts(world, policies(rule, bonus=Bonus.NONE)), lossless)


@pytest.mark.slow
@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize("verification", Verification)
@settings(parent=PROOF, max_examples=100)
@given(world=worlds)
def test_many_worlds_agree(rule: Rule, verification: Verification, world: World) -> None:
    """The product of pi again, over many more pairs of models."""
    policy = policies(rule, bonus=Bonus.TARGET, verification=verification)
    assert_same(texts(world, policy), enumeration.product(world.tree(rule), LENGTH))
