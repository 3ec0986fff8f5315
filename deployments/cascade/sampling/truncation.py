"""Top-k, top-p and min-p: which tokens of a row are kept, and what their probabilities sum to.

Top-k keeps the k likeliest. Top-p keeps the fewest whose probability reaches its share of what
top-k keeps. Min-p keeps those at least that share as likely as the likeliest. Tokens that tie with
the last one kept are kept too.

On a device whole rows are sorted, because a decision that depends on values would wait for it. A
CPU takes the rows one by one, and sorts only the few tokens among which the boundary lies.

A token's weight is exp((logit - largest) / temperature): its probability up to a factor, and 1 for
the likeliest.

Shapes: `N` rows, `K` candidate tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from cascade.sampling.tensor_ops import map_rows, row_sums, upload, widen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from cascade.types import SamplingParams

    Values = NDArray[np.floating[Any]]
    Ids = NDArray[np.intp]

# Lower temperatures differ from greedy in ties only; the inverse of this one is finite.
_MIN_TEMPERATURE = 1e-30

_SMALL_NUCLEUS = 64  # tokens that one comparison is sure to find
_HEAVY = 1 / 16  # of the largest weight; a bound above is one of a flat row
_STEP = 16  # a lower bound that is too high is divided by this
_FLAT = 32  # more than one in so many tokens may be above the bound: sample the rest instead
_SAMPLE = 8192  # tokens of a sample, about
_ERRORS = 4  # standard errors of what a sample says
_NEAR = 1024  # of these, within which the boundary is nearly always
_MANY = 64  # of these that are not all sorted
_COLUMNS = 512  # the largest logits of these bound the k-th largest of a row from below


class Truncation(NamedTuple):
    """What is kept of N rows, [N, 1] each."""

    least_N1: Tensor  # logit kept, -inf where all are
    peak_N1: Tensor  # the largest logit
    norm_N1: Tensor  # logarithm of the sum of the weights that are kept
    whole_N1: Tensor  # and of the sum of all, NaN where it was not needed


def inverse_temperature(sampling: SamplingParams) -> float:
    """Return what logits are multiplied by."""
    return 1.0 / max(sampling.temperature, _MIN_TEMPERATURE)


def truncate(logits_NV: Tensor, samplings_N: Sequence[SamplingParams]) -> Truncation:
    """Return what the sampling parameters of each row keep of its logits, any float type."""
    if logits_NV.device.type != "cpu":
        return truncate_on_device(logits_NV, samplings_N)

    def truncate_rows(rows: slice) -> list[tuple[float, float, float, float]]:
        return [
            _truncate_row(widen(logits_V), sampling)
            for logits_V, sampling in zip(logits_NV[rows], samplings_N[rows], strict=True)
        ]

    found = list(chain.from_iterable(map_rows(truncate_rows, logits_NV.shape, logits_NV.device)))
    dtype = widen(logits_NV[:0]).dtype
    return Truncation(*torch.tensor(found, dtype=dtype).reshape(-1, 4).split(1, dim=1))


def _truncate_row(logits_V: Tensor, sampling: SamplingParams) -> tuple[float, float, float, float]:
    """Return the fields of `Truncation`."""
    values_V = logits_V.numpy()
    peak, inverse = float(values_V.max()), inverse_temperature(sampling)
    ids_K = None  # what top-k keeps; None: all
    least = -math.inf
    if 0 < sampling.top_k < len(values_V):
        ids_K = top_k(values_V, sampling.top_k)
        least = float(values_V[ids_K].min())
    kept, total = None, math.nan
    if sampling.top_p < 1:
        before = 0.0
        if ids_K is None:
            weights_V = weights_of(logits_V, peak, inverse)
            total = float(row_sums(weights_V))
            mass = sampling.top_p * total
            ids_K, before = _boundary(weights_V, mass, total)
            falling_K = np.sort(values_V[ids_K])[::-1].copy()
            weights_K = _weigh(falling_K, peak, inverse)
        else:
            falling_K = np.sort(values_V[ids_K])[::-1].copy()
            weights_K = _weigh(falling_K, peak, inverse)
            mass = sampling.top_p * _sum(weights_K)
        least, kept = _nucleus(falling_K, weights_K, mass, before)
    bound = peak + math.log(sampling.min_p) / inverse if sampling.min_p else -math.inf
    if kept is None or bound > least:
        least = max(least, bound)
        kept = _sum(_weigh(values_V[np.flatnonzero(values_V >= least)], peak, inverse))
    return least, peak, math.log(kept), math.log(total)


def _weigh(logits_K: Values, peak: float, inverse: float) -> Values:
    return weights_of(torch.from_numpy(logits_K), peak, inverse).numpy()


def weights_of(
    logits: Tensor, peak: float | Tensor, inverse: float | Tensor, *, out: Tensor | None = None
) -> Tensor:
    """Return exp((logit - peak) * inverse).

    Args:
        logits: Widened.
        peak: The largest.
        inverse: 1 / temperature.
        out: Where to write it; by default a new tensor.
    """
    scaled = torch.sub(logits, peak, out=out)
    if isinstance(inverse, torch.Tensor) or inverse != 1:
        scaled.mul_(inverse)
    return scaled.exp_()


def top_k(logits_V: Values, count: int) -> Ids:
    """Return the tokens with the `count` largest logits, and what ties with the least of them."""
    whole = len(logits_V) // _COLUMNS * _COLUMNS
    if not whole or count > _COLUMNS:
        return np.flatnonzero(logits_V >= _kth_largest(logits_V, count))
    maxima = logits_V[:whole].reshape(-1, _COLUMNS).max(axis=0)
    ids_K = np.flatnonzero(logits_V >= _kth_largest(maxima, count))
    logits_K = logits_V[ids_K]
    return ids_K[logits_K >= _kth_largest(logits_K, count)]


def _kth_largest(values: Values, k: int) -> float:
    return float(np.partition(values, -k)[-k])


def _nucleus(
    falling_K: Values, weights_K: Values, mass: float, before: float
) -> tuple[float, float]:
    """Return the logit at which the likeliest tokens reach a mass, and what they weigh.

    Tokens that tie with the last of them are included.

    Args:
        falling_K: Logits of candidates, among which the mass is reached, the largest first.
        weights_K: Their weights.
        mass: The weight to reach.
        before: What the tokens likelier than the candidates weigh.
    """
    reached_K = before + weights_K.cumsum(dtype=np.float64)
    index = min(int(np.searchsorted(reached_K, mass)), len(falling_K) - 1)
    least = falling_K[index]
    last = len(falling_K) - 1 - int(np.searchsorted(falling_K[::-1], least))
    return float(least), float(reached_K[last])


def _boundary(weights_V: Tensor, mass: float, total: float) -> tuple[Ids, float]:
    """Return tokens among which the likeliest reach a mass, and what those above them weigh.

    Bounds are lowered until they do, or until too many tokens to sort are above the next bound.

    Args:
        weights_V: Of every token.
        mass: The weight to reach.
        total: The weight of all.
    """
    values_V, above, high = weights_V.numpy(), 0.0, 1.0
    low = (total - mass) / _SMALL_NUCLEUS
    # At most (total - above) / low tokens are between the bounds.
    while low < _HEAVY and 0 < (total - above) * _FLAT < low * len(values_V):
        ids_K = np.flatnonzero(values_V > low)
        ids_K = ids_K[values_V[ids_K] <= high]
        found = _sum(values_V[ids_K])
        if above + found >= mass:
            return ids_K, above
        above, high, low = above + found, low, low / _STEP
    return _boundary_by_sample(weights_V, mass, total, above=above, high=high)


def _boundary_by_sample(
    weights_V: Tensor, mass: float, total: float, *, above: float, high: float
) -> tuple[Ids, float]:
    """Return what `_boundary` does, of a flat row.

    A sample says about where the boundary is. What is heavier is summed, and the sample says how
    far from there the boundary is at most.

    Args:
        weights_V: Of every token.
        mass: The weight to reach.
        total: The weight of all.
        above: The weight of those heavier than `high`, less than the mass.
        high: The largest weight at which the boundary may be.
    """
    values_V = weights_V.numpy()
    step = max(1, len(values_V) // _SAMPLE)
    rising_S = np.sort(values_V[::step])
    rising_S = rising_S[: np.searchsorted(rising_S, high, side="right")]
    sums_S = rising_S.cumsum(dtype=np.float64)
    if not len(sums_S) or not sums_S[-1]:
        return np.flatnonzero(values_V <= high), above
    share = (total - mass) / (total - above)
    index = np.searchsorted(sums_S, share * sums_S[-1])
    middle, beyond = high, above
    if len(sums_S) - index > _MANY:
        middle = float(rising_S[index])
        beyond = float(row_sums(torch.threshold(weights_V, middle, 0.0)))
    if beyond < mass:
        lighter_S = rising_S[: np.searchsorted(rising_S, middle, side="right")][::-1]
        low = _likely_reached(lighter_S, (mass - beyond) / step, otherwise=-1.0)
        ids_K = np.flatnonzero((values_V > low) & (values_V <= middle))
        if low >= 0 and beyond + _sum(values_V[ids_K]) < mass:
            ids_K = np.flatnonzero(values_V <= middle)
        return ids_K, beyond
    heavier_S = rising_S[np.searchsorted(rising_S, middle, side="right") :]
    upper = _likely_reached(heavier_S, (beyond - mass) / step, otherwise=high)
    ids_K = np.flatnonzero((values_V > middle) & (values_V <= upper))
    left = beyond - _sum(values_V[ids_K])
    if left < mass:
        return ids_K, left
    ids_K = np.flatnonzero((values_V > middle) & (values_V <= high))
    return ids_K, above


def _likely_reached(weights_S: Values, mass: float, *, otherwise: float) -> float:
    """Return the weight of a sample, in its order, at which a mass is all but surely reached."""
    weights_S = weights_S[:_NEAR]
    sums_S = weights_S.cumsum(dtype=np.float64)
    sums_S -= _ERRORS * np.sqrt(np.square(weights_S).cumsum(dtype=np.float64))
    index = int(np.argmax(sums_S >= mass)) if len(sums_S) else 0
    return float(weights_S[index]) if len(sums_S) and sums_S[index] >= mass else otherwise


def _sum(values: Values) -> float:
    return float(values.sum(dtype=np.float64))


def truncate_on_device(logits_NV: Tensor, samplings_N: Sequence[SamplingParams]) -> Truncation:
    """Return what `truncate` returns, without reading a value; the parameters are the same."""
    logits_NV = widen(logits_NV)
    peak_N1 = logits_NV.amax(dim=1, keepdim=True)
    inverse_N1 = _like(peak_N1, [inverse_temperature(s) for s in samplings_N])
    weights_NV = weights_of(logits_NV, peak_N1, inverse_N1)
    least_N1 = torch.full_like(peak_N1, -math.inf)
    if any(s.top_k for s in samplings_N):
        least_N1 = _top_k_on_device(logits_NV, [s.top_k for s in samplings_N])
    if any(s.top_p < 1 for s in samplings_N):
        left_NV = torch.where(logits_NV >= least_N1, weights_NV, 0.0)
        nucleus_N1 = _top_p_on_device(logits_NV, left_NV, [s.top_p for s in samplings_N])
        least_N1 = torch.maximum(least_N1, nucleus_N1)
    if any(s.min_p for s in samplings_N):
        # p >= min_p max p, in logits.
        drop = [math.log(s.min_p) * s.temperature if s.min_p else -math.inf for s in samplings_N]
        least_N1 = torch.maximum(least_N1, peak_N1 + _like(peak_N1, drop))
    kept_N1 = torch.where(logits_NV >= least_N1, weights_NV, 0.0).sum(dim=1, keepdim=True)
    whole_N1 = weights_NV.sum(dim=1, keepdim=True)
    return Truncation(least_N1, peak_N1, kept_N1.log_(), whole_N1.log_())


def _top_k_on_device(logits_NV: Tensor, counts_N: Sequence[int]) -> Tensor:
    """Return the k-th largest logit of each row, -inf where k is 0 or exceeds the vocabulary."""
    vocab = logits_NV.shape[1]
    top_ND = logits_NV.topk(min(max(counts_N), vocab)).values
    index_N1 = upload([[min(max(k, 1), vocab) - 1] for k in counts_N], top_ND.device)
    off_N1 = upload([[k == 0 or k >= vocab] for k in counts_N], top_ND.device)
    return top_ND.gather(1, index_N1.clamp_max(top_ND.shape[1] - 1)).masked_fill(off_N1, -math.inf)


def _top_p_on_device(logits_NV: Tensor, weights_NV: Tensor, shares_N: Sequence[float]) -> Tensor:
    """Return the logit at which the likeliest tokens reach their share, -inf where that is all."""
    share_N1 = _like(logits_NV, shares_N)
    top_NV, ids_NV = logits_NV.sort(dim=1, descending=True)
    reached_NV = weights_NV.gather(1, ids_NV).cumsum(1)
    short_N1 = (reached_NV < share_N1 * weights_NV.sum(dim=1, keepdim=True)).sum(1, keepdim=True)
    least_N1 = top_NV.gather(1, short_N1.clamp_max(logits_NV.shape[1] - 1))
    return least_N1.masked_fill_(share_N1 >= 1, -math.inf)


def _like(values_NV: Tensor, numbers_N: Sequence[float]) -> Tensor:
    """Return numbers `[N, 1]` of the type and on the device of others."""
    return upload(numbers_N, values_NV.device, dtype=values_NV.dtype)[:, None]
