"""Drafting: tokens follow the distribution that is reported with them."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tests.support import enumeration

from cascade.rules import Chow, ChowLog, Diff, Lossless, TokenV1, TokenV3
from cascade.sampling.rng import Purpose
from cascade.speculation.draft import (
    DraftTask,
    block_of,
    can_draw,
    draft_step,
    drafter_defers,
    draw,
)
from cascade.speculation.modes import plan_for
from cascade.speculation.payload import MAX_LOST, payload_spec
from cascade.types import (
    Bonus,
    Coupling,
    DecodingParams,
    Mode,
    RowFormat,
    SamplingParams,
    Verification,
)

VOCAB = 30

SPARSE = DecodingParams(rows=RowFormat.SPARSE, row_entries=6)

POLICIES = [
    SPARSE,
    replace(SPARSE, rows=RowFormat.FULL),
    replace(SPARSE, coupling=Coupling.GUMBEL, rule=Diff(alpha=0.1)),
    DecodingParams(coupling=Coupling.GUMBEL),
    DecodingParams(rule=TokenV3(alpha=0.5)),
    DecodingParams(rule=Chow(alpha=0.4), row_entries=6),
]


def logits(rows: int, *, seed: int = 0) -> torch.Tensor:
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def task(policy: DecodingParams, *, position: int = 0, start: int = 0) -> DraftTask:
    return DraftTask(policy=policy, position=position, block_start=start)


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_tokens_follow_the_reported_distribution(policy: DecodingParams) -> None:
    """Over many seeds a token's frequency is its likelihood, which the probabilities confirm."""
    samples = 4000
    one_1V = logits(1, seed=3)
    tasks = [task(replace(policy, seed=seed)) for seed in range(samples)]
    drafts = draft_step(one_1V.expand(samples, -1), tasks)
    likelihood = {draft.token: draft.likelihood for draft in drafts}
    counts = {token: sum(d.token == token for d in drafts) for token in likelihood}
    likely = [token for token in counts if likelihood[token] * samples >= 5]
    found = [counts[token] for token in likely]
    rest = samples - sum(found)
    wanted = [samples * likelihood[token] for token in likely]
    wanted_rest = samples - sum(wanted)
    if rest and wanted_rest > 5:
        found, wanted = [*found, rest], [*wanted, wanted_rest]
    scaled = [w * sum(found) / sum(wanted) for w in wanted]
    assert stats.chisquare(found, scaled).pvalue > 1e-3
    row = drafts[0].probs
    if row is not None and len(row.weights):
        ids = row.ids.tolist() or list(range(VOCAB))
        weights = row.weights.astype(np.float64)
        sent = dict(zip(ids, weights / weights.sum(), strict=True))
        assert all(x == pytest.approx(sent[token], rel=1e-5) for token, x in likelihood.items())


def test_a_batch_of_all_policies_equals_each_policy_alone() -> None:
    policies = [
        replace(
            DecodingParams(
                rule=rule, coupling=coupling, row_entries=6, seed=i, logprobs=i % 3 or None
            ),
            sampling=SamplingParams(temperature=(0.0, 1.0, 0.6)[i % 3], top_p=0.9),
            bonus=tuple(Bonus)[i % 3],
            verification=tuple(Verification)[i % 2],
        )
        for i, (rule, coupling) in enumerate(
            (rule, coupling)
            for rule in enumeration.RULES
            for coupling in (*Coupling, Coupling.MAXIMAL)
        )
    ]
    tasks = [task(policy, position=i) for i, policy in enumerate(policies)]
    logits_BV = logits(len(tasks))
    together = draft_step(logits_BV, tasks)
    for i, draft in enumerate(together):
        alone = draft_step(logits_BV[i : i + 1], [tasks[i]])[0]
        assert draft.token == alone.token
        assert draft.likelihood == pytest.approx(alone.likelihood, rel=1e-5)
        assert (draft.probs is None) == (alone.probs is None)
        if draft.probs is not None and alone.probs is not None:
            assert draft.probs.ids.tolist() == alone.probs.ids.tolist()
        if draft.draft_stats is not None and alone.draft_stats is not None:
            assert draft.draft_stats.max_prob == pytest.approx(alone.draft_stats.max_prob)
            assert draft.draft_stats.entropy == pytest.approx(alone.draft_stats.entropy, rel=1e-5)


