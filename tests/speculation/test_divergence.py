"""The divergence of an answer from the expert, and the law that a budget of it gives.

If the divergences of an answer's tokens add up to at most the budget whatever is written, the total
variation between the distributions of whole answers is at most the budget too.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.speculation.test_masks import BOUND, LENGTH, PAIR, STOP, VOCAB, Masked, masks_of
from tests.support import enumeration
from tests.support.bigram_models import round_endings

from cascade.rules import (
    Chow,
    Diff,
    Ensemble,
    Lossless,
    Lossy,
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)
from cascade.sampling.phases import SessionRules
from cascade.speculation.draft import block_of
from cascade.speculation.modes import VerifyWhen, plan_for
from cascade.speculation.payload import needs_probs_after_block, payload_spec
from cascade.speculation.target_distribution import RuleInputs, target_distribution
from cascade.speculation.verify import VerifyTask, verify
from cascade.speculation.verify_batch import build_batch, mask_blocks
from cascade.types import (
    Block,
    Bonus,
    Coupling,
    DecodingParams,
    Grammar,
    GrammarKind,
    Mode,
    Phase,
    PhaseRules,
    PhaseSwitch,
    RowFormat,
    SamplingParams,
    SparseProbs,
    TokenConstraints,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.bigram_models import Floats

    from cascade.rules import Rule
    from cascade.speculation.draft import DraftToken

    Text = tuple[int, ...]

HUGE = 1e6

SEEDS = 12  # of real drafts

# No sum of divergences under test is equal to one of these.
BUDGETS = (0.0, 0.0517, 0.2131, 0.6119, HUGE)


def some_probs(seed: int, sharp: float) -> enumeration.Probs:
    weights = np.random.default_rng(seed).integers(1, 40, 3) ** sharp
    return enumeration.norm(tuple(Fraction(int(w)) for w in weights))


def exact_pair(rule: Rule, budget: float, *, seed: int) -> enumeration.BudgetedPair:
    """Return two models of three tokens that read all tokens before."""

    @cache
    def q(text: Text) -> enumeration.Probs:
        return some_probs(seed + hash(text) % 1009, 2)

    @cache
    def p(text: Text) -> enumeration.Probs:
        return some_probs(seed + 7919 + hash(text) % 1013, 2)

    return enumeration.BudgetedPair(
        q=q,
        p=p,
        rule=rule,
        budget=Fraction(budget),
    )


def apart(found: dict[Text, Any], wanted: dict[Text, Any]) -> Any:
    """Return the total variation between two distributions of answers."""
    return sum((max(0, mass - wanted.get(text, 0)) for text, mass in found.items()), 0)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_answers_are_within_the_budget_of_the_expert_in_total_variation(rule: Rule) -> None:
    """In exact rationals. No budget is the expert's law, a large one that of the rule."""
    for seed, budget in enumerate(BUDGETS):
        pair = exact_pair(rule, budget, seed=100 * seed)
        found = enumeration.product(pair, 4)
        expert = enumeration.product(replace(pair, budget=Fraction(0)), 4)
        assert sum(found.values()) == 1
        assert apart(found, expert) <= Fraction(budget)
        if budget == 0:
            plain = enumeration.ModelPair(q=pair.q, p=pair.p, rule=Lossless())
            assert found == enumeration.product(plain, 4)
        if budget == HUGE:
            plain = enumeration.ModelPair(q=pair.q, p=pair.p, rule=rule)
            assert found == enumeration.product(plain, 4)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
@pytest.mark.parametrize(("drafted", "bonus"), [(1, Bonus.TARGET), (3, Bonus.NONE)])
def test_rounds_of_drafts_follow_the_law_of_a_budget(
    rule: Rule, drafted: int, bonus: Bonus
) -> None:
    """In exact rationals: what is left at a token depends on the tokens before it alone."""
    pair = exact_pair(rule, 0.2131, seed=5)
    done, open_ = defaultdict[Any, Fraction](Fraction), {(): Fraction(1)}
    while open_:
        after = defaultdict[Any, Fraction](Fraction)
        for text, mass in open_.items():
            found = enumeration.gen_spec_sample(pair, text, drafted=drafted, bonus=bonus)
            for more, chance in found.items():
                # What a round writes beyond the answer is cut off.
                longer = (*text, *more)[:3]
                (done if len(longer) == 3 else after)[longer] += mass * chance
        open_ = after
    assert done == {k: v for k, v in enumeration.product(pair, 3).items() if v}


