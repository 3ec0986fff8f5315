"""From a law and a coin to a token."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.sampling.probs import unscaled
from cascade.sampling.sampler import Weights, logprobs

LAST = 1 - 2**-53

ROUNDING = 1e-6  # of float32 sums of a block


def drawn(weights_1V: torch.Tensor, coin: float) -> int:
    return int(
        Weights(weights_NK=weights_1V).inverse_cdf(torch.tensor([coin], dtype=torch.float64))
    )


def test_a_coin_falls_where_the_weights_say() -> None:
    """The first index whose cumulated weight exceeds the coin; zeros are never hit."""
    weights_NK = torch.tensor([[0.0, 0.5, 0.0, 0.25, 0.25, 0.0]]).expand(5, -1)
    coins_N = torch.tensor([0.0, 0.49, 0.5, 0.75, LAST], dtype=torch.float64)
    assert Weights(weights_NK=weights_NK).inverse_cdf(coins_N).tolist() == [1, 1, 3, 4, 4]


@given(
    weights=st.lists(
        st.sampled_from([0.0, 1e-38, 1e-30, 1e-7, 0.3, 1.0, 1e30]), min_size=1, max_size=30
    ).filter(any),
    coin=st.one_of(st.just(LAST), st.just(0.0), st.floats(0, LAST)),
)
def test_a_token_of_weight_0_is_never_chosen(weights: list[float], coin: float) -> None:
    """At no coin, however small or large the weights."""
    index = drawn(torch.tensor([weights]), coin)
    assert weights[index] > 0


@given(
    length=st.integers(257, 2000),
    filled=st.floats(0, 1),
    seed=st.integers(0, 1000),
    coin=st.one_of(st.just(LAST), st.just(0.0), st.floats(0, LAST)),
)
def test_a_coin_falls_where_the_weights_of_a_long_row_say(
    length: int, filled: float, seed: int, coin: float
) -> None:
    """Blocks or not, with tokens of no weight among the others."""
    chance = torch.Generator().manual_seed(seed)
    weights_1V = torch.rand(1, length, generator=chance)
    weights_1V *= torch.rand(1, length, generator=chance) < filled
    index = drawn(weights_1V, coin)
    cumulated_V = weights_1V[0].double().cumsum(dim=0)
    point = coin * float(cumulated_V[-1])
    assert index < length
    if cumulated_V[-1] > 0:
        assert weights_1V[0, index] > 0
        assert cumulated_V[index] >= point - ROUNDING * cumulated_V[-1]
        assert (
            cumulated_V[index] - weights_1V[0, index].double() <= point + ROUNDING * cumulated_V[-1]
        )


@pytest.mark.parametrize("share", [0.01, 0.3, 0.999])
def test_light_tokens_of_a_long_vocabulary_are_reached(share: float) -> None:
    """A billionth of the heaviest each, they would add nothing to it in float32."""
    count = (1 << 18) - 1
    weights_1V = torch.full((1, 1 + count), 1e-9)
    weights_1V[0, 0] = 1.0
    coin = (1.0 + 1e-9 * share * count) / float(weights_1V.double().sum())
    assert abs(drawn(weights_1V, coin) - share * count) <= 128


def test_log_probabilities_come_with_as_many_others_as_asked() -> None:
    """Each row its own count, best first; more than the vocabulary has is all of it."""
    logits_NV = torch.tensor([[1.0, 3.0, 2.0], [0.0, 0.0, 5.0]])
    first, second = logprobs(unscaled(logits_NV), [2, 0], [0, 9])
    log_NV = logits_NV.log_softmax(1)
    assert (first.token, first.top) == (2, ())
    assert first.logprob == pytest.approx(float(log_NV[0, 2]))
    assert next(token for token, _ in second.top) == 2
    assert len(second.top) == 3
    assert second.top[0][1] == pytest.approx(float(log_NV[1, 2]))
