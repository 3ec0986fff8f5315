"""Sparse probabilities: what is sent is exactly what was sampled from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.sampling.sparse_probs import Cut, SparseRows, received, sparsify
from cascade.types import SparseProbs

VOCAB, LIKE = 50, torch.empty(0)


def random_probs(rows: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, vocab, generator=generator)).softmax(dim=1)


def normalised(rows: SparseRows) -> torch.Tensor:
    return rows.weights_NK.double() / rows.weights_NK.double().sum(dim=1, keepdim=True)


def dense(ids_K: torch.Tensor | None, probs_K: torch.Tensor) -> torch.Tensor:
    zeros_V = torch.zeros(VOCAB, dtype=probs_K.dtype)
    return probs_K if ids_K is None else zeros_V.scatter_(0, ids_K, probs_K)


cuts = st.one_of(
    st.builds(Cut, entries=st.integers(1, 60)),
    st.builds(Cut, lost=st.sampled_from([0.0, 1e-4, 0.01, 0.5])),
)


@given(cut=cuts, seed=st.integers(0, 1000))
def test_the_expert_reads_back_what_the_drafter_sampled_from(cut: Cut, seed: int) -> None:
    """Bit for bit, in ascending order of token ids, and in the form that takes fewer bytes."""
    sparse = sparsify(random_probs(3, VOCAB, seed), cut)
    probs_NK = normalised(sparse)
    rows = [sparse.row(i) for i in range(3)]
    support = received(rows, [0, 0, 0], [1.0] * 3, None, vocab=VOCAB, like=LIKE)
    for i, row in enumerate(rows):
        count = int((probs_NK[i] > 0).sum())
        assert cut.entries is None or count <= cut.entries
        assert (np.diff(row.ids.astype(np.int64)) > 0).all()
        sent_bytes = row.ids.nbytes + row.weights.nbytes
        assert sent_bytes <= (6 * count if cut.entries else min(6 * count, 2 * VOCAB))
        ids_NK, valid_NK = support.ids_NK, support.valid_NK
        valid = slice(None) if valid_NK is None else valid_NK[i]
        ids_K = None if ids_NK is None else ids_NK[i][valid]
        sent = dense(ids_K, support.q_NK[i][valid].double())
        sampled = dense(None if sparse.ids_NK is None else sparse.ids_NK[i], probs_NK[i])
        torch.testing.assert_close(sent, sampled, rtol=1e-6, atol=0)


@given(
    lost=st.sampled_from([1e-4, 1e-3, 0.1]),
    scale=st.floats(0.1, 12),
    vocab=st.sampled_from([2, 50, 3000]),
    seed=st.integers(0, 1000),
)
def test_a_cut_by_mass_drops_the_unlikeliest_tokens_up_to_that_mass(
    lost: float, scale: float, vocab: int, seed: int
) -> None:
    """At most that mass, and no less than whole classes of like tokens fill of it."""
    generator = torch.Generator().manual_seed(seed)
    q_NV = (scale * torch.randn(4, vocab, generator=generator)).softmax(dim=1)
    kept_NV = sparsify(q_NV, Cut(lost=lost)).weights_NK > 0
    for q_V, kept_V in zip(q_NV.double(), kept_NV, strict=True):
        assert float(q_V[~kept_V].sum()) <= lost * 1.002
        least, largest = float(q_V[kept_V].min()), float(q_V[~kept_V].max()) if any(~kept_V) else 0
        assert least >= largest * 0.998
        assert float(q_V[q_V <= least * 1.26].sum()) > lost * 0.998


@settings(max_examples=20)
@given(scale=st.floats(0.0, 4), vocab=st.sampled_from([30, 3000, 128_000]), seed=st.integers(0, 9))
def test_rounding_changes_no_distribution_much(scale: float, vocab: int, seed: int) -> None:
    """Beside the mass that is cut, by less than 2**-11 in total variation over any vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(1, vocab, generator=generator)
    logits_NV[0, 7] += 12  # a likely token, over a tail of the vocabulary
    q_NV = logits_NV.softmax(dim=1)
    for cut in (Cut(), Cut(lost=1e-4)):
        found_NV = normalised(sparsify(q_NV, cut))
        assert float((found_NV - q_NV.double()).clamp_min(0).sum()) < cut.lost + 2**-11


