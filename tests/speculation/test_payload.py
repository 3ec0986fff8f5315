"""What crosses the wire under each policy, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.support import enumeration

from cascade.rules import Chow, ChowLog, Diff, Lossless, Lossy, Opt, TokenV1, TokenV3
from cascade.speculation.payload import ProbsPayload, payload_spec, wants_target
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, SamplingParams, Verification

if TYPE_CHECKING:
    from cascade.rules import Rule

TOKEN_RULES = {"token_v1", "token_v2", "token_v3", "typical"}

DECIDED_BY_DRAFTER = {"chow", "chow_log"}

ROWLESS_UNDER_GUMBEL = {"lossless", "chow", "chow_log", "diff", "diff_log", "bild"}


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_each_rule_ships_the_least_that_keeps_it_exact(rule: Rule) -> None:
    """Token rules no rows, chow one where it defers, all others one a token."""
    expected = ProbsPayload.NONE if rule.kind in TOKEN_RULES else ProbsPayload.ALL
    expected = ProbsPayload.DEFERRED if rule.kind in DECIDED_BY_DRAFTER else expected
    found = payload_spec(DecodingParams(rule=rule))
    assert found.rows is expected
    assert found.ids_only == (rule.kind in TOKEN_RULES)
    assert found.likelihoods


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_shared_noise_saves_rows(rule: Rule) -> None:
    """Under gumbel a rule that keeps or defers a whole position needs gates alone."""
    found = payload_spec(DecodingParams(rule=rule, coupling=Coupling.GUMBEL))
    assert (found.rows is ProbsPayload.NONE) == (rule.kind in ROWLESS_UNDER_GUMBEL)
    assert not found.ids_only
    assert found.likelihoods == (rule != Lossless())


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_temperature_0_needs_no_rows(rule: Rule) -> None:
    """A one-hot is its token; only the place after a block has none."""
    greedy = DecodingParams(rule=rule, sampling=SamplingParams(temperature=0), rows=RowFormat.FULL)
    assert payload_spec(greedy).rows is ProbsPayload.NONE
    assert not payload_spec(greedy).likelihoods
    after = payload_spec(replace(greedy, bonus=Bonus.TARGET))
    assert (after.rows is ProbsPayload.ALL) == (rule != Lossless())


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
    assert payload_spec(replace(DecodingParams(rule=rule), **change)).rows is ProbsPayload.ALL


def test_gates_and_unscaled_go_to_those_who_read_them() -> None:
    """q0 is for token_v1, its entropy for the log rules, its peak for position rules."""
    assert payload_spec(DecodingParams(rule=TokenV1(alpha=0))).unscaled
    assert payload_spec(DecodingParams(rule=TokenV1(alpha=0), rows=RowFormat.SPARSE)).row_unscaled
    assert not payload_spec(
        DecodingParams(rule=TokenV3(alpha=0), rows=RowFormat.SPARSE)
    ).row_unscaled
    for rule in (Chow(alpha=0), Diff(alpha=0), Opt(alpha=0)):
        assert payload_spec(DecodingParams(rule=rule)).draft_stats
        assert not payload_spec(DecodingParams(rule=rule)).entropy
    assert payload_spec(DecodingParams(rule=ChowLog(alpha=0))).entropy
    assert not payload_spec(DecodingParams(rule=Lossy(alpha=0.1))).draft_stats


def test_a_lossless_bonus_is_the_experts() -> None:
    """T(q, p) = p: the drafter's row after the block would say nothing."""
    assert not wants_target(DecodingParams(bonus=Bonus.TARGET))
    assert wants_target(DecodingParams(bonus=Bonus.TARGET, rule=Chow(alpha=0.5)))