@dataclass(frozen=True)
class Budgeted(Masked):
    """Rounds of the fast path, each with what the ones before have left of the budget."""

    drafted: int = 2

    def at(self, text: Text) -> DecodingParams:
        return SessionRules(self.policy).at(text)

    @property
    def exact(self) -> enumeration.BudgetedPair:
        pair, budget = self.pair, self.policy.divergence_budget
        assert budget is not None
        return enumeration.BudgetedPair(q=pair.q, p=pair.p, rule=pair.rule, budget=Fraction(budget))

    def blocks(self, text: Text) -> Iterator[tuple[Block, float]]:
        """Yield each block that may be drafted after a text, and how likely it is."""
        own = replace(self, policy=self.at(text))

        @cache
        def cached(more: Text) -> DraftToken:
            return own.draft((*text, *more), len(text))

        def descend(
            more: Text, drafts: list[DraftToken], chance: float
        ) -> Iterator[tuple[Block, float]]:
            if len(more) == self.drafted or more[-1:] == (STOP,):
                if needs_probs_after_block(own.policy) and more[-1:] != (STOP,):
                    drafts = [*drafts, cached(more)]
                block = block_of(drafts, length=len(more))
                yield block.prefix(SessionRules(self.policy).length(text, block.tokens)), chance
                return
            draft, unscaled = cached(more), own.pair.q((*text, *more))
            for v, x in enumerate(own.drafted_from((*text, *more), draft)):
                if x > 0:
                    q0 = None if draft.unscaled is None else float(unscaled[v])
                    one = replace(draft, token=v, likelihood=x, unscaled=q0)
                    yield from descend((*more, v), [*drafts, one], chance * x)

        yield from descend((), [], 1.0)

    def rounds(self, text: Text, left: float) -> Iterator[tuple[Text, float, float]]:
        """Yield what one round may commit, how likely it is, and what it leaves of the budget."""
        policy, masks = self.at(text), masks_of(self.policy)
        blocks, chances = zip(*self.blocks(text), strict=True)
        tasks = [
            VerifyTask(
                policy=policy,
                position=len(text),
                block=block,
                answer=text,
                masks=masks,
                divergence_left=left,
            )
            for block in blocks
        ]
        logits_NV = torch.cat([PAIR.rows(policy, (0, *text), block.tokens) for block in blocks])
        _, judged = mask_blocks(logits_NV, tasks)
        batch = build_batch(logits_NV, judged)
        within = batch.within_budget
        keeps = [True] * len(batch.token_M) if within is None else within.tolist()
        spent = batch.divergence.tolist()
        for task, more, chance in round_endings(batch, chances):
            start, end = batch.judged_offsets[task : task + 2]
            committed = range(start, min(end, start + len(more)))
            ended = not all(keeps[at] for at in committed)
            yield more, chance, 0.0 if ended else left - sum(spent[at] for at in committed)

    def answers(self) -> Floats:
        done: defaultdict[Text, float] = defaultdict(float)
        budget = self.policy.divergence_budget
        assert budget is not None
        open_ = {((), budget): 1.0}
        while open_:
            after: defaultdict[tuple[Text, float], float] = defaultdict(float)
            for (text, left), mass in open_.items():
                for more, chance, now_left in self.rounds(text, left):
                    assert now_left >= -1e-6
                    longer = (*text, *more)[:LENGTH]
                    if chance > 0 and self.ended(longer):
                        done[longer] += mass * chance
                    elif chance > 0:
                        after[longer, round(max(0.0, now_left), 9)] += mass * chance
            open_ = after
        return done

    def law(self) -> Floats:
        open_, done = {(): Fraction(1)}, dict[Any, float]()
        pair = self.exact
        while open_:
            longer = {
                (*text, v): mass * x
                for text, mass in open_.items()
                for v, x in enumerate(pair.pi(text))
            }
            done |= {text: float(mass) for text, mass in longer.items() if self.ended(text)}
            open_ = {text: mass for text, mass in longer.items() if not self.ended(text)}
        return done


