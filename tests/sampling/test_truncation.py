"""What top-k, top-p and min-p keep, on a CPU and on a device."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.sampling.truncation import Truncation, truncate, truncate_on_device
from cascade.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable

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


def kept_probs(found: Truncation, logits_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the probability that each row keeps, [N, 1]."""
    scaled_NV = (logits_NV - found.peak_N1) / temperature
    return (found.norm_N1 - scaled_NV.logsumexp(dim=1, keepdim=True)).exp()


@settings(deadline=None, max_examples=200)
@given(
    sampling=samplings,
    scale=st.floats(0.01, 12),
    levels=st.sampled_from([None, 5]),
    vocab=st.sampled_from([90, 1700, 9000]),
    seed=st.integers(0, 2**31),
)
def test_truncation_keeps_what_its_definition_keeps(
    sampling: SamplingParams, scale: float, levels: int | None, vocab: int, seed: int
) -> None:
    """Flat and steep rows, short and long, with and without ties."""
    logits_NV, p_NV = rows(sampling, scale=scale, levels=levels, vocab=vocab, seed=seed)
    found = truncate(logits_NV, [sampling] * 2)
    kept_N1 = kept_probs(found, logits_NV, sampling.temperature)
    for logits_V, p_V, least, kept in zip(logits_NV, p_NV, found.least_N1, kept_N1, strict=True):
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
    found, on_device = (find(logits_NV, pair) for find in (truncate, truncate_on_device))
    torch.testing.assert_close(on_device.norm_N1, found.norm_N1, rtol=1e-9, atol=1e-9)
    assert torch.equal(on_device.peak_N1, found.peak_N1)
    assert (found.least_N1[1], on_device.least_N1[1]) == (-math.inf, -math.inf)
    between_V = (logits_NV[0] >= found.least_N1[0]) != (logits_NV[0] >= on_device.least_N1[0])
    assert p_NV[0][between_V].sum() < 1e-9


def test_float32_rows_are_truncated_like_float64_rows() -> None:
    """Up to rounding, which decides between neighbours where the mass is reached."""
    logits_NV, _ = rows(SamplingParams(), scale=3, levels=None, vocab=32_000, seed=3)
    for sampling in (
        SamplingParams(top_p=0.95),
        SamplingParams(top_k=40),
        SamplingParams(top_k=200, top_p=0.5),
    ):
        found = truncate(logits_NV.float(), [sampling] * 2)
        wanted = truncate(logits_NV, [sampling] * 2)
        torch.testing.assert_close(found.norm_N1.double(), wanted.norm_N1, rtol=2e-5, atol=0)


SHAPES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "steep": lambda z_V: z_V * 6,
    "flat": lambda z_V: z_V / 2,
    "a head over a flat tail": lambda z_V: torch.where(z_V.abs() > 3, z_V.abs() * 4, z_V),
    "one token and a flat tail": lambda z_V: torch.where(z_V == z_V.max(), 12.0, z_V),
    "two levels": lambda z_V: (z_V > 1.5).to(z_V.dtype) * 3,
    "sorted": lambda z_V: (2 * z_V).sort().values,
    "equal": torch.zeros_like,
    # Every 32nd token is in the sample.
    "a sample too light": lambda z_V: z_V / 2 - 6 * (torch.arange(len(z_V)) % 32 == 0),
    "a sample too heavy": lambda z_V: z_V / 2 + 3 * (torch.arange(len(z_V)) % 32 == 0),
    "a sample too even": lambda z_V: torch.where(torch.arange(len(z_V)) % 32 == 0, 0.1, z_V),
    "mostly impossible": lambda z_V: torch.where(z_V > 2, z_V, -math.inf),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("top_p", [0.02, 0.5, 0.9, 0.999, 0.999999])
def test_a_nucleus_of_any_size_is_found_in_a_large_vocabulary(shape: str, top_p: float) -> None:
    """However the probability is spread, what is kept is what a sort finds."""
    generator = torch.Generator().manual_seed(0)
    z_V = torch.randn(262_144, generator=generator, dtype=torch.float64)
    logits_NV = SHAPES[shape](z_V)[None]
    found = truncate(logits_NV, [SamplingParams(top_p=top_p)])
    falling_V = logits_NV[0].sort(descending=True).values
    reached_V = falling_V.softmax(0).cumsum(0)
    last = int((reached_V < top_p * (1 - 1e-13)).sum().clamp_max(len(z_V) - 1))
    before = int((reached_V < top_p * (1 + 1e-13)).sum().clamp_max(len(z_V) - 1))
    assert falling_V[before] <= found.least_N1 <= falling_V[last]
    kept_1V = logits_NV >= found.least_N1
    wanted = logits_NV.softmax(1)[kept_1V].sum()
    torch.testing.assert_close(kept_probs(found, logits_NV, 1.0)[0, 0], wanted)
