"""What a block carries under each policy, rule by rule."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.support import enumeration

from cascade.rules import Chow, ChowLog, Diff, Lossless, Lossy, Opt, TokenV1, TokenV3
from cascade.speculation.payload import (
    ProbsPayload,
    needs_probs_after_block,
    payload_spec,
    sends_ids_only,
)
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, SamplingParams, Verification

if TYPE_CHECKING:
    from cascade.rules import Rule

TOKEN_RULES = {"token_v1", "token_v2", "token_v3", "typical"}

DECIDED_BY_DRAFTER = {"chow", "chow_log"}

NO_PROBS_UNDER_GUMBEL = {"lossless", "chow", "chow_log", "diff", "diff_log", "bild"}


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_each_rule_sends_the_least_that_is_exact(rule: Rule) -> None:
    """Token rules send no probabilities, chow where it defers, all others for every token."""
    expected = ProbsPayload.NONE if rule.kind in TOKEN_RULES else ProbsPayload.ALL
    expected = ProbsPayload.DEFERRED if rule.kind in DECIDED_BY_DRAFTER else expected
    policy = DecodingParams(rule=rule)
    assert payload_spec(policy).probs is expected
    assert sends_ids_only(policy) == (rule.kind in TOKEN_RULES)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_shared_noise_saves_probabilities(rule: Rule) -> None:
    """Under gumbel a rule that decides by position needs draft statistics only."""
    policy = DecodingParams(rule=rule, coupling=Coupling.GUMBEL)
    sends_none = payload_spec(policy).probs is ProbsPayload.NONE
    assert sends_none == (rule.kind in NO_PROBS_UNDER_GUMBEL)
    assert not sends_ids_only(policy)


@pytest.mark.parametrize("rule", enumeration.RULES, ids=lambda rule: rule.kind)
def test_temperature_0_needs_no_probabilities(rule: Rule) -> None:
    """A one-hot is its token; only the position after a block has no token."""
    greedy = DecodingParams(rule=rule, sampling=SamplingParams(temperature=0), rows=RowFormat.FULL)
    assert payload_spec(greedy).probs is ProbsPayload.NONE
    after = payload_spec(replace(greedy, bonus=Bonus.TARGET))
    assert (after.probs is ProbsPayload.ALL) == (rule != Lossless())


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
    """Block verification, bonus `target` and an explicit format."""
    assert payload_spec(replace(DecodingParams(rule=rule), **change)).probs is ProbsPayload.ALL


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