def test_chow_sends_its_statistics_and_no_probabilities() -> None:
    sure, unsure = torch.zeros(VOCAB), torch.zeros(VOCAB)
    sure[3] = 6.0
    policy = DecodingParams(rule=Chow(alpha=0.4))
    drafts = draft_step(torch.stack([sure, unsure, sure]), [task(policy)] * 3)
    assert [drafter_defers(policy, draft) for draft in drafts] == [False, True, False]
    block = block_of(drafts)
    assert (len(block.draft_probs), len(block.draft_stats), len(block.likelihoods)) == (0, 3, 3)


@pytest.mark.parametrize("rows", RowFormat)
@pytest.mark.parametrize("coupling", Coupling)
@pytest.mark.parametrize("temperature", [0.7, 1.5])
def test_the_drafter_has_one_distribution_in_every_mode_and_under_every_rule(
    rows: RowFormat, coupling: Coupling, temperature: float
) -> None:
    """Whether it is sent or not: the likelihood of a token depends on the format alone.

    Under `auto` it is the model's own, but for lossless, where it changes no text.
    """
    params = DecodingParams(
        rows=rows,
        row_entries=6,
        coupling=coupling,
        sampling=SamplingParams(temperature=temperature),
    )
    logits_BV = logits(1).expand(50, -1)
    q_V = (logits_BV[0].double() / temperature).softmax(0)
    if rows is RowFormat.SPARSE:
        q_V = q_V * (q_V >= q_V.sort(descending=True).values[5])
        q_V = q_V / q_V.sum()
    modes = (Mode.CASCADE, Mode.DRAFTER_ONLY, Mode.SEQUENCE_CASCADE)
    policies = [
        plan_for(mode, replace(params, rule=rule)).params
        for rule in enumeration.RULES
        for mode in (*modes, *[Mode.TOKEN_CASCADE] * isinstance(rule, Chow | ChowLog))
    ]
    for policy in policies:
        if rows is RowFormat.AUTO and policy.rule == Lossless():
            continue
        for draft in draft_step(logits_BV, [task(replace(policy, seed=i)) for i in range(50)]):
            assert draft.likelihood == pytest.approx(float(q_V[draft.token]), rel=1e-3), policy


def test_auto_cuts_at_a_stated_mass_at_any_temperature() -> None:
    """What is sent is within it of the model's own distribution, over a large vocabulary."""
    generator = torch.Generator().manual_seed(0)
    wide_BV = 3 * torch.randn(1, 20_000, generator=generator)
    for temperature in (0.7, 1.0, 1.2, 1.5):
        sampling = SamplingParams(temperature=temperature)
        draft = draft_step(wide_BV, [task(DecodingParams(rule=Diff(alpha=1), sampling=sampling))])
        row = draft[0].probs
        assert row is not None
        sent_V = np.zeros(wide_BV.shape[1])
        weights = row.weights.astype(np.float64)
        sent_V[row.ids if len(row.ids) else slice(None)] = weights / weights.sum()
        q_V = (wide_BV[0].double() / temperature).softmax(0).numpy()
        assert np.maximum(sent_V - q_V, 0).sum() < MAX_LOST + 2**-11


def test_only_rules_that_read_the_drafter_alone_defer_without_the_expert() -> None:
    """These are chow and chow_log."""
    logits_BV = torch.zeros(1, VOCAB)
    for rule, deferred in (
        (ChowLog(alpha=1.0), True),
        (ChowLog(alpha=10.0), False),
        (Lossless(), False),
        (Diff(alpha=-1), False),
    ):
        policy = DecodingParams(rule=rule)
        assert drafter_defers(policy, draft_step(logits_BV, [task(policy)])[0]) is deferred


