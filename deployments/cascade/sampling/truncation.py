"""Top-k, top-p and min-p: which tokens of a row are kept, and their total probability.

Top-k keeps the k likeliest. Top-p keeps the fewest whose probability reaches its share of what
top-k keeps. Min-p keeps those at least that share as likely as the likeliest. Tokens that tie with
the last one kept are kept too.

On a device whole rows are sorted, because a decision that depends on values would wait for it. A
CPU takes the rows one by one and sorts only the few tokens among which the boundary lies.

Shapes: `N` rows, `K` candidate tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cascade.sampling.tensor_ops import upload

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from cascade.types import SamplingParams

    Values = NDArray[np.floating[Any]]
    Ids = NDArray[np.intp]

_SMALL_NUCLEUS = 64  # tokens that one comparison is sure to find
_MANTISSA_BITS = 6  # of a float's magnitude class: 64 classes an octave
_COLUMNS = 512  # the largest logits of these bound the k-th largest of a row from below


def truncate(
    logits_NV: Tensor, p_NV: Tensor, samplings_N: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """Return the least logit kept, -inf where all are, and the probability kept, [N, 1] each.

    Args:
        logits_NV: Widened.
        p_NV: Their probabilities at the temperatures, which sum to 1.
        samplings_N: Sampling parameters of each row.
    """
    if logits_NV.device.type != "cpu":
        return truncate_on_device(logits_NV, p_NV, samplings_N)
    rows = zip(logits_NV.numpy(), p_NV.numpy(), samplings_N, strict=True)
    found = np.array([_truncate_row(*row) for row in rows], dtype=logits_NV.numpy().dtype)
    least_N1, kept_N1 = torch.from_numpy(found).split(1, dim=1)
    return least_N1, kept_N1


def _truncate_row(logits_V: Values, p_V: Values, sampling: SamplingParams) -> tuple[float, float]:
    least, kept = -math.inf, 1.0
    ids_K = None  # what top-k keeps; None: all
    if 0 < sampling.top_k < len(logits_V):
        ids_K = _top_k(logits_V, sampling.top_k)
        least, kept = float(logits_V[ids_K].min()), _sum(p_V[ids_K])
    if sampling.top_p < 1:
        least, kept = _nucleus(logits_V, p_V, sampling.top_p * kept, ids_K)
    if sampling.min_p:
        bound = float(logits_V.max()) + math.log(sampling.min_p) * sampling.temperature
        if bound > least:
            least, kept = bound, _sum(p_V * (logits_V >= bound))
    return least, kept


def _top_k(logits_V: Values, count: int) -> Ids:
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


def _nucleus(logits_V: Values, p_V: Values, mass: float, ids_K: Ids | None) -> tuple[float, float]:
    """Return the logit at which the likeliest candidates reach a mass, and what they sum to.

    Tokens that tie with the last of them are included. The candidates are `ids_K`, or all tokens.
    """
    before = 0.0
    if ids_K is None:
        ids_K = np.flatnonzero(p_V > (1 - mass) / _SMALL_NUCLEUS)
        if _sum(p_V[ids_K]) < mass:
            ids_K, before = _boundary_class(p_V, mass)
    ids_K = ids_K[np.argsort(-logits_V[ids_K])]
    logits_K = logits_V[ids_K]
    reached_K = before + p_V[ids_K].cumsum(dtype=np.float64)
    index = min(int(np.searchsorted(reached_K, mass)), len(ids_K) - 1)
    last = int(np.searchsorted(-logits_K, -logits_K[index], side="right")) - 1
    return float(logits_K[index]), float(reached_K[last])


def _boundary_class(p_V: Values, mass: float) -> tuple[Ids, float]:
    """Return the tokens of the magnitude class in which a mass is reached, and the mass above it.

    Floats that are not negative are ordered as their bits are, and the first bits are the class.
    """
    class_V = p_V.view(f"i{p_V.itemsize}") >> (np.finfo(p_V.dtype).nmant - _MANTISSA_BITS)
    cumulated = np.bincount(class_V, weights=p_V)[::-1].cumsum()
    index = int(np.searchsorted(cumulated, min(mass, cumulated[-1])))
    above = float(cumulated[index - 1]) if index else 0.0
    return np.flatnonzero(class_V == len(cumulated) - 1 - index), above


def _sum(values: Values) -> float:
    return float(values.sum(dtype=np.float64))


def truncate_on_device(
    logits_NV: Tensor, p_NV: Tensor, samplings_N: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """Return what `truncate` returns, without reading a value; the parameters are the same."""
    least_N1 = torch.full_like(logits_NV[:, :1], -math.inf)
    if any(s.top_k for s in samplings_N):
        least_N1 = _top_k_on_device(logits_NV, [s.top_k for s in samplings_N])
    if any(s.top_p < 1 for s in samplings_N):
        left_NV = torch.where(logits_NV >= least_N1, p_NV, 0.0)
        nucleus_N1 = _top_p_on_device(logits_NV, left_NV, [s.top_p for s in samplings_N])
        least_N1 = torch.maximum(least_N1, nucleus_N1)
    if any(s.min_p for s in samplings_N):
        # p >= min_p max p, in logits.
        drop = [math.log(s.min_p) * s.temperature if s.min_p else -math.inf for s in samplings_N]
        peak_N1 = logits_NV.amax(dim=1, keepdim=True)
        least_N1 = torch.maximum(least_N1, peak_N1 + _like(peak_N1, drop))
    kept_N1 = torch.where(logits_NV >= least_N1, p_NV, 0.0).sum(dim=1, keepdim=True)
    return least_N1, kept_N1


def _top_k_on_device(logits_NV: Tensor, counts_N: Sequence[int]) -> Tensor:
    """Return the k-th largest logit of each row, -inf where k is 0 or exceeds the vocabulary."""
    vocab = logits_NV.shape[1]
    top_ND = logits_NV.topk(min(max(counts_N), vocab)).values
    index_N1 = upload([[min(max(k, 1), vocab) - 1] for k in counts_N], top_ND.device)
    off_N1 = upload([[k == 0 or k >= vocab] for k in counts_N], top_ND.device)
    return top_ND.gather(1, index_N1.clamp_max(top_ND.shape[1] - 1)).masked_fill(off_N1, -math.inf)


def _top_p_on_device(logits_NV: Tensor, p_NV: Tensor, shares_N: Sequence[float]) -> Tensor:
    """Return the logit at which the likeliest tokens reach their share, -inf where that is all."""
    share_N1 = _like(logits_NV, shares_N)
    top_NV, ids_NV = logits_NV.sort(dim=1, descending=True)
    reached_NV = p_NV.gather(1, ids_NV).cumsum(1)
    short_N1 = (reached_NV < share_N1 * p_NV.sum(dim=1, keepdim=True)).sum(1, keepdim=True)
    least_N1 = top_NV.gather(1, short_N1.clamp_max(logits_NV.shape[1] - 1))
    return least_N1.masked_fill_(share_N1 >= 1, -math.inf)


def _like(values_NV: Tensor, numbers_N: Sequence[float]) -> Tensor:
    """Return numbers `[N, 1]` of the type and on the device of others."""
    return upload(numbers_N, values_NV.device, dtype=values_NV.dtype)[:, None]
