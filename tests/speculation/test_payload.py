"""What crosses the wire under each policy, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.support import enumeration

from cascade.rules import Chow, ChowLog, Diff, Lossless, Lossy, Opt, TokenV1, TokenV3
from cascade.speculation.payload import Rows, needs, wants_target
from cascade.types import Bonus, Coupling, Policy, RowFormat, Sampling, Verification

if TYPE_CHECKING:
    from cascade.rules import Rule

TOKEN_RULES = {"token_v1", "token_v2", "token_v3", "typical"}

DECIDED_BY_DRAFTER = {"chow", "chow_log"}

ROWLESS_UNDER_GUMBEL = {"lossless", "chow", "chow_log", "diff", "diff_log", "bild"}


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_each_rule_ships_the_least_that_keeps_it_exact(rule: Rule) -> None:
    """Token rules no rows, chow one where it defers, all others one a token."""
    expected = Rows.NONE if rule.kind in TOKEN_RULES else Rows.ALL
    expected = Rows.DEFERRED if rule.kind in DECIDED_BY_DRAFTER else expected
    found = needs(Policy(rule=rule))
    assert found.rows is expected
    assert found.fresh == (rule.kind in TOKEN_RULES)
    assert found.likelihoods


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_shared_noise_saves_rows(rule: Rule) -> None:
    """Under gumbel a rule that keeps or defers a whole position needs gates alone."""
    found = needs(Policy(rule=rule, coupling=Coupling.GUMBEL))
    assert (found.rows is Rows.NONE) == (rule.kind in ROWLESS_UNDER_GUMBEL)
    assert not found.fresh
    assert found.likelihoods == (rule != Lossless())


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_temperature_0_needs_no_rows(rule: Rule) -> None:
    """A one-hot is its token; only the place after a block has none."""
    greedy = Policy(rule=rule, sampling=Sampling(temperature=0), rows=RowFormat.FULL)
    assert needs(greedy).rows is Rows.NONE
    assert not needs(greedy).likelihoods
    after = needs(replace(greedy, bonus=Bonus.TARGET))
    assert (after.rows is Rows.ALL) == (rule != Lossless())


@pytest.mark.parametrize(
    "change",
    [
        {"rows": RowFormat.SPARSE},
        {"rows": RowFormat.FULL},
        {"bonus": Bonus.TARGET},
        {"verification": Verification.BLOCK},
    ],
    ids=str,
)
@pytest.mark.parametrize("rule", [Chow(alpha=0.5), TokenV3(alpha=0.5)], ids=lambda r: r.kind)
def test_some_choices_ask_for_every_row(rule: Rule, change: dict[str, object]) -> None:
    """Residuals of blocks, the target's bonus and an explicit format need rows."""
    assert needs(replace(Policy(rule=rule), **change)).rows is Rows.ALL


def test_gates_and_unscaled_go_to_those_who_read_them() -> None:
    """q0 is for token_v1, its entropy for the log rules, its peak for position rules."""
    assert needs(Policy(rule=TokenV1(alpha=0))).unscaled
    assert needs(Policy(rule=TokenV1(alpha=0), rows=RowFormat.SPARSE)).row_unscaled
    assert not needs(Policy(rule=TokenV3(alpha=0), rows=RowFormat.SPARSE)).row_unscaled
    for rule in (Chow(alpha=0), Diff(alpha=0), Opt(alpha=0)):
        assert needs(Policy(rule=rule)).gates
        assert not needs(Policy(rule=rule)).entropy
    assert needs(Policy(rule=ChowLog(alpha=0))).entropy
    assert not needs(Policy(rule=Lossy(alpha=0.1))).gates


def test_a_lossless_bonus_is_the_experts() -> None:
    """T(q, p) = p: the drafter's row after the block would say nothing."""
    assert not wants_target(Policy(bonus=Bonus.TARGET))
    assert wants_target(Policy(bonus=Bonus.TARGET, rule=Chow(alpha=0.5)))