def policy_of(rule: Rule, budget: float, **changes: Any) -> DecodingParams:
    policy = DecodingParams(
        rule=rule,
        divergence_budget=budget,
        bonus=Bonus.NONE,
        stop_ids=(STOP,),
        rows=RowFormat.FULL,
    )
    return replace(policy, **changes)


def expert_law(policy: DecodingParams) -> Floats:
    return Masked(replace(policy, rule=Lossless(), phases=None)).law()


def assert_follows(policy: DecodingParams, *, drafted: int = 2) -> None:
    """The answers follow the law of their budget, and are as near to the expert as it says."""
    models = Budgeted(policy, drafted=drafted)
    found, budget = models.answers(), policy.divergence_budget
    assert budget is not None
    assert sum(found.values()) == pytest.approx(1)
    assert apart(found, expert_law(policy)) <= budget + 1e-5
    if policy.bonus is not Bonus.EXPERT and policy.phases is None:
        assert apart(found, models.law()) < BOUND


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_the_fast_path_follows_the_law_of_a_budget(rule: Rule) -> None:
    """Round after round, in token verification and in block verification, with each bonus."""
    assert_follows(policy_of(rule, 0.2131))
    block = {"verification": Verification.BLOCK, "bonus": Bonus.TARGET}
    assert_follows(policy_of(rule, 0.6119, **block))
    assert_follows(policy_of(rule, 0.0517, bonus=Bonus.EXPERT))


@pytest.mark.slow
@pytest.mark.parametrize("drafted", [1, 2, 3])
@pytest.mark.parametrize("bonus", Bonus)
@pytest.mark.parametrize("verification", Verification)
@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_the_fast_path_follows_the_law_of_every_budget(
    rule: Rule, verification: Verification, bonus: Bonus, drafted: int
) -> None:
    for budget, rows in itertools.product(BUDGETS, (RowFormat.AUTO, RowFormat.FULL)):
        changes = {"verification": verification, "bonus": bonus, "rows": rows}
        assert_follows(policy_of(rule, budget, **changes), drafted=drafted)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_no_budget_is_the_experts_law_and_a_large_one_that_of_the_rule(rule: Rule) -> None:
    nothing = policy_of(rule, 0.0)
    assert apart(Budgeted(nothing).answers(), expert_law(nothing)) < 1e-5
    large = policy_of(rule, HUGE, verification=Verification.BLOCK)
    plain = replace(large, divergence_budget=None)
    assert apart(Budgeted(large).answers(), Masked(plain).law()) < BOUND


@pytest.mark.parametrize("rule", [TokenV3(alpha=0.5119), Diff(alpha=0.0517), Lossy(alpha=0.3137)])
def test_a_budget_holds_under_a_grammar_and_constraints(rule: Rule) -> None:
    grammar = Grammar(kind=GrammarKind.REGEX, text="(AB?[CD]|B(C|AD)*)+")
    assert_follows(policy_of(rule, 0.0517, grammar=grammar))
    constraints = TokenConstraints(min_tokens=2, bad_words=((0, 1), (1, 1)))
    assert_follows(policy_of(rule, 0.2131, constraints=constraints))


@pytest.mark.parametrize("budget", BUDGETS)
def test_one_budget_holds_over_phases_with_their_own_rules(budget: float) -> None:
    switches = (
        PhaseSwitch(phase=Phase.ANSWER, tokens=(1,), next=Phase.THINKING),
        PhaseSwitch(phase=Phase.THINKING, tokens=(2,), next=Phase.ANSWER),
    )
    rules = ((Phase.ANSWER, TokenV3(alpha=0.5119)), (Phase.THINKING, Ensemble(weight=0.3)))
    assert_follows(policy_of(Lossless(), budget, phases=PhaseRules(switches=switches, rules=rules)))


