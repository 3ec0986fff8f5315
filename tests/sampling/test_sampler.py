"""Inverse-CDF sampling and log-probabilities."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.sampling.probs import unscaled_probs
from cascade.sampling.sampler import Weights, logprobs

LAST = 1 - 2**-53

ROUNDING = 1e-6  # of float32 sums of a block


def drawn(weights_1V: torch.Tensor, uniform: float) -> int:
    uniforms_N = torch.tensor([uniform], dtype=torch.float64)
    return int(Weights(weights_NK=weights_1V).inverse_cdf(uniforms_N))


def test_the_first_index_whose_cumulated_weight_exceeds_the_number_is_chosen() -> None:
    weights_NK = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]]).expand(5, -1)
    uniforms_N = torch.tensor([0.0, 0.49, 0.5, 0.75, LAST], dtype=torch.float64)
    assert Weights(weights_NK=weights_NK).inverse_cdf(uniforms_N).tolist() == [1, 1, 3, 4, 4]


@given(
    weights=st.lists(
        st.sampled_from([0.0, 1e-38, 1e-30, 1e-7, 0.3, 1.0, 1e30]), min_size=1, max_size=30
    ).filter(any),
    uniform=st.one_of(st.just(LAST), st.just(0.0), st.floats(0, LAST)),
)
def test_a_token_of_weight_0_is_never_chosen(weights: list[float], uniform: float) -> None:
    """For any number and any weights."""
    index = drawn(torch.tensor([weights]), uniform)
    assert weights[index] > 0


@given(
    length=st.integers(257, 2000),
    filled=st.floats(0, 1),
    seed=st.integers(0, 1000),
    uniform=st.one_of(st.just(LAST), st.just(0.0), st.floats(0, LAST)),
)
def test_long_rows_are_sampled_like_short_ones(
    length: int, filled: float, seed: int, uniform: float
) -> None:
    """The index is the one of a plain cumulative sum, also among tokens of weight 0."""
    generator = torch.Generator().manual_seed(seed)
    weights_1V = torch.rand(1, length, generator=generator)
    weights_1V *= torch.rand(1, length, generator=generator) < filled
    index = drawn(weights_1V, uniform)
    cumulated_V = weights_1V[0].double().cumsum(dim=0)
    point = uniform * float(cumulated_V[-1])
    assert index < length
    if cumulated_V[-1] > 0:
        assert weights_1V[0, index] > 0
        assert cumulated_V[index] >= point - ROUNDING * cumulated_V[-1]
        assert (
            cumulated_V[index] - weights_1V[0, index].double() <= point + ROUNDING * cumulated_V[-1]
        )


@pytest.mark.parametrize("share", [0.01, 0.3, 0.999])
def test_light_tokens_of_a_large_vocabulary_are_reached(share: float) -> None:
    """A billionth of the heaviest each, they would be lost in a float32 sum."""
    count = (1 << 18) - 1
    weights_1V = torch.full((1, 1 + count), 1e-9)
    weights_1V[0, 0] = 1.0
    uniform = (1.0 + 1e-9 * share * count) / float(weights_1V.double().sum())
    assert abs(drawn(weights_1V, uniform) - share * count) <= 128


def test_log_probabilities_come_with_as_many_top_tokens_as_requested() -> None:
    """Each row has its own count, best first; a count above V gives V."""
    logits_NV = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    first, second = logprobs(unscaled_probs(logits_NV), [2, 0], [0, 9])
    log_NV = logits_NV.log_softmax(1)
    assert (first.token, first.top) == (2, ())
    assert first.logprob == pytest.approx(float(log_NV[0, 2]))
    assert next(token for token, _ in second.top) == 2
    assert len(second.top) == 3
    assert second.top[0][1] == pytest.approx(float(log_NV[1, 2]))
