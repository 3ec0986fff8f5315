"""Drafting: a token from each row, and an honest report of the row it came from."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from tests.support import enumeration

from cascade.rules import Chow, ChowLog, Diff, Lossless, TokenV1, TokenV3
from cascade.sampling.sparse_probs import ABSENT, size
from cascade.speculation.draft import DraftTask, block_of, defers_alone, draft_step
from cascade.speculation.payload import ProbsPayload, payload_spec
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, SamplingParams, Verification

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
    return DraftTask(policy=policy, position=position, start=start)


@pytest.mark.parametrize("policy", POLICIES, ids=range(len(POLICIES)))
def test_tokens_follow_the_reported_law(policy: DecodingParams) -> None:
    """Over many seeds a token's frequency is its reported likelihood; rows say the same."""
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
    row = drafts[0].row
    if row is not None and size(row):
        ids = row.ids.tolist() or list(range(VOCAB))
        weights = row.weights.astype(np.float64)
        law = dict(zip(ids, weights / weights.sum(), strict=True))
        assert all(x == pytest.approx(law[token], rel=1e-5) for token, x in likelihood.items())


def test_a_batch_of_all_policies_is_each_alone() -> None:
    """Grouping changes no draft."""
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
        assert (draft.row is None) == (alone.row is None)
        if draft.row is not None and alone.row is not None:
            assert draft.row.ids.tolist() == alone.row.ids.tolist()
        if draft.gates is not None and alone.gates is not None:
            assert draft.gates.peak == pytest.approx(alone.gates.peak)
            assert draft.gates.entropy == pytest.approx(alone.gates.entropy, rel=1e-5)


def test_chow_ships_a_row_only_where_it_defers() -> None:
    """Sure rows stay at home, and their tokens come from the whole of q."""
    sure, unsure = torch.zeros(VOCAB), torch.zeros(VOCAB)
    sure[3] = 6.0
    policy = DecodingParams(rule=Chow(alpha=0.4), row_entries=6)
    drafts = draft_step(torch.stack([sure, unsure, sure]), [task(policy)] * 3)
    assert [draft.row is ABSENT for draft in drafts] == [True, False, True]
    assert [defers_alone(policy, draft) for draft in drafts] == [False, True, False]
    assert drafts[1].row is not None
    assert size(drafts[1].row) == 6
    block = block_of(drafts)
    assert (len(block.rows), len(block.draft_stats), len(block.likelihoods)) == (3, 3, 3)


def test_only_rules_of_the_drafter_defer_alone() -> None:
    """chow and chow_log are decided where the draft is written."""
    logits_BV = torch.zeros(1, VOCAB)
    for rule, deferred in (
        (ChowLog(alpha=1.0), True),
        (ChowLog(alpha=10.0), False),
        (Lossless(), False),
        (Diff(alpha=-1), False),
    ):
        policy = DecodingParams(rule=rule)
        assert defers_alone(policy, draft_step(logits_BV, [task(policy)])[0]) is deferred


def test_gates_read_the_unscaled_row() -> None:
    """Temperature, truncation and penalties touch q, not q0."""
    sampling = SamplingParams(temperature=0.2, top_k=2, presence_penalty=2.0)
    policy = DecodingParams(rule=ChowLog(alpha=1), sampling=sampling)
    logits_BV = logits(1)
    q0_V = logits_BV[0].softmax(0)
    answered = DraftTask(policy=policy, position=1, start=0, answer=(int(q0_V.argmax()),))
    gates = draft_step(logits_BV, [answered])[0].gates
    assert gates is not None
    assert gates.peak == pytest.approx(float(q0_V.max()))
    assert gates.favourite == int(q0_V.argmax())
    assert gates.entropy == pytest.approx(float(torch.special.entr(q0_V).sum()), rel=1e-5)


def test_greedy_drafts_report_a_one_hot() -> None:
    """Temperature 0: the favourite, certain, with nothing else unless the rule reads it."""
    greedy = DecodingParams(sampling=SamplingParams(temperature=0))
    logits_BV = logits(1)
    draft = draft_step(logits_BV, [task(greedy)])[0]
    assert draft.token == int(logits_BV.argmax())
    assert (draft.likelihood, draft.row, draft.gates, draft.unscaled) == (1.0, None, None, None)
    told = draft_step(logits_BV, [task(replace(greedy, rule=TokenV1(alpha=0.1)))])[0]
    assert told.unscaled == pytest.approx(float(logits_BV.softmax(1).max()))
    after = draft_step(
        logits_BV, [task(replace(greedy, rule=Chow(alpha=0.1), bonus=Bonus.TARGET))]
    )[0]
    assert after.row is not None
    assert after.row.ids.tolist() == [draft.token]


def test_padding_is_never_drafted() -> None:
    """Entries from the limit on are impossible, even the likeliest."""
    logits_BV = logits(1).expand(50, -1).clone()
    logits_BV[:, 20:] += 50
    for policy in POLICIES:
        tasks = [task(replace(policy, seed=seed)) for seed in range(50)]
        drafts = draft_step(logits_BV, tasks, vocab_limit=20)
        assert all(draft.token < 20 for draft in drafts)


def test_log_probabilities_are_those_of_q0() -> None:
    """The token's, and the likeliest others, at temperature 1."""
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
def test_a_weighed_draft_names_the_rival_of_its_token(coupling: Coupling, rows: RowFormat) -> None:
    """Also where the row is shipped with fewer entries than the vocabulary has."""
    policy = DecodingParams(coupling=coupling, rows=rows, row_entries=8, seed=3)
    places = range(20)
    wide_BV = torch.linspace(0, 5, 50).repeat(len(places), 1)
    tasks = [replace(task(policy, position=place), weighed=True) for place in places]
    for draft in draft_step(wide_BV, tasks):
        assert draft.confidence is not None
        assert draft.confidence.rival != draft.token
        assert 0 < draft.confidence.share <= 1
        assert draft.confidence.confidence == pytest.approx(
            float(wide_BV[0].softmax(0)[draft.token]), rel=1e-4
        )


def test_a_block_of_verified_blocks_tosses_its_own_coins() -> None:
    """Under block verification another start is another draft; token by token it is the same."""
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
def test_extreme_rows_are_drafted_from(policy: DecodingParams) -> None:
    """Huge logits, impossible tokens and flat rows give tokens that are possible, and no NaN."""
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
    assert all(d.row is None or np.isfinite(d.row.weights).all() for d in drafts)


def test_every_format_carries_what_needs_says() -> None:
    """Rows, gates and q0 are there exactly when the needs ask."""
    for rule in enumeration.RULES:
        for coupling in Coupling:
            policy = DecodingParams(rule=rule, coupling=coupling, rows=RowFormat.SPARSE)
            need, draft = payload_spec(policy), draft_step(logits(1), [task(policy)])[0]
            assert (draft.row is not None) == (need.rows is not ProbsPayload.NONE)
            assert (draft.gates is not None) == need.draft_stats
            assert (draft.unscaled is not None) == need.unscaled
            if draft.row is not None:
                assert (draft.row.unscaled is not None) == need.row_unscaled