def drafts_of(policy: DecodingParams, seeds: int) -> list[VerifyTask]:
    """Return blocks of two real drafts, for each seed."""
    found: list[VerifyTask] = []
    for seed in range(seeds):
        own = replace(policy, seed=seed)
        first = Masked(own).draft((), 0)
        second = Masked(own).draft((first.token,), 0)
        block = block_of([first, second])
        left = own.divergence_budget
        found.append(VerifyTask(policy=own, position=0, block=block, divergence_left=left))
    return found


def judged(tasks: list[VerifyTask]) -> list[Any]:
    rows = [PAIR.rows(task.policy, (0,), task.block.tokens) for task in tasks]
    return verify(torch.cat(rows), tasks)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_under_shared_noise_a_spent_budget_writes_what_the_expert_writes(rule: Rule) -> None:
    policy = policy_of(rule, 0.0, coupling=Coupling.GUMBEL)
    lossless = replace(policy, rule=Lossless(), divergence_budget=None)
    for bounded, plain in zip(
        judged(drafts_of(policy, SEEDS)), judged(drafts_of(lossless, SEEDS)), strict=True
    ):
        length = min(len(bounded.tokens), len(plain.tokens))
        assert bounded.tokens[:length] == plain.tokens[:length]
        assert not any(bounded.divergences)
    large = replace(policy, divergence_budget=HUGE)
    free = replace(policy, divergence_budget=None)
    found = [verdict.tokens for verdict in judged(drafts_of(large, SEEDS))]
    assert found == [verdict.tokens for verdict in judged(drafts_of(free, SEEDS))]


@pytest.mark.parametrize("coupling", Coupling)
@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_a_verdict_says_the_divergence_of_each_token(rule: Rule, coupling: Coupling) -> None:
    """The formula's value at each position; what is left of the budget is the rest."""
    policy = policy_of(rule, HUGE, coupling=coupling)
    pair = Budgeted(policy).exact
    for verdict in judged(drafts_of(policy, SEEDS)):
        texts = [verdict.tokens[:length] for length in range(len(verdict.tokens))]
        wanted = [float(pair.divergence(text)) for text in texts]
        assert verdict.divergences == pytest.approx(wanted, abs=1e-3)
        assert verdict.divergence_left == pytest.approx(HUGE - sum(verdict.divergences))


def test_the_lossless_rule_has_no_divergence_at_all() -> None:
    for coupling, verification in itertools.product(Coupling, Verification):
        changes = {"coupling": coupling, "verification": verification, "divergence_budget": None}
        for verdict in judged(drafts_of(policy_of(Lossless(), 0, **changes), SEEDS)):
            assert verdict.divergences == (0.0,) * len(verdict.tokens)
            assert verdict.divergence_left is None


def test_a_divergence_is_unknown_where_the_expert_has_only_token_ids() -> None:
    """Except where that does not matter: a deferred position, a certain draft, temperature 0."""
    for rule in (TokenV1(alpha=0.1), TokenV2(alpha=0.1517), TokenV3(alpha=0.5119), Typical()):
        sampled = DecodingParams(rule=rule, bonus=Bonus.EXPERT)
        for verdict in judged(drafts_of(sampled, SEEDS)):
            assert verdict.divergences[:2] == (None,) * len(verdict.tokens[:2])
            assert verdict.divergences[2:] == (0.0,) * len(verdict.tokens[2:]), "the bonus token"
        greedy = replace(sampled, sampling=SamplingParams(temperature=0))
        assert all(None not in one.divergences for one in judged(drafts_of(greedy, 1)))
        bounded = replace(sampled, divergence_budget=0.3)
        assert payload_spec(bounded).probs
        assert all(None not in one.divergences for one in judged(drafts_of(bounded, SEEDS)))
    deferring = DecodingParams(rule=Chow(alpha=0), bonus=Bonus.NONE)
    assert all(set(one.divergences) == {0.0} for one in judged(drafts_of(deferring, SEEDS)))
    keeping = DecodingParams(rule=Chow(alpha=1), bonus=Bonus.NONE)
    assert all(set(one.divergences) == {None} for one in judged(drafts_of(keeping, SEEDS)))


