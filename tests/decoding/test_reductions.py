from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.decoding import reductions

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@settings(deadline=None, max_examples=40)
@given(
    vocab=st.integers(1, 5000),
    levels=st.integers(1, 4000),
    seed=st.integers(0, 2**31),
    dtype=st.sampled_from(DTYPES),
)
def test_the_first_of_the_largest_is_found(
    vocab: int, levels: int, seed: int, dtype: torch.dtype
) -> None:
    """Few levels make many ties; a slice of longer rows is no trouble."""
    chance = torch.Generator().manual_seed(seed)
    rows_NV = torch.randint(-levels, levels, (3, vocab + 7), generator=chance).to(dtype)[:, :vocab]

    found_N = reductions.argmax(rows_NV)

    values = rows_NV.double().tolist()
    assert found_N.tolist() == [row.index(max(row)) for row in values]


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_peak_and_norm_are_the_rows_own(temperature: float, dtype: torch.dtype) -> None:
    chance = torch.Generator().manual_seed(1)
    logits_NV = 5 * torch.randn(4, 3000, generator=chance, dtype=dtype)
    inverse_N1 = torch.full((4, 1), 1 / temperature, dtype=dtype)

    peak_N1, norm_N1 = reductions.peak_and_norm(logits_NV, None if temperature == 1 else inverse_N1)

    assert torch.equal(peak_N1, logits_NV.amax(1, keepdim=True))
    wanted_N1 = ((logits_NV - peak_N1) / temperature).logsumexp(1, keepdim=True)
    torch.testing.assert_close(norm_N1, wanted_N1, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("rows", "vocab"), [(0, 9), (1, 9), (7, 400_000), (40, 90_000)])
def test_pieces_are_all_rows_in_order(rows: int, vocab: int) -> None:
    numbers_NV = torch.arange(rows)[:, None].expand(rows, vocab)

    parts = [numbers_NV[some] for some in reductions.pieces(numbers_NV)]

    assert torch.equal(torch.cat(parts), numbers_NV)
    assert max(part.numel() for part in parts) <= max(reductions.PIECE, vocab)
