"""Under masks every rule follows its target distribution of the masked, renormalised models.

Blocks are drafted and judged from raw logits; the law is computed from masked rationals.
"""

from __future__ import annotations

import itertools
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from tests.reference import masked
from tests.support import enumeration
from tests.support.bigram_models import Bigrams, round_probs

from cascade.rules import Ensemble, TokenV3
from cascade.sampling.token_mask import constraint_masks
from cascade.speculation.draft import DraftTask, DraftToken, block_of, draft_step
from cascade.speculation.payload import needs_probs_after_block
from cascade.speculation.verify import VerifyTask
from cascade.speculation.verify_batch import build_batch, mask_blocks
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import (
    Block,
    Bonus,
    DecodingParams,
    Grammar,
    GrammarKind,
    RowFormat,
    TokenConstraints,
    Verification,
)

if TYPE_CHECKING:
    from tests.support.bigram_models import Floats

    from cascade.rules import Rule
    from cascade.sampling.token_mask import TokenMask

    Text = tuple[int, ...]

VOCAB, DRAFTED, LENGTH, STOP = 5, 2, 3, 4

BOUND = 2e-3  # in total variation: float16 rounds less than 5e-4 of each of three tokens

PAIR = Bigrams.random(vocab=VOCAB, seed=5)

CONSTRAINTS = {
    "min_tokens": TokenConstraints(min_tokens=2),
    "bad_words": TokenConstraints(bad_words=((2,), (0, 1), (1, 0, 3))),
    "allowed_ids": TokenConstraints(allowed_ids=(0, 1, STOP)),
    "all": TokenConstraints(min_tokens=2, bad_words=((0, 1), (1, 1)), allowed_ids=(0, 1, 3, STOP)),
}


def random_pattern(rng: random.Random, depth: int = 3) -> str:
    """Return a regular expression on the letters of the vocabulary."""
    if depth == 0:
        return rng.choice(["A", "B", "C", "D", "[AB]", "[BCD]"])
    parts = [random_pattern(rng, depth - 1) for _ in range(rng.randint(1, 3))]
    either = f"({'|'.join(parts)})" if rng.random() < 0.5 else f"({''.join(parts)})"
    return either + rng.choice(["", "", "?", "*", "+", "{1,2}"])


PATTERNS = [random_pattern(random.Random(seed)) for seed in range(8)]  # noqa: S311 - no secret


@cache
def compiler() -> GrammarCompiler:
    texts = (*(chr(0x41 + token).encode() for token in range(STOP)), b"")
    tokens = TokenTexts(texts=texts, special_ids=frozenset({STOP}), stop_ids=(STOP,))
    return GrammarCompiler(tokens)


def masks_of(policy: DecodingParams) -> tuple[TokenMask, ...]:
    own = constraint_masks(policy, VOCAB)
    if policy.grammar is None:
        return own
    return (*own, compiler().mask(policy.grammar, policy.stop_ids))


@dataclass(frozen=True)
class Masked:
    """The fast path's rounds of a policy, and the models it should follow."""

    policy: DecodingParams

    def probs(self, logits_VV: torch.Tensor, text: Text) -> enumeration.Probs:
        """Return the masked, renormalised probabilities after an answer."""
        row_V = masked(logits_VV[(0, *text)[-1]].double(), self.policy, text).softmax(0)
        return enumeration.norm(tuple(Fraction(x) for x in row_V.tolist()))

    @property
    def pair(self) -> enumeration.ModelPair:
        return enumeration.ModelPair(
            q=lambda text: self.probs(PAIR.drafter_VV, text),
            p=lambda text: self.probs(PAIR.expert_VV, text),
            rule=self.policy.rule,
        )

    def ended(self, text: Text) -> bool:
        return len(text) >= LENGTH or text[-1:] == (STOP,)

    def law(self) -> Floats:
        """Return the product of pi, as far as answers go."""
        open_, done = {(): Fraction(1)}, dict[Any, float]()
        while open_:
            longer = {
                (*text, v): mass * x
                for text, mass in open_.items()
                for v, x in enumerate(self.pair.pi(text))
            }
            done |= {text: float(mass) for text, mass in longer.items() if self.ended(text)}
            open_ = {text: mass for text, mass in longer.items() if not self.ended(text)}
        return done

    def draft(self, text: Text, start: int) -> DraftToken:
        """Return a real draft from the drafter's raw logits."""
        masks = masks_of(self.policy)
        task = DraftTask(
            policy=self.policy, position=len(text), block_start=start, answer=text, masks=masks
        )
        return draft_step(PAIR.drafter((0, *text))[None].clone(), [task])[0]

    def drafted_from(self, text: Text, draft: DraftToken) -> list[float]:
        """Return what the drafter samples from: what it sends, or would send."""
        full = replace(self.policy, rule=Ensemble(weight=0.5), rows=RowFormat.FULL)
        sent = draft.probs or Masked(full).draft(text, 0).probs
        assert sent is not None
        found = np.zeros(VOCAB)
        found[sent.ids if len(sent.ids) else slice(None)] = sent.weights
        return (found / found.sum()).tolist()

    def judged(self, text: Text, block: Block) -> Block:
        """Return the part of a block that is judged."""
        del text
        return block

    def round(self, text: Text) -> Floats:
        """Return the distribution of what one round commits after a text."""

        @cache
        def cached(more: Text) -> DraftToken:
            return self.draft((*text, *more), len(text))

        tasks, logits, chances = list[VerifyTask](), list[torch.Tensor](), list[float]()

        def descend(more: Text, drafts: list[DraftToken], chance: float) -> None:
            if len(more) == DRAFTED or more[-1:] == (STOP,):
                if needs_probs_after_block(self.policy) and more[-1:] != (STOP,):
                    drafts = [*drafts, cached(more)]
                block = self.judged(text, block_of(drafts, length=len(more)))
                masks = masks_of(self.policy)
                tasks.append(
                    VerifyTask(
                        policy=self.policy,
                        position=len(text),
                        block=block,
                        answer=text,
                        masks=masks,
                    )
                )
                logits.append(PAIR.rows(self.policy, (0, *text), block.tokens))
                chances.append(chance)
                return
            draft = cached(more)
            unscaled = self.pair.q((*text, *more))
            for v, x in enumerate(self.drafted_from((*text, *more), draft)):
                if x > 0:
                    q0 = None if draft.unscaled is None else float(unscaled[v])
                    one = replace(draft, token=v, likelihood=x, unscaled=q0)
                    descend((*more, v), [*drafts, one], chance * x)

        descend((), [], 1.0)
        logits_NV = torch.cat(logits)
        _, judged = mask_blocks(logits_NV, tasks)
        assert [task.block for task in judged] == [task.block for task in tasks]
        return round_probs(build_batch(logits_NV, judged), chances)

    def answers(self) -> Floats:
        """Return the distribution of answers, round after round."""
        done: defaultdict[Text, float] = defaultdict(float)
        open_: Floats = {(): 1.0}
        while open_:
            after: defaultdict[Text, float] = defaultdict(float)
            for text, mass in open_.items():
                for more, chance in self.round(text).items():
                    if chance > 0:
                        longer = (*text, *more)[:LENGTH]
                        (done if self.ended(longer) else after)[longer] += mass * chance
            open_ = after
        return done


