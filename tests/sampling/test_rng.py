"""Random numbers: the published generator, and the same numbers in every process."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from cascade.sampling.rng import Purpose, gumbel_noise, gumbel_noise_at, philox, uniforms

ONES = 0xFFFFFFFF

# The known answers that come with Random123 for Philox4x32-10: counter, key, output.
KNOWN = [
    (
        (0, 0, 0, 0),
        (0, 0),
        (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8),
    ),
    (
        (ONES, ONES, ONES, ONES),
        (ONES, ONES),
        (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD),
    ),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]

seeds = st.integers(0, 2**63 - 1)

positions = st.integers(0, 2**20)


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN)
def test_the_generator_gives_the_published_numbers(
    counter: tuple[int, int, int, int], key: tuple[int, int], wanted: tuple[int, ...]
) -> None:
    """Philox4x32-10, on tensors and on arrays."""
    c0, c1, c2, c3 = (torch.tensor([c]) for c in counter)
    k0, k1 = (torch.tensor([k]) for k in key)
    words = philox((c0, c1, c2, c3), (k0, k1))
    arrays = philox((c0.numpy(), c1.numpy(), c2.numpy(), c3.numpy()), (k0.numpy(), k1.numpy()))
    assert tuple(int(w) for w in words) == wanted
    assert tuple(int(w[0]) for w in arrays) == wanted


@given(seed=seeds, position=positions, purpose=st.sampled_from(Purpose))
def test_a_number_is_in_the_unit_interval_and_does_not_depend_on_the_batch(
    seed: int, position: int, purpose: Purpose
) -> None:
    alone = uniforms([seed], [position], purpose)
    batch = uniforms([7, seed, 9], [1, position, 3], purpose)
    large = uniforms([7] * 8 + [seed], [1] * 8 + [position], Purpose.NOISE, purpose)
    assert alone.dtype == large.dtype == torch.float64
    assert 0 <= float(alone) < 1
    assert batch[1] == large[1, 8] == alone[0]


def test_seed_position_purpose_and_block_start_all_matter() -> None:
    """A number without a block start differs from one with any start."""
    numbers = [
        float(uniforms([seed], [position], purpose, block_starts_N=starts))
        for seed in (0, 1, 2**32, 2**62)
        for position in (0, 1, 500)
        for purpose in Purpose
        for starts in (None, [0], [1])
    ]
    assert len(set(numbers)) == len(numbers)


def test_numbers_are_uniform() -> None:
    """By Kolmogorov-Smirnov tests along positions and along seeds."""
    along = uniforms([5] * 20_000, range(20_000), Purpose.DRAFT)
    across = uniforms(range(20_000), [5] * 20_000, Purpose.NEXT_TOKEN)
    for numbers in (along, across):
        assert stats.kstest(numbers.numpy(), "uniform").pvalue > 1e-3


def test_noise_is_gumbel() -> None:
    """Its maximum over log weights falls where the weights say."""
    weights_V = torch.tensor([0.5, 0.3, 0.15, 0.05])
    noise_NV = gumbel_noise([11] * 40_000, range(40_000), 4, "cpu")
    counts = torch.bincount((weights_V.log() + noise_NV).argmax(dim=1), minlength=4)
    assert stats.chisquare(counts.numpy(), (weights_V * 40_000).numpy()).pvalue > 1e-3
    assert stats.kstest(noise_NV.flatten()[:20_000].numpy(), "gumbel_r").pvalue > 1e-3


@given(seed=seeds, position=positions, vocab=st.integers(1, 70))
def test_noise_of_chosen_tokens_equals_the_noise_of_the_vocabulary(
    seed: int, position: int, vocab: int
) -> None:
    ids_NK = torch.arange(vocab).flip(0)[None, :].expand(2, -1)
    whole_NV = gumbel_noise([seed, 3], [position, 4], vocab, "cpu")
    chosen_NK = gumbel_noise_at([seed, 3], [position, 4], ids_NK)
    assert torch.equal(chosen_NK, whole_NV.gather(1, ids_NK))
    assert bool(whole_NV.isfinite().all())


def test_noise_does_not_depend_on_the_batch_or_the_vocabulary() -> None:
    """Rows computed in chunks, alone or for a longer vocabulary are the same."""
    whole_NV = gumbel_noise(range(5), range(5), 100_003, "cpu")
    alone_NV = gumbel_noise([3], [3], 100_003, "cpu")
    assert torch.equal(whole_NV[3:4], alone_NV)
    assert torch.equal(gumbel_noise(range(5), range(5), 10, "cpu"), whole_NV[:, :10])
    assert gumbel_noise([], [], 7, "cpu").shape == (0, 7)


def test_another_process_generates_the_same_numbers() -> None:
    """Nothing depends on the process, its hash seed or its global generators."""
    code = """
from cascade.sampling.rng import Purpose, gumbel_noise, uniforms
print(float(uniforms([2**40], [17], Purpose.ACCEPT)), float(gumbel_noise([1], [2], 9, "cpu")[0, 8]))
"""
    done = subprocess.run(  # noqa: S603 - our own code, our own interpreter
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    uniform, gumbel = (float(word) for word in done.stdout.split())
    assert uniform == float(uniforms([2**40], [17], Purpose.ACCEPT))
    assert gumbel == float(gumbel_noise([1], [2], 9, "cpu")[0, 8])
