"""The policy of each mode, and the slow twin in every mode."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tests import reference
from tests.support.bigram_models import Bigrams

from cascade.rules import Chow, ChowLog, Lossless, Opt, TokenV3
from cascade.speculation.modes import DraftSource, VerifyWhen, plan_for
from cascade.speculation.payload import draft_cut, payload_spec
from cascade.types import (
    Bonus,
    Confidence,
    Coupling,
    DecodingParams,
    Mode,
    Origin,
    RowFormat,
    SamplingParams,
    SequenceCascadeParams,
    Verification,
)

PAIR = Bigrams.random()

POLICY = DecodingParams(
    rule=TokenV3(alpha=0.5),
    bonus=Bonus.TARGET,
    verification=Verification.BLOCK,
    rows=RowFormat.FULL,
    seed=11,
    sampling=SamplingParams(temperature=0.9),
)


def written(
    mode: Mode,
    policy: DecodingParams = POLICY,
    *,
    draft_tokens: int = 3,
    max_tokens: int = 12,
    patience: SequenceCascadeParams | None = None,
) -> list[tuple[int, Origin]]:
    return reference.decode(
        (1, 2),
        drafter=PAIR.drafter,
        expert=PAIR.expert,
        policy=policy,
        mode=mode,
        draft_tokens=draft_tokens,
        max_tokens=max_tokens,
        patience=patience,
    )


def test_modes_with_a_block_to_judge_follow_the_request() -> None:
    """Speculation changes nothing of the policy."""
    assert plan_for(Mode.CASCADE, POLICY).params is POLICY
    assert plan_for(Mode.SPECULATIVE, POLICY).params is POLICY


@pytest.mark.parametrize(
    "mode", [Mode.EXPERT_ONLY, Mode.DRAFTER_ONLY, Mode.SEQUENCE_CASCADE, Mode.TOKEN_CASCADE]
)
@pytest.mark.parametrize("rows", RowFormat)
def test_modes_without_one_sample_as_others_and_send_nothing(mode: Mode, rows: RowFormat) -> None:
    """The sampling stays, and so does a cut that was asked for; the rows stay at home."""
    asked = DecodingParams(rule=Chow(alpha=0.3), sampling=POLICY.sampling, rows=rows)
    policy = plan_for(mode, asked).params
    assert policy.sampling == POLICY.sampling
    assert policy.verification is Verification.TOKEN
    if mode is not Mode.EXPERT_ONLY:
        assert not payload_spec(policy).probs
        assert draft_cut(policy) == draft_cut(asked)
    assert plan_for(mode, plan_for(mode, POLICY).params).params == plan_for(mode, POLICY).params


def test_a_mode_of_one_model_has_its_rule() -> None:
    """The expert alone is lossless; the drafter alone never defers."""
    assert plan_for(Mode.EXPERT_ONLY, POLICY).params.rule == Lossless()
    assert plan_for(Mode.DRAFTER_ONLY, POLICY).params.rule == Chow(alpha=1)
    assert plan_for(Mode.TOKEN_CASCADE, DecodingParams(rule=Chow(alpha=0.3))).params.rule == Chow(
        alpha=0.3
    )


def test_expert_only_and_drafter_only_are_each_models_text() -> None:
    """Greedy: the argmax of one model, token after token."""
    greedy = DecodingParams(sampling=SamplingParams(temperature=0))
    for mode, rows_VV, origin in (
        (Mode.EXPERT_ONLY, PAIR.expert_VV, Origin.EXPERT),
        (Mode.DRAFTER_ONLY, PAIR.drafter_VV, Origin.KEPT),
    ):
        tokens, last = list[int](), 2
        for _ in range(12):
            last = int(rows_VV[last].argmax())
            tokens.append(last)
        assert written(mode, greedy) == [(token, origin) for token in tokens]


def test_a_token_cascade_is_chow_without_speculation() -> None:
    """Each token is the drafter's where it is sure, and else the expert's."""
    policy = DecodingParams(rule=Chow(alpha=0.55), sampling=SamplingParams(temperature=0))
    last = 2
    for token, origin in written(Mode.TOKEN_CASCADE, policy):
        sure = float(PAIR.drafter_VV[last].softmax(0).max()) >= 0.45
        rows_VV = PAIR.drafter_VV if sure else PAIR.expert_VV
        assert origin is (Origin.KEPT if sure else Origin.EXPERT)
        assert token == int(rows_VV[last].argmax())
        last = token


@pytest.mark.parametrize("confidence", Confidence)
def test_a_sequence_cascade_waits_and_sees(confidence: Confidence) -> None:
    """A sure drafter answers whole, an unsure one not at all."""
    patient = SequenceCascadeParams(confidence=confidence, threshold=-100.0)
    strict = SequenceCascadeParams(confidence=confidence, threshold=0.0)
    assert written(Mode.SEQUENCE_CASCADE, patience=patient) == written(Mode.DRAFTER_ONLY)
    assert written(Mode.SEQUENCE_CASCADE, patience=strict) == written(Mode.EXPERT_ONLY)


def test_shared_noise_makes_speculation_invisible() -> None:
    """gumbel, lossless: the text of expert_only, with or without a drafter."""
    policy = DecodingParams(coupling=Coupling.GUMBEL, seed=5)
    alone = [token for token, _ in written(Mode.EXPERT_ONLY, policy)]
    for length in (0, 1, 4, 9):
        text = written(Mode.SPECULATIVE, policy, draft_tokens=length)
        assert [token for token, _ in text] == alone


def test_no_mode_writes_past_a_stop_token_or_the_limit() -> None:
    """An answer ends at its stop token, or at its length."""
    for mode in Mode:
        rule = Chow(alpha=0.5) if mode is Mode.TOKEN_CASCADE else POLICY.rule
        policy = DecodingParams(rule=rule, seed=3, stop_ids=(2, 9))
        tokens = [token for token, _ in written(mode, policy, max_tokens=40)]
        assert tokens[-1] in policy.stop_ids
        assert not set(tokens[:-1]) & set(policy.stop_ids)
        assert len(written(mode, DecodingParams(rule=rule), max_tokens=7)) == 7


def test_a_rule_of_tokens_has_no_token_cascade() -> None:
    """Only a rule that decides a position can hand over a position."""
    with pytest.raises(TypeError, match="token_v3 does not decide by position"):
        written(Mode.TOKEN_CASCADE, POLICY)


def test_models_may_speak_any_float_type() -> None:
    """The twin computes in float64 whatever the models give."""
    narrow = reference.decode(
        (1,),
        drafter=lambda tokens: PAIR.drafter(tokens).to(torch.bfloat16),
        expert=lambda tokens: PAIR.expert(tokens).to(torch.bfloat16),
        policy=POLICY,
        max_tokens=5,
    )
    assert len(narrow) == 5


@pytest.mark.parametrize("rule", [Chow(alpha=0.3), ChowLog(alpha=1.0)])
@pytest.mark.parametrize("mode", [Mode.SPECULATIVE, Mode.CASCADE, Mode.TOKEN_CASCADE])
def test_a_rule_of_the_drafter_alone_ships_nothing(mode: Mode, rule: Chow | ChowLog) -> None:
    """Its decisions are taken where the rows are: no expert verifies, no bonus follows."""
    plan = plan_for(mode, replace(POLICY, rule=rule))
    policy = plan.params
    assert plan.verify is VerifyWhen.ON_DEFERRAL
    assert (policy.rule, policy.bonus, policy.rows) == (rule, Bonus.NONE, POLICY.rows)
    assert policy.verification is Verification.TOKEN
    assert not payload_spec(policy).probs


@pytest.mark.parametrize(
    ("mode", "drafter", "verify"),
    [
        (Mode.EXPERT_ONLY, DraftSource.NONE, VerifyWhen.ALWAYS),
        (Mode.DRAFTER_ONLY, DraftSource.REQUIRED, VerifyWhen.NEVER),
        (Mode.SEQUENCE_CASCADE, DraftSource.REQUIRED, VerifyWhen.NEVER),
        (Mode.TOKEN_CASCADE, DraftSource.REQUIRED, VerifyWhen.ON_DEFERRAL),
        (Mode.SPECULATIVE, DraftSource.BEST_EFFORT, VerifyWhen.ALWAYS),
        (Mode.CASCADE, DraftSource.BEST_EFFORT, VerifyWhen.ALWAYS),
    ],
)
def test_each_mode_has_one_plan(mode: Mode, drafter: DraftSource, verify: VerifyWhen) -> None:
    plan = plan_for(mode, DecodingParams(rule=Opt(alpha=0.3)))
    assert (plan.drafter, plan.verify) == (drafter, verify)
