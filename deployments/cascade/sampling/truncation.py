"""Which tokens of a row top-k, top-p and min-p leave, and what those sum to.

Top-k keeps the k likeliest. Top-p keeps the fewest whose mass reaches its share of what top-k left.
Min-p keeps those at least so likely as that share of the likeliest. What ties with the last that is
kept stays too.

A device puts whole rows in order, for a look at them costs a wait. A CPU takes them one by one and
puts only a few tokens of each in order: most can be seen to lie on either side of the cut.

Shapes: `N` rows, `K` tokens among which a cut lies, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from cascade.types import SamplingParams

    Row = NDArray[np.floating[Any]]
    Ids = NDArray[np.intp]

_NARROW = 64  # tokens of a nucleus that is found at once

_MAGNITUDE_BITS = 6  # of a mantissa: 64 magnitudes an octave

_COLUMNS = 512  # whose largest logits bound the k-th largest of a row from below


def truncate(
    logits_NV: Tensor, p_NV: Tensor, samplings_N: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """Return the least logit kept, -inf where all are, and the mass of what is, [N, 1] each.

    Args:
        logits_NV: Widened.
        p_NV: Their probabilities, which sum to 1.
        samplings_N: What cuts each row.
    """
    if logits_NV.device.type != "cpu":
        return truncate_on_device(logits_NV, p_NV, samplings_N)
    rows = zip(logits_NV.numpy(), p_NV.numpy(), samplings_N, strict=True)
    found = np.array([_cut_row(*row) for row in rows], dtype=logits_NV.numpy().dtype)
    least_N1, kept_N1 = torch.from_numpy(found).split(1, dim=1)
    return least_N1, kept_N1


def _cut_row(logits_V: Row, p_V: Row, sampling: SamplingParams) -> tuple[float, float]:
    least, kept = -math.inf, 1.0
    ids_K = None  # of the tokens that top-k leaves; None: all
    if 0 < sampling.top_k < len(logits_V):
        ids_K = _likeliest(logits_V, sampling.top_k)
        least, kept = float(logits_V[ids_K].min()), _sum(p_V[ids_K])
    if sampling.top_p < 1:
        least, kept = _nucleus(logits_V, p_V, sampling.top_p * kept, ids_K)
    if sampling.min_p:
        bound = float(logits_V.max()) + math.log(sampling.min_p) * sampling.temperature
        if bound > least:
            least, kept = bound, _sum(p_V * (logits_V >= bound))
    return least, kept


def _likeliest(logits_V: Row, count: int) -> Ids:
    """Return the tokens with the `count` largest logits, and what ties with the least of them."""
    whole = len(logits_V) // _COLUMNS * _COLUMNS
    if not whole or count > _COLUMNS:
        return np.flatnonzero(logits_V >= _largest(logits_V, count))
    peaks = logits_V[:whole].reshape(-1, _COLUMNS).max(axis=0)
    ids_K = np.flatnonzero(logits_V >= _largest(peaks, count))
    logits_K = logits_V[ids_K]
    return ids_K[logits_K >= _largest(logits_K, count)]


def _largest(values: Row, count: int) -> float:
    """Return the `count`-th largest value."""
    return float(np.partition(values, -count)[-count])


def _nucleus(logits_V: Row, p_V: Row, mass: float, ids_K: Ids | None) -> tuple[float, float]:
    """Return the logit at which the likeliest of some tokens reach a mass, and what they sum to.

    What ties with the last of them is in the sum.
    """
    before = 0.0
    if ids_K is None:
        ids_K = np.flatnonzero(p_V > (1 - mass) / _NARROW)
        if _sum(p_V[ids_K]) < mass:
            ids_K, before = _magnitude(p_V, mass)
    ids_K = ids_K[np.argsort(-logits_V[ids_K])]
    logits_K = logits_V[ids_K]
    reached_K = before + p_V[ids_K].cumsum(dtype=np.float64)
    place = min(int(np.searchsorted(reached_K, mass)), len(ids_K) - 1)
    last = int(np.searchsorted(-logits_K, -logits_K[place], side="right")) - 1
    return float(logits_K[place]), float(reached_K[last])


def _magnitude(p_V: Row, mass: float) -> tuple[Ids, float]:
    """Return the tokens of the magnitude in which a mass is reached, and what heavier ones have.

    Floats that are not negative are in the order of their bits, whose first are the magnitude.
    """
    bits_V = p_V.view(f"i{p_V.itemsize}") >> (np.finfo(p_V.dtype).nmant - _MAGNITUDE_BITS)
    above = np.bincount(bits_V, weights=p_V)[::-1].cumsum()
    place = int(np.searchsorted(above, min(mass, above[-1])))
    before = float(above[place - 1]) if place else 0.0
    return np.flatnonzero(bits_V == len(above) - 1 - place), before


def _sum(values: Row) -> float:
    return float(values.sum(dtype=np.float64))


def truncate_on_device(
    logits_NV: Tensor, p_NV: Tensor, samplings_N: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor]:
    """Return what `cut` does, without a look at any row."""
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
        least_N1 = torch.maximum(least_N1, peak_N1 + peak_N1.new_tensor(drop)[:, None])
    kept_N1 = torch.where(logits_NV >= least_N1, p_NV, 0.0).sum(dim=1, keepdim=True)
    return least_N1, kept_N1


def _top_k_on_device(logits_NV: Tensor, counts_N: Sequence[int]) -> Tensor:
    """Return the k-th largest logit of each row, -inf where k is 0 or exceeds the vocabulary."""
    vocab = logits_NV.shape[1]
    top_ND = logits_NV.topk(min(max(counts_N), vocab)).values
    index_N1 = torch.tensor([[min(max(k, 1), vocab) - 1] for k in counts_N], device=top_ND.device)
    off_N1 = torch.tensor([[k == 0 or k >= vocab] for k in counts_N], device=top_ND.device)
    return top_ND.gather(1, index_N1.clamp_max(top_ND.shape[1] - 1)).masked_fill(off_N1, -math.inf)


def _top_p_on_device(logits_NV: Tensor, p_NV: Tensor, masses_N: Sequence[float]) -> Tensor:
    """Return the logit at which the likeliest tokens reach their share, -inf where that is all."""
    mass_N1 = logits_NV.new_tensor(masses_N)[:, None]
    top_NV, ids_NV = logits_NV.sort(dim=1, descending=True)
    reached_NV = p_NV.gather(1, ids_NV).cumsum(1)
    short_N1 = (reached_NV < mass_N1 * p_NV.sum(dim=1, keepdim=True)).sum(1, keepdim=True)
    cut_N1 = top_NV.gather(1, short_N1.clamp_max(logits_NV.shape[1] - 1))
    return cut_N1.masked_fill_(mass_N1 >= 1, -math.inf)