def test_draft_statistics_are_those_of_q0() -> None:
    """Temperature, truncation and penalties change q only."""
    sampling = SamplingParams(temperature=0.2, top_k=2, presence_penalty=2.0)
    policy = DecodingParams(rule=ChowLog(alpha=1), sampling=sampling)
    logits_BV = logits(1)
    q0_V = logits_BV[0].softmax(0)
    answered = DraftTask(policy=policy, position=1, block_start=0, answer=(int(q0_V.argmax()),))
    stats = draft_step(logits_BV, [answered])[0].draft_stats
    assert stats is not None
    assert stats.max_prob == pytest.approx(float(q0_V.max()))
    assert stats.argmax == int(q0_V.argmax())
    assert stats.entropy == pytest.approx(float(torch.special.entr(q0_V).sum()), rel=1e-5)


def test_greedy_drafts_report_a_one_hot() -> None:
    """Temperature 0: the argmax with likelihood 1, and what else the rule reads."""
    greedy = DecodingParams(sampling=SamplingParams(temperature=0))
    logits_BV = logits(1)
    draft = draft_step(logits_BV, [task(greedy)])[0]
    assert draft.token == int(logits_BV.argmax())
    assert draft.likelihood == 1.0
    assert draft.probs is draft.draft_stats is draft.unscaled is None
    v1 = replace(greedy, rule=TokenV1(alpha=0.1), bonus=Bonus.TARGET)
    scored = draft_step(logits_BV, [task(v1)])[0]
    assert scored.unscaled == pytest.approx(float(logits_BV.softmax(1).max()))
    assert scored.probs is not None
    assert scored.probs.unscaled is not None
    assert scored.probs.unscaled.tolist() == pytest.approx([scored.unscaled], rel=1e-3)
    after = draft_step(
        logits_BV, [task(replace(greedy, rule=Chow(alpha=0.1), bonus=Bonus.TARGET))]
    )[0]
    assert after.probs is not None
    assert (after.probs.ids.tolist(), after.probs.weights.tolist()) == ([draft.token], [1])


def test_padding_is_never_drafted() -> None:
    """Ids from the limit on are impossible, even the likeliest."""
    logits_BV = logits(1).expand(50, -1).clone()
    logits_BV[:, 20:] += 50
    for policy in POLICIES:
        tasks = [task(replace(policy, seed=seed)) for seed in range(50)]
        drafts = draft_step(logits_BV, tasks, vocab_limit=20)
        assert all(draft.token < 20 for draft in drafts)


def test_log_probabilities_are_those_of_q0() -> None:
    """Of the token and of the likeliest tokens, at temperature 1."""
    policy = DecodingParams(logprobs=3, sampling=SamplingParams(temperature=0.5))
    logits_BV = logits(1)
    draft = draft_step(logits_BV, [task(policy)])[0]
    log_V = logits_BV[0].log_softmax(0)
    assert draft.logprob is not None
    assert draft.logprob.logprob == pytest.approx(float(log_V[draft.token]), abs=1e-5)
    best = log_V.topk(3)
    assert [token for token, _ in draft.logprob.top] == best.indices.tolist()
    assert [x for _, x in draft.logprob.top] == pytest.approx(best.values.tolist(), abs=1e-5)


@pytest.mark.parametrize("coupling", list(Coupling))
@pytest.mark.parametrize("rows", list(RowFormat))
def test_a_draft_with_confidence_names_a_runner_up(coupling: Coupling, rows: RowFormat) -> None:
    """Also where fewer probabilities are sent than the vocabulary has tokens."""
    policy = DecodingParams(coupling=coupling, rows=rows, row_entries=8, seed=3)
    positions = range(20)
    wide_BV = torch.linspace(0, 5, 50).repeat(len(positions), 1)
    tasks = [replace(task(policy, position=i), with_confidence=True) for i in positions]
    for draft in draft_step(wide_BV, tasks):
        assert draft.confidence is not None
        assert draft.confidence.runner_up != draft.token
        assert 0 < draft.confidence.runner_up_share <= 1
        assert draft.confidence.probability == pytest.approx(
            float(wide_BV[0].softmax(0)[draft.token]), rel=1e-4
        )


