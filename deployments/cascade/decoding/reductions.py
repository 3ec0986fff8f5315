"""Reductions of rows as long as a vocabulary, on a CPU some rows at a time to stay in its cache.

Shapes: `N` rows, `K` likeliest tokens of one, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

PIECE = 2**20  # numbers of one piece: enough for all cores, and they stay in the last cache


def widen(logits_NV: Tensor) -> Tensor:
    """Return the logits in float32, or as they are in float64."""
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def pieces(rows_NV: Tensor) -> list[slice]:
    """Return the rows that are worked on together: all of them but on a CPU."""
    count, vocab = rows_NV.shape
    step = max(1, count if rows_NV.device.type != "cpu" else PIECE // max(vocab, 1))
    return [slice(first, min(first + step, count)) for first in range(0, max(count, 1), step)]


def peak_and_norm(logits_NV: Tensor, inverse_N1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and log sum exp((logit - peak) / temperature), [N, 1] each.

    Args:
        logits_NV: Widened.
        inverse_N1: 1 / temperature; None where all are 1.
    """
    best_N1 = argmax(logits_NV)[:, None]
    peak_N1 = logits_NV.gather(1, best_N1)
    scaled_NV = logits_NV if inverse_N1 is None else (logits_NV - peak_N1).mul_(inverse_N1)
    # The likeliest token's share is 1 / sum, and softmax is one pass.
    return peak_N1, scaled_NV.softmax(dim=1).gather(1, best_N1).log_().neg_()


def argmax(rows_NV: Tensor) -> Tensor:
    """Return the place of the largest number of each row, the lowest of equals, int64 [N].

    numpy's search takes all lanes of a CPU; torch's takes five to ten times as long.
    """
    if rows_NV.device.type != "cpu":
        return widen(rows_NV).argmax(dim=1)
    parts = [widen(rows_NV[some]).numpy().argmax(axis=1) for some in pieces(rows_NV)]
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


def nucleus_cut(
    logits_NV: Tensor, weights_NV: Tensor, inverse_N1: Tensor, masses_N: Sequence[float]
) -> Tensor:
    """Return the logit at which the likeliest tokens' mass reaches its share, [N, 1], on a CPU.

    A token is looked at only if all that are no heavier, were there as many as the vocabulary has,
    would weigh as much as may be left out: a few hundred of many thousands.

    Args:
        logits_NV: Widened.
        weights_NV: exp((logit - peak) / temperature), and 0 where a token is cut already.
        inverse_N1: 1 / temperature.
        masses_N: Share of each row's weight; -inf is returned where it is 1.
    """
    total_N = weights_NV.sum(dim=1).tolist()
    cuts = np.full((len(masses_N), 1), -np.inf, dtype=logits_NV.numpy().dtype)
    rows = zip(logits_NV.numpy(), weights_NV.numpy(), strict=True)
    for place, (logits_V, weights_V) in enumerate(rows):
        mass, total = masses_N[place], total_N[place]
        if mass < 1:
            floor = (1 - mass) * total / (2 * len(weights_V))
            top_K = np.sort(logits_V[weights_V > floor])[::-1]
            scaled_K = (top_K - top_K[0]) * float(inverse_N1[place])
            reached_K = np.exp(scaled_K).cumsum(dtype=np.float64)
            short = int(np.searchsorted(reached_K, mass * total))
            cuts[place] = top_K[min(short, len(top_K) - 1)]
    return torch.from_numpy(cuts)


def nucleus_cut_on_device(
    logits_NV: Tensor, weights_NV: Tensor, inverse_N1: Tensor, masses_N: Sequence[float]
) -> Tensor:
    """Return what `nucleus_cut` does, with all rows in order and none of them looked at."""
    del inverse_N1
    mass_N1 = logits_NV.new_tensor(masses_N)[:, None]
    top_NV, ids_NV = logits_NV.sort(dim=1, descending=True)
    reached_NV = weights_NV.gather(1, ids_NV).cumsum(1)
    short_N1 = (reached_NV < mass_N1 * weights_NV.sum(dim=1, keepdim=True)).sum(1, keepdim=True)
    cut_N1 = top_NV.gather(1, short_N1.clamp_max(logits_NV.shape[1] - 1))
    return cut_N1.masked_fill_(mass_N1 >= 1, -math.inf)
