"""Reductions of rows as long as a vocabulary, on a CPU a few rows at a time to stay in its cache.

Shapes: `N` rows, `B` blocks of a row, `W` tokens of a block, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

_PIECE = 2**17  # numbers of one piece: half a megabyte
_BLOCK = 256  # tokens whose maximum is looked for before their argmax
_LONG = 2048  # tokens from which a row is worth it


def widen(logits_NV: Tensor) -> Tensor:
    """Return the logits in float32, or as they are in float64."""
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def pieces(rows_NV: Tensor) -> list[slice]:
    """Return the rows that are worked on together: all of them but on a CPU."""
    count, vocab = rows_NV.shape
    step = max(1, count if rows_NV.device.type != "cpu" else _PIECE // max(vocab, 1))
    return [slice(first, min(first + step, count)) for first in range(0, max(count, 1), step)]


def peak_and_norm(logits_NV: Tensor, inverse_N1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and log sum exp((logit - peak) / temperature), [N, 1] each.

    Args:
        logits_NV: Widened.
        inverse_N1: 1 / temperature; None where all are 1.
    """
    peak_N1 = logits_NV.amax(dim=1, keepdim=True)
    scaled_NV = logits_NV if inverse_N1 is None else (logits_NV - peak_N1).mul_(inverse_N1)
    # The likeliest token's share is 1 / sum, and softmax is one pass.
    return peak_N1, scaled_NV.softmax(dim=1).amax(dim=1, keepdim=True).log_().neg_()


def argmax(rows_NV: Tensor) -> Tensor:
    """Return the place of the largest number of each row, the lowest of equals, int64 [N].

    Maxima of blocks are quick to find, places are not: so only the first best block is searched.
    """
    vocab = rows_NV.shape[1]
    if rows_NV.device.type != "cpu" or vocab < _LONG:
        return widen(rows_NV).argmax(dim=1)
    even = vocab // _BLOCK * _BLOCK
    best_NB = rows_NV[:, :even].unflatten(1, (-1, _BLOCK)).amax(dim=2)
    if even < vocab:
        rest_N1 = rows_NV[:, even:].amax(dim=1, keepdim=True)
        best_NB = torch.cat([best_NB, rest_N1], dim=1)
    first_N1 = widen(best_NB).argmax(dim=1, keepdim=True) * _BLOCK
    # Places after the last token repeat it, and the first of equals is found.
    place_NW = (first_N1 + torch.arange(_BLOCK)).clamp_max_(vocab - 1)
    found_N1 = widen(rows_NV.gather(1, place_NW)).argmax(dim=1, keepdim=True)
    return place_NW.gather(1, found_N1).squeeze(1)
