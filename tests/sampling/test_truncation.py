"""What top-k, top-p and min-p keep, on a CPU and on a device."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.sampling.truncation import truncate, truncate_on_device
from cascade.types import SamplingParams

samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 3),
    top_k=st.sampled_from([0, 1, 7, 50, 600, 1699, 1700, 5000]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-6, 1)),
    min_p=st.sampled_from([0.0, 1e-4, 0.05, 1.0]),
)


def rows(
    sampling: SamplingParams, *, scale: float, levels: int | None, vocab: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits, with ties if there are levels, and their probabilities, float64 [2, V]."""
    generator = torch.Generator().manual_seed(seed)
    logits_NV = scale * torch.randn(2, vocab, generator=generator, dtype=torch.float64)
    if levels:
        logits_NV = (logits_NV * levels / scale).round()
    return logits_NV, (logits_NV / sampling.temperature).softmax(dim=1)


@settings(deadline=None, max_examples=200)
@given(
    sampling=samplings,
    scale=st.floats(0.01, 12),
    levels=st.sampled_from([None, 5]),
    vocab=st.sampled_from([90, 1700]),
    seed=st.integers(0, 2**31),
)
def test_truncation_keeps_what_its_definition_keeps(
    sampling: SamplingParams, scale: float, levels: int | None, vocab: int, seed: int
) -> None:
    """Flat and steep rows, short and long, with and without ties."""
    logits_NV, p_NV = rows(sampling, scale=scale, levels=levels, vocab=vocab, seed=seed)
    least_N1, kept_N1 = truncate(logits_NV, p_NV, [sampling] * 2)
    for logits_V, p_V, least, kept in zip(logits_NV, p_NV, least_N1, kept_N1, strict=True):
        kept_V = logits_V >= least
        assert p_V[kept_V].sum().item() == pytest.approx(kept.item(), rel=1e-12)
        likely_V, left = torch.ones_like(kept_V), p_V.sum()
        if 0 < sampling.top_k < vocab:
            likely_V = logits_V >= logits_V.sort(descending=True).values[sampling.top_k - 1]
            left = p_V[likely_V].sum()
        if sampling.min_p:
            drop = math.log(sampling.min_p) * sampling.temperature
            likely_V &= logits_V >= logits_V.max().item() + drop
        assert not (kept_V & ~likely_V).any()
        if sampling.top_p == 1:
            assert torch.equal(kept_V, likely_V)
            continue
        wanted = sampling.top_p * left
        if not torch.equal(kept_V, likely_V):
            assert p_V[kept_V].sum() >= wanted * (1 - 1e-12)
        more_V = logits_V > logits_V[kept_V].min()
        assert p_V[more_V].sum() < wanted * (1 + 1e-12)


@settings(deadline=None, max_examples=100)
@given(sampling=samplings, scale=st.floats(0.1, 12), seed=st.integers(0, 2**31))
def test_a_device_keeps_the_same_tokens_as_a_cpu(
    sampling: SamplingParams, scale: float, seed: int
) -> None:
    """Up to the rounding of sums, and next to a row that is not truncated."""
    logits_NV, p_NV = rows(sampling, scale=scale, levels=None, vocab=1700, seed=seed)
    pair = [sampling, SamplingParams()]
    (least_N1, kept_N1), (device_N1, mass_N1) = (
        find(logits_NV, p_NV, pair) for find in (truncate, truncate_on_device)
    )
    torch.testing.assert_close(mass_N1, kept_N1, rtol=1e-9, atol=1e-9)
    assert (least_N1[1], device_N1[1]) == (-math.inf, -math.inf)
    between_V = (logits_NV[0] >= least_N1[0]) != (logits_NV[0] >= device_N1[0])
    assert p_NV[0][between_V].sum() < 1e-9


def test_float32_rows_are_truncated_like_float64_rows() -> None:
    """Up to rounding, which decides between neighbours where the mass is reached."""
    logits_NV, p_NV = rows(SamplingParams(), scale=3, levels=None, vocab=32_000, seed=3)
    for sampling in (
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=40),
        SamplingParams(top_k=200, top_p=0.5),
    ):
        _, kept_N1 = truncate(logits_NV.float(), p_NV.float(), [sampling] * 2)
        _, wanted_N1 = truncate(logits_NV, p_NV, [sampling] * 2)
        torch.testing.assert_close(kept_N1.double(), wanted_N1, rtol=2e-5, atol=0)
