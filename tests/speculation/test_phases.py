"""Each token follows the rule of its phase, inside a block too; a thinking budget ends thoughts."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.speculation.test_masks import BOUND, STOP, VOCAB, Masked

from cascade.rules import Chow, Diff, Ensemble, Lossless, TokenV3
from cascade.sampling.phases import PhaseTracker, SessionRules
from cascade.sampling.token_mask import allowed_bits, allows, constraint_masks
from cascade.types import (
    Bonus,
    DecodingParams,
    Phase,
    PhaseRules,
    PhaseSwitch,
    RowFormat,
    Verification,
)

if TYPE_CHECKING:
    from tests.support.bigram_models import Floats

    from cascade.rules import Rule
    from cascade.types import Block

BEGIN, END, CALL = 1, 2, 3

SWITCHES = (
    PhaseSwitch(phase=Phase.ANSWER, tokens=(BEGIN,), next=Phase.THINKING),
    PhaseSwitch(phase=Phase.THINKING, tokens=(END,), next=Phase.ANSWER),
    PhaseSwitch(phase=Phase.ANSWER, tokens=(CALL, CALL), next=Phase.TOOL),
)


@dataclass(frozen=True)
class OneBlock(Masked):
    """A round of a drafter that goes on beyond the end of a phase."""

    def judged(self, text: tuple[int, ...], block: Block) -> Block:
        return block.prefix(SessionRules(self.policy).length(text, block.tokens))


@dataclass(frozen=True)
class Phased(Masked):
    """Rounds under the rule of the phase that each begins in."""

    def at(self, text: tuple[int, ...]) -> DecodingParams:
        return SessionRules(self.policy).at(text)

    def law(self) -> Floats:
        open_, done = {(): Fraction(1)}, dict[Any, float]()
        while open_:
            longer = {
                (*text, v): mass * x
                for text, mass in open_.items()
                for v, x in enumerate(Masked(self.at(text)).pair.pi(text))
            }
            done |= {text: float(mass) for text, mass in longer.items() if self.ended(text)}
            open_ = {text: mass for text, mass in longer.items() if not self.ended(text)}
        return done

    def round(self, text: tuple[int, ...]) -> Floats:
        return OneBlock(self.at(text)).round(text)


@pytest.mark.parametrize("verification", Verification)
@pytest.mark.parametrize(
    "rules",
    [
        (Lossless(), Ensemble(weight=0.6271), Chow(alpha=0.4519)),
        (Ensemble(weight=0.6271), TokenV3(alpha=0.5119), Lossless()),
        (Diff(alpha=0.0517), Lossless(), Ensemble(weight=0.3)),
    ],
)
@pytest.mark.parametrize("start", [Phase.ANSWER, Phase.THINKING])
def test_each_token_follows_the_rule_of_its_phase(
    start: Phase, rules: tuple[Rule, ...], verification: Verification
) -> None:
    """Blocks of two tokens, of which the first may end a phase."""
    phases = PhaseRules(start=start, switches=SWITCHES, rules=tuple(zip(Phase, rules, strict=True)))
    policy = DecodingParams(
        phases=phases,
        bonus=Bonus.NONE,
        stop_ids=(STOP,),
        rows=RowFormat.FULL,
        verification=verification,
    )
    models = Phased(policy)
    found, wanted = models.answers(), models.law()
    assert sum(found.values()) == pytest.approx(1)
    assert sum(max(0.0, found.get(text, 0) - wanted.get(text, 0)) for text in found) < BOUND


@given(st.lists(st.lists(st.integers(0, 4), max_size=12), min_size=1, max_size=6))
def test_a_phase_depends_on_the_tokens_alone(texts: list[list[int]]) -> None:
    """Whatever other texts of the session were asked about before: branches, retries."""
    phases = PhaseRules(start=Phase.THINKING, switches=SWITCHES)
    tracker = PhaseTracker(phases)
    for text in texts:
        assert tracker.phase(text) is PhaseTracker(phases).phase(text)
        fresh = PhaseTracker(phases)
        fresh.read(text)
        assert tracker.thoughts(len(text)) == fresh.thoughts(len(text))


def test_a_marker_counts_only_in_the_phase_that_it_ends() -> None:
    tracker = PhaseTracker(PhaseRules(switches=SWITCHES))
    assert tracker.phase([END]) is Phase.ANSWER
    assert tracker.phase([BEGIN, CALL, CALL]) is Phase.THINKING
    assert tracker.phase([BEGIN, END, CALL, CALL]) is Phase.TOOL
    assert tracker.phase([CALL, BEGIN, END, CALL]) is Phase.ANSWER


def allowed(policy: DecodingParams, answer: list[int], drafted: list[int]) -> list[list[int]]:
    """Return which tokens may follow at each row of a block."""
    masks = constraint_masks(policy, VOCAB)
    bits_RW = allowed_bits(masks, answer, drafted, stop_ids=policy.stop_ids, vocabulary=VOCAB)
    if bits_RW is None:
        return [list(range(VOCAB))] * (len(drafted) + 1)
    return [[v for v in range(VOCAB) if allows(np.array([bits_W]), [v])[0]] for bits_W in bits_RW]


def test_a_thinking_budget_that_runs_out_inside_a_block_leaves_only_the_end() -> None:
    switches = (PhaseSwitch(phase=Phase.THINKING, tokens=(2, 3), next=Phase.ANSWER),)
    phases = PhaseRules(start=Phase.THINKING, switches=switches, thinking_tokens=2)
    policy, every = DecodingParams(phases=phases, stop_ids=(STOP,)), list(range(VOCAB))
    assert allowed(policy, [0], [0, 2, 3, 0]) == [every, [2], [3], every, every]
    assert allowed(policy, [], [2, 0, 2, 3]) == [every, every, [2], [3], every]
    assert allowed(policy, [0, 2], [3, 1]) == [[3], every, every], "the end has begun already"
    assert allowed(policy, [2, 3], [1, 1, 1, 1]) == [every] * 5, "there are no thoughts any more"


def test_a_budget_of_nothing_ends_thoughts_at_once() -> None:
    switches = (
        PhaseSwitch(phase=Phase.ANSWER, tokens=(1,), next=Phase.THINKING),
        PhaseSwitch(phase=Phase.THINKING, tokens=(2,), next=Phase.ANSWER),
    )
    phases = PhaseRules(switches=switches, thinking_tokens=0)
    policy, every = DecodingParams(phases=phases), list(range(VOCAB))
    assert allowed(policy, [], [0, 1, 2]) == [every, every, [2], every]
