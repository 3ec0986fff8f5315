"""Sparse probabilities: what is sent is exactly what was sampled from."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.sampling.sparse_probs import ABSENT, received, sparsify

LIKE = torch.empty(0)


def random_probs(rows: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, vocab, generator=generator)).softmax(dim=1)


@given(entries=st.integers(1, 60), seed=st.integers(0, 1000))
def test_the_expert_reads_back_what_the_drafter_sampled_from(entries: int, seed: int) -> None:
    """Bit for bit, in ascending order of token ids."""
    sparse = sparsify(random_probs(3, 50, seed), entries)
    probs_NK = sparse.probs(torch.float32)
    rows = [sparse.row(i) for i in range(3)]
    support = received(rows, [0, 0, 0], [1.0] * 3, [-math.inf] * 3, like=LIKE)
    for i, row in enumerate(rows):
        kept = probs_NK[i] > 0
        count = len(row.weights)
        assert count == int(kept.sum()) <= entries
        assert row.weights.max() == 1
        assert (np.diff(row.ids.astype(np.int64)) > 0).all()
        assert torch.equal(support.ids_NK[i, :count], sparse.ids_NK[i][kept])
        torch.testing.assert_close(support.q_NK[i, :count], probs_NK[i][kept], rtol=1e-6, atol=0)
        assert not bool(support.valid_NK[i, count:].any())


def test_the_likeliest_entries_are_kept() -> None:
    """Tokens far below the largest are dropped, at a higher bound if entries are fewer than V."""
    q_NV = torch.tensor([[0.1, 0.5, 1e-12, 0.3, 0.1 - 2e-4, 2e-4, 0.0]])
    assert sparsify(q_NV, 2).row(0).ids.tolist() == [1, 3]
    assert sparsify(q_NV, 6).row(0).ids.tolist() == [0, 1, 3, 4, 5]
    q_NV[0, 5] = 1e-4
    assert sparsify(q_NV, 6).row(0).ids.tolist() == [0, 1, 3, 4]
    assert sparsify(q_NV, 7).row(0).ids.tolist() == [0, 1, 3, 4, 5]


def test_a_full_row_has_a_weight_for_every_token_and_no_ids() -> None:
    q_NV = torch.tensor([[0.5, 0.0, 0.5]])
    row = sparsify(q_NV, 3).row(0, full=True, unscaled_K=torch.tensor([0.4, 0.2, 0.4]))
    assert (len(row.ids), row.weights.tolist()) == (0, [1, 0, 1])
    assert row.unscaled is not None
    np.testing.assert_allclose(row.unscaled, [0.4, 0.2, 0.4], rtol=1e-3)
    support = received([row], [2], [0.3], [0.1], like=LIKE)
    assert support.q_NK.tolist() == [[0.5, 0.0, 0.5]]
    assert support.valid_NK.tolist() == [[True, False, True]]


def test_sent_absent_and_missing_rows_share_a_batch() -> None:
    """Where no row was sent, the drafted token and its likelihood are known."""
    rows = [ABSENT, sparsify(torch.tensor([[0.0, 0.8, 0.2]]), 2).row(0), None]
    known = [0.25, 0.5, 1.0], [0.1, 0.2, -math.inf]
    support = received(rows, [4, 5, -1], *known, like=LIKE)
    assert support.ids_NK.tolist() == [[4, 0], [1, 2], [0, 0]]
    assert support.q_NK.tolist() == [
        [0.25, 0],
        [pytest.approx(0.8, rel=1e-3), pytest.approx(0.2, rel=1e-3)],
        [0, 0],
    ]
    assert support.valid_NK.tolist() == [[True, False], [True, True], [False, False]]
    assert support.q0_NK[0, 0] == torch.tensor(0.1)