def test_the_likeliest_entries_are_kept() -> None:
    """Tokens far below the largest are dropped, at a higher bound if entries are fewer than V."""
    q_NV = torch.tensor([[0.1, 0.5, 1e-14, 0.3, 0.1 - 2e-4, 2e-4, 0.0]])
    assert sparsify(q_NV, Cut(entries=2)).row(0).ids.tolist() == [1, 3]
    assert sparsify(q_NV, Cut(entries=6)).row(0).ids.tolist() == [0, 1, 3, 4, 5]
    q_NV[0, 5] = 1e-4
    assert sparsify(q_NV, Cut(entries=6)).row(0).ids.tolist() == [0, 1, 3, 4]
    assert np.flatnonzero(sparsify(q_NV, Cut(entries=7)).row(0).weights).tolist() == [0, 1, 3, 4, 5]


def test_a_row_of_most_tokens_has_a_weight_for_every_token_and_no_ids() -> None:
    q_NV = torch.tensor([[0.5, 0.0, 0.5]])
    row = sparsify(q_NV, Cut()).row(0, unscaled_K=torch.tensor([0.4, 0.2, 0.4]))
    assert (len(row.ids), row.weights.tolist()) == (0, [2**15, 0, 2**15])
    assert row.unscaled is not None
    np.testing.assert_allclose(row.unscaled, [0.4, 0.2, 0.4], rtol=1e-3)
    support = received([row, row], [2, 1], [0.3] * 2, [0.1] * 2, vocab=3, like=LIKE)
    assert support.q_NK.tolist() == [[0.5, 0.0, 0.5]] * 2
    assert (support.ids_NK, support.valid_NK) == (None, None)
    assert support.has_token_N.tolist() == [True, False], "q of token 1 is 0"


def test_rows_of_some_tokens_beside_one_of_all_are_rows_of_all() -> None:
    whole = sparsify(torch.tensor([[0.5, 0.25, 0.25]]), Cut()).row(0)
    some = sparsify(torch.tensor([[0.0, 0.75, 0.25]]), Cut(entries=2)).row(0)
    support = received([whole, some, None], [0, 2, 1], [1, 1, 0.5], None, vocab=3, like=LIKE)
    assert support.ids_NK is None
    wanted_NK = torch.tensor([[0.5, 0.25, 0.25], [0.0, 0.75, 0.25], [0.0, 0.5, 0.0]])
    torch.testing.assert_close(support.q_NK, wanted_NK, rtol=1e-3, atol=0)
    assert support.index_N1.squeeze(1).tolist() == [0, 2, 1]


def test_sent_absent_and_missing_rows_share_a_batch() -> None:
    """Where no row was sent, the drafted token and its likelihood are known."""
    absent = SparseProbs(ids=np.empty(0, np.uint32), weights=np.empty(0, np.float16))
    rows = [absent, sparsify(torch.tensor([[0.0, 0.8, 0.2]]), Cut(entries=2)).row(0), None]
    known = [0.25, 0.5, 1.0], [0.1, 0.2, -math.inf]
    support = received(rows, [4, 5, -1], *known, vocab=9, like=LIKE)
    assert support.ids_NK is not None
    assert support.valid_NK is not None
    assert support.q0_NK is not None
    assert support.has_token_N.tolist() == [True, False, False]
    assert support.ids_NK.tolist() == [[4, 0], [1, 2], [0, 0]]
    assert support.q_NK.tolist() == [
        [0.25, 0],
        [pytest.approx(0.8, rel=1e-3), pytest.approx(0.2, rel=1e-3)],
        [0, 0],
    ]
    assert support.valid_NK.tolist() == [[True, False], [True, True], [False, False]]
    assert support.q0_NK[0, 0] == torch.tensor(0.1)
