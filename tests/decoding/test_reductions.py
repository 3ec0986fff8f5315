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


@settings(deadline=None, max_examples=60)
@given(
    spread=st.floats(0.01, 12),
    mass=st.floats(1e-6, 1),
    temperature=st.floats(0.05, 3),
    levels=st.sampled_from([None, 5]),
    seed=st.integers(0, 2**31),
)
def test_a_nucleus_ends_where_its_mass_is_reached(
    spread: float, mass: float, temperature: float, levels: int | None, seed: int
) -> None:
    """Flat rows and steep ones, with ties or without; a token that is cut already has no mass."""
    chance = torch.Generator().manual_seed(seed)
    logits_NV = spread * torch.randn(3, 900, generator=chance, dtype=torch.float64)
    if levels:
        logits_NV = (logits_NV * levels / spread).round()
    inverse_N1 = torch.full((3, 1), 1 / temperature, dtype=torch.float64)
    weights_NV = ((logits_NV - logits_NV.amax(1, keepdim=True)) * inverse_N1).exp()
    weights_NV[2, logits_NV[2] < logits_NV[2].median()] = 0

    cuts = reductions.nucleus_cut(logits_NV, weights_NV, inverse_N1, [mass, 1.0, mass])

    assert cuts[1].item() == -torch.inf
    for place in (0, 2) if mass < 1 else ():
        kept_V = logits_NV[place] >= cuts[place]
        wanted = mass * weights_NV[place].sum()
        assert weights_NV[place][kept_V].sum() >= wanted * (1 - 1e-12)
        more_V = logits_NV[place] > cuts[place]
        assert weights_NV[place][more_V].sum() < wanted * (1 + 1e-12)


def test_a_device_finds_the_same_nucleus_without_a_look() -> None:
    chance = torch.Generator().manual_seed(2)
    logits_NV = 3 * torch.randn(4, 500, generator=chance, dtype=torch.float64)
    inverse_N1 = torch.full((4, 1), 1.25, dtype=torch.float64)
    weights_NV = ((logits_NV - logits_NV.amax(1, keepdim=True)) * inverse_N1).exp()
    found = [
        search(logits_NV, weights_NV, inverse_N1, [0.5, 0.9, 1.0, 0.999])
        for search in (reductions.nucleus_cut, reductions.nucleus_cut_on_device)
    ]
    assert torch.equal(*found)