def test_the_divergence_of_a_token_rule_depends_on_q_of_all_tokens() -> None:
    """Both q agree on the drafted token, the first one."""
    found = [
        target_distribution(
            TokenV3(alpha=0.6), RuleInputs(q_NK=q, p_NK=p, p0_NK=p, p0_max_N=p.amax(dim=1))
        ).distance(p)
        for p in [torch.tensor([[0.2, 0.45, 0.3, 0.05]])]
        for q in (p, torch.tensor([[0.2, 0.8, 0.0, 0.0]]))
    ]
    assert [float(one) for one in found] == pytest.approx([0.0475, 0.35])


def test_a_prediction_is_drafted_for_certain_so_its_divergence_is_known() -> None:
    policy = DecodingParams(rule=TokenV3(alpha=1), bonus=Bonus.NONE)
    task = VerifyTask(policy=policy, position=0, block=Block(tokens=(1, 3)))
    (verdict,) = judged([task])
    p, after = PAIR.expert_VV[0].softmax(0), PAIR.expert_VV[1].softmax(0)
    assert verdict.tokens == (1, 3)
    assert verdict.divergences == pytest.approx((1 - float(p[1]), 1 - float(after[3])))


def test_a_block_of_a_drafter_that_does_not_know_of_budgets_ends_where_too_little_was_sent() -> (
    None
):
    policy = policy_of(TokenV3(alpha=0.5119), 0.3)
    row = SparseProbs(ids=np.empty(0, np.uint32), weights=np.ones(VOCAB, np.float16))
    block = Block(tokens=(0, 1, 2), likelihoods=(0.2, 0.2, 0.2), draft_probs=(row,))
    task = VerifyTask(policy=policy, position=0, block=block, divergence_left=0.3)
    (verdict,) = judged([task])
    assert verdict.accepted <= 1
    assert verdict.judged == 1
    nothing = replace(task, block=replace(block, draft_probs=()))
    (alone,) = judged([nothing])
    assert (alone.accepted, alone.judged, len(alone.tokens)) == (0, 0, 1)
    assert alone.divergences == (0.0,)


def test_at_temperature_zero_a_budget_counts_the_words_that_differ() -> None:
    """A token that is not the expert's choice has divergence 1, any other has none."""
    greedy = SamplingParams(temperature=0)
    policy = policy_of(TokenV3(alpha=0.95), 2.5, sampling=greedy)
    best = [int(PAIR.expert_VV[token].argmax()) for token in range(VOCAB)]
    second = [int(PAIR.expert_VV[token].topk(2).indices[1]) for token in range(VOCAB)]
    tokens = [second[0]]
    for _ in range(3):
        tokens.append(second[tokens[-1]])
    block = Block(tokens=tuple(tokens), likelihoods=(1.0,) * 4)
    policy = replace(policy, stop_ids=())
    task = VerifyTask(policy=policy, position=0, block=block, divergence_left=2.5)
    (verdict,) = judged([task])
    assert verdict.tokens == (tokens[0], tokens[1], best[tokens[1]])
    assert verdict.divergences == (1.0, 1.0, 0.0)
    assert verdict.divergence_left == 0


@pytest.mark.parametrize("rule", [Chow(alpha=0.5), Chow(alpha=1)])
def test_a_budget_lets_the_expert_verify_what_the_drafter_decides(rule: Rule) -> None:
    """Only so is the divergence of a token known."""
    for mode in (Mode.CASCADE, Mode.SPECULATIVE):
        plan = plan_for(mode, DecodingParams(rule=rule, divergence_budget=1.0))
        assert plan.verify is VerifyWhen.ALWAYS
        assert payload_spec(plan.params).probs