def test_random_numbers_depend_on_the_block_start_in_block_verification_only() -> None:
    logits_BV = logits(1).expand(40, -1)
    for verification, same in ((Verification.TOKEN, True), (Verification.BLOCK, False)):
        policy = replace(SPARSE, verification=verification)
        first, second = (
            draft_step(
                logits_BV,
                [task(replace(policy, seed=i), position=9, start=start) for i in range(40)],
            )
            for start in (7, 8)
        )
        assert ([d.token for d in first] == [d.token for d in second]) is same


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_extreme_logits_give_possible_tokens(policy: DecodingParams) -> None:
    """Huge logits, impossible tokens and flat rows; no probability is NaN."""
    rows = torch.stack(
        [
            torch.full((VOCAB,), -math.inf).index_fill(0, torch.tensor([7]), 0.0),
            torch.full((VOCAB,), 1e30),
            torch.full((VOCAB,), -1e30).index_fill(0, torch.tensor([7]), 1e30),
            torch.linspace(-1e4, 1e4, VOCAB),
        ]
    )
    drafts = draft_step(rows, [task(replace(policy, seed=i)) for i in range(4)])
    assert [drafts[i].token for i in (0, 2, 3)] == [7, 7, VOCAB - 1]
    assert all(0 < draft.likelihood <= 1 for draft in drafts)
    assert all(d.probs is None or np.isfinite(d.probs.weights).all() for d in drafts)


def test_a_draft_carries_what_its_payload_spec_says() -> None:
    for rule in enumeration.RULES:
        for coupling in Coupling:
            policy = DecodingParams(rule=rule, coupling=coupling, rows=RowFormat.SPARSE)
            spec, draft = payload_spec(policy), draft_step(logits(1), [task(policy)])[0]
            assert (draft.probs is not None) == spec.probs
            assert (draft.draft_stats is not None) == spec.draft_stats
            assert (draft.unscaled is not None) == spec.unscaled
            if draft.probs is not None:
                assert (draft.probs.unscaled is not None) == spec.unscaled_probs


DRAWN = [
    *POLICIES,
    DecodingParams(sampling=SamplingParams(temperature=0.0)),
    DecodingParams(sampling=SamplingParams(temperature=0.7, top_k=9, top_p=0.9, min_p=0.02)),
    DecodingParams(sampling=SamplingParams(logit_bias=((3, 4.0),))),
    DecodingParams(verification=Verification.BLOCK),
]


def mixed() -> list[DraftTask]:
    """Return tasks that are drafted in several batches, in no order of these."""
    tasks = [task(replace(policy, seed=7), position=i) for i, policy in enumerate(2 * DRAWN)]
    return [replace(one, purpose=Purpose(1 + 2 * (i % 2))) for i, one in enumerate(tasks)]


def test_tokens_drawn_are_those_drafted() -> None:
    for tasks in ([task(DRAWN[0])] * 3, mixed()):
        logits_BV = logits(len(tasks), seed=5)
        drafts = draft_step(logits_BV, tasks)
        assert draw(logits_BV, tasks).tolist() == [draft.token for draft in drafts]


@pytest.mark.parametrize("policy", DRAWN, ids=range(len(DRAWN)))
def test_tokens_are_drawn_without_a_read(policy: DecodingParams) -> None:
    """On a device without numbers, where a read fails."""
    drawn_B = draw(logits(4).to("meta"), [task(policy)] * 4)
    assert (drawn_B.shape, drawn_B.device.type, drawn_B.dtype) == ((4,), "meta", torch.int64)


def test_tokens_that_penalties_count_are_not_drawn() -> None:
    assert all(can_draw(one) for one in mixed())
    for sampling in (SamplingParams(presence_penalty=0.1), SamplingParams(repetition_penalty=2)):
        assert not can_draw(task(DecodingParams(sampling=sampling)))