def assert_follows(policy: DecodingParams) -> None:
    """Check the distribution of answers against the law."""
    models = Masked(policy)
    found, wanted = models.answers(), models.law()
    apart = sum(max(0.0, found.get(text, 0) - wanted.get(text, 0)) for text in found)
    assert sum(found.values()) == pytest.approx(1)
    assert apart < BOUND


def policy_of(rule: Rule, constraints: TokenConstraints, **changes: Any) -> DecodingParams:
    return DecodingParams(
        rule=rule, constraints=constraints, bonus=Bonus.NONE, stop_ids=(STOP,), **changes
    )


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_every_rule_follows_its_law_of_masked_models(rule: Rule) -> None:
    policy = policy_of(rule, CONSTRAINTS["all"], rows=RowFormat.FULL)
    assert_follows(policy)


@pytest.mark.parametrize("constraints", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_each_constraint_keeps_a_rule_of_each_kind_to_its_law(
    constraints: TokenConstraints,
) -> None:
    """Rules that need only ids, one that mixes, and block verification with a bonus of pi."""
    assert_follows(policy_of(TokenV3(alpha=0.5119), constraints))
    block = {"verification": Verification.BLOCK, "rows": RowFormat.FULL}
    policy = policy_of(Ensemble(weight=0.6271), constraints, **block)
    assert_follows(replace(policy, bonus=Bonus.TARGET))


def grammar_policy(rule: Rule, pattern: str, **changes: Any) -> DecodingParams:
    policy = policy_of(rule, TokenConstraints(), **changes)
    return replace(policy, grammar=Grammar(kind=GrammarKind.REGEX, text=pattern))


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_every_rule_follows_its_law_under_a_grammar(rule: Rule) -> None:
    assert_follows(grammar_policy(rule, "(AB?[CD]|B(C|AD)*)+", rows=RowFormat.FULL))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_every_rule_follows_its_law_under_random_grammars(rule: Rule, pattern: str) -> None:
    """In both verifications, with and without a bonus, and whatever is sent."""
    for verification, bonus, rows in itertools.product(
        Verification, (Bonus.NONE, Bonus.TARGET), (RowFormat.AUTO, RowFormat.FULL)
    ):
        policy = grammar_policy(rule, pattern, verification=verification, rows=rows)
        assert_follows(replace(policy, bonus=bonus))


@pytest.mark.slow
@pytest.mark.parametrize("constraints", CONSTRAINTS.values(), ids=CONSTRAINTS)
@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_every_rule_follows_its_law_under_each_constraint(
    rule: Rule, constraints: TokenConstraints
) -> None:
    """In both verifications, with and without a bonus, and whatever is sent."""
    for verification, bonus, rows in itertools.product(
        Verification, (Bonus.NONE, Bonus.TARGET), (RowFormat.AUTO, RowFormat.FULL)
    ):
        policy = policy_of(rule, constraints, verification=verification, rows=rows)
        assert_follows(replace(policy, bonus=bonus))
