"""What a block carries under each policy, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.support import enumeration

from cascade.rules import Chow, ChowLog, Diff, Lossless, Lossy, Opt, TokenV1, TokenV3
from cascade.sampling.sparse_probs import Cut
from cascade.speculation.payload import (
    MAX_LOST,
    draft_cut,
    needs_probs_after_block,
    payload_spec,
    sends_ids_only,
)
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, SamplingParams, Verification

if TYPE_CHECKING:
    from cascade.rules import Rule

TOKEN_RULES = {"token_v1", "token_v2", "token_v3", "typical"}

SENDS_IDS_ONLY = {*TOKEN_RULES, "chow", "chow_log"}

NO_PROBS_UNDER_GUMBEL = {"lossless", "chow", "chow_log", "diff", "diff_log", "bild"}


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_each_rule_sends_the_least_that_is_exact(rule: Rule) -> None:
    """Token rules and those of the drafter alone send no probabilities, all others send them."""
    policy = DecodingParams(rule=rule)
    assert sends_ids_only(policy) == (rule.kind in SENDS_IDS_ONLY)
    assert payload_spec(policy).probs == (rule.kind not in SENDS_IDS_ONLY)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_shared_noise_saves_probabilities(rule: Rule) -> None:
    """Under gumbel a rule that decides by position needs draft statistics only."""
    policy = DecodingParams(rule=rule, coupling=Coupling.GUMBEL)
    assert payload_spec(policy).probs == (rule.kind not in NO_PROBS_UNDER_GUMBEL)
    assert not sends_ids_only(policy)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_temperature_0_needs_no_probabilities(rule: Rule) -> None:
    """A one-hot is its token; only the position after a block has no token."""
    greedy = DecodingParams(rule=rule, sampling=SamplingParams(temperature=0), rows=RowFormat.FULL)
    assert not payload_spec(greedy).probs
    after = payload_spec(replace(greedy, bonus=Bonus.TARGET))
    assert after.probs == (rule != Lossless())


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
def test_some_parameters_require_all_probabilities(rule: Rule, change: dict[str, object]) -> None:
    """Block verification, bonus `target`, and for a token rule an explicit format."""
    required = "rows" not in change or rule.kind in TOKEN_RULES
    assert payload_spec(replace(DecodingParams(rule=rule), **change)).probs == required


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_only_lossless_text_may_follow_a_few_tokens_of_the_drafter(rule: Rule) -> None:
    """Elsewhere `auto` keeps all but a stated mass; a smaller cut has a name, `sparse`."""
    policy = DecodingParams(rule=rule, row_entries=5)
    few = Cut(entries=5)
    assert draft_cut(policy) == (few if rule == Lossless() else Cut(lost=MAX_LOST))
    assert draft_cut(replace(policy, rows=RowFormat.SPARSE)) == few
    assert draft_cut(replace(policy, rows=RowFormat.FULL)) == Cut()


def test_statistics_and_unscaled_values_are_sent_to_rules_that_read_them() -> None:
    """q0 for token_v1, its entropy for the log rules, its maximum for position rules."""
    assert payload_spec(DecodingParams(rule=TokenV1(alpha=0))).unscaled
    assert payload_spec(DecodingParams(rule=TokenV1(alpha=0), rows=RowFormat.SPARSE)).unscaled_probs
    assert not payload_spec(
        DecodingParams(rule=TokenV3(alpha=0), rows=RowFormat.SPARSE)
    ).unscaled_probs
    for rule in (Chow(alpha=0), Diff(alpha=0), Opt(alpha=0)):
        assert payload_spec(DecodingParams(rule=rule)).draft_stats
        assert not payload_spec(DecodingParams(rule=rule)).entropy
    assert payload_spec(DecodingParams(rule=ChowLog(alpha=0))).entropy
    assert not payload_spec(DecodingParams(rule=Lossy(alpha=0.1))).draft_stats


def test_lossless_needs_no_probabilities_after_the_block() -> None:
    """Its pi is p."""
    assert not needs_probs_after_block(DecodingParams(bonus=Bonus.TARGET))
    assert needs_probs_after_block(DecodingParams(bonus=Bonus.TARGET, rule=Chow(alpha=0.5)))
