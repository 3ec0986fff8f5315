"""Sparse rows: the row that is shipped is the law that was sampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.sampling.sparse_probs import ABSENT, one_hot, received, size, sparsify

LIKE = torch.empty(0)


def laws(rows: int, vocab: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (4 * torch.randn(rows, vocab, generator=generator)).softmax(dim=1)


@given(entries=st.integers(1, 60), seed=st.integers(0, 1000))
def test_what_is_read_back_is_what_was_sampled(entries: int, seed: int) -> None:
    """The expert's support holds the drafter's law to the bit, in ascending order of tokens."""
    sparse = sparsify(laws(3, 50, seed), entries)
    law_NK = sparse.probs(torch.float32)
    rows = [sparse.row(i) for i in range(3)]
    support = received(rows, [0, 0, 0], [1.0] * 3, [-math.inf] * 3, like=LIKE)
    for i, row in enumerate(rows):
        kept = law_NK[i] > 0
        assert size(row) == int(kept.sum()) <= entries
        assert row.weights.max() == 1
        assert (np.diff(row.ids.astype(np.int64)) > 0).all()
        assert torch.equal(support.ids_NK[i, : size(row)], sparse.ids_NK[i][kept])
        torch.testing.assert_close(support.q_NK[i, : size(row)], law_NK[i][kept], rtol=1e-6, atol=0)
        assert not bool(support.valid_NK[i, size(row) :].any())


def test_the_likeliest_entries_stay() -> None:
    """Top-k by probability; a token far below the largest leaves, sooner where tokens are few."""
    q_NV = torch.tensor([[0.1, 0.5, 1e-12, 0.3, 0.1 - 2e-4, 2e-4, 0.0]])
    assert sparsify(q_NV, 2).row(0).ids.tolist() == [1, 3]
    assert sparsify(q_NV, 6).row(0).ids.tolist() == [0, 1, 3, 4, 5]
    q_NV[0, 5] = 1e-4
    assert sparsify(q_NV, 6).row(0).ids.tolist() == [0, 1, 3, 4]
    assert sparsify(q_NV, 7).row(0).ids.tolist() == [0, 1, 3, 4, 5]


def test_a_full_row_has_no_ids_and_every_token() -> None:
    """Its place in the row is its token; zeros stay."""
    q_NV = torch.tensor([[0.5, 0.0, 0.5]])
    row = sparsify(q_NV, 3).row(0, full=True, unscaled_K=torch.tensor([0.4, 0.2, 0.4]))
    assert (len(row.ids), row.weights.tolist()) == (0, [1, 0, 1])
    assert row.unscaled is not None
    np.testing.assert_allclose(row.unscaled, [0.4, 0.2, 0.4], rtol=1e-3)
    support = received([row], [2], [0.3], [0.1], like=LIKE)
    assert support.q_NK.tolist() == [[0.5, 0.0, 0.5]]
    assert support.valid_NK.tolist() == [[True, False, True]]


def test_rows_of_all_kinds_share_a_batch() -> None:
    """A shipped row replaces the token it stood on; absent ones leave it."""
    rows = [ABSENT, sparsify(torch.tensor([[0.0, 0.8, 0.2]]), 2).row(0), None]
    told = [0.25, 0.5, 1.0], [0.1, 0.2, -math.inf]
    support = received(rows, [4, 5, -1], *told, like=LIKE)
    assert support.ids_NK.tolist() == [[4, 0], [1, 2], [0, 0]]
    assert support.q_NK.tolist() == [
        [0.25, 0],
        [pytest.approx(0.8, rel=1e-3), pytest.approx(0.2, rel=1e-3)],
        [0, 0],
    ]
    assert support.valid_NK.tolist() == [[True, False], [True, True], [False, False]]
    assert support.q0_NK[0, 0] == torch.tensor(0.1)


def test_a_one_hot_is_certain() -> None:
    """A greedy draft reports all mass on its token."""
    row = one_hot(7, unscaled=0.5)
    assert (row.ids.tolist(), row.weights.tolist()) == ([7], [1])
    assert row.unscaled is not None
    assert row.unscaled.tolist() == [0.5]
