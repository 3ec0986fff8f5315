"""Inverse-CDF sampling from probabilities, and log-probabilities of tokens.

Shapes: `N` rows, `K` entries of a row, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.sampling.tensor_ops import to_list, upload
from cascade.types import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.sampling.probs import SoftmaxProbs

_BLOCK = 128  # weights that are summed before the cumulative sum


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Rows of probabilities that need not sum to one, to sample from.

    The sums of blocks are cumulated in float64, because float32 would lose the light tokens of a
    large vocabulary; then the weights of the block in which the number falls.
    """

    weights_NK: Tensor

    @cached_property
    def totals(self) -> Tensor:
        """What each row sums to, float64."""
        return self._sums.sum(dim=1)

    def inverse_cdf(self, uniforms_N: Tensor) -> Tensor:
        """Return the index at which each number in [0, 1) falls in its row's CDF, int64 [N].

        An index of weight 0 is returned only if all weights are 0.
        """
        weights_NK = self.weights_NK
        points_N1 = (upload(uniforms_N, weights_NK.device) * self.totals)[:, None]
        block_N1, rest_N1 = _locate(self._sums, points_N1)
        if self._is_short:
            return block_N1.squeeze(1)
        last = weights_NK.shape[1] - 1
        ids_NK = block_N1 * _BLOCK + torch.arange(_BLOCK, device=weights_NK.device)
        found_NK = weights_NK.gather(1, ids_NK.clamp_max(last)).double()
        inside_N1, _ = _locate(found_NK.masked_fill(ids_NK > last, 0.0), rest_N1)
        return (block_N1 * _BLOCK + inside_N1).squeeze(1).clamp_max(last)

    @property
    def _is_short(self) -> bool:
        return self.weights_NK.shape[1] <= 2 * _BLOCK

    @cached_property
    def _sums(self) -> Tensor:
        """The sums of blocks, float64; in short rows each weight is a block."""
        weights_NK = self.weights_NK
        if self._is_short:
            return weights_NK.double()
        whole = weights_NK.shape[1] // _BLOCK * _BLOCK
        # The sum of a block is as exact as its weights are.
        sums_NB = weights_NK[:, :whole].unflatten(1, (-1, _BLOCK)).sum(dim=2)
        rest_N1 = weights_NK[:, whole:].sum(dim=1, keepdim=True)
        return torch.cat([sums_NB, rest_N1], dim=1).double()


def _locate(sums_NK: Tensor, points_N1: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index at which each point falls, and how far into it, [N, 1] each."""
    cumulated_NK = sums_NK.cumsum(dim=1)
    total_N1 = cumulated_NK[:, -1:]
    # A number close to 1 may round to the total, which no index exceeds.
    below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    points_N1 = torch.minimum(points_N1, below_N1)
    index_N1 = torch.searchsorted(cumulated_NK, points_N1, right=True)
    index_N1 = index_N1.clamp_max(sums_NK.shape[1] - 1)
    before_N1 = cumulated_NK.gather(1, index_N1) - sums_NK.gather(1, index_N1)
    return index_N1, (points_N1 - before_N1).clamp_min(0)


def logprobs(
    probs: SoftmaxProbs, tokens_N: Sequence[int], tops_N: Sequence[int]
) -> list[TokenLogprob]:
    """Return the log-probability of one token of each row, with that row's likeliest tokens.

    Args:
        probs: Probabilities of N rows.
        tokens_N: The tokens.
        tops_N: How many of the likeliest tokens to report.
    """
    ids_N1 = torch.tensor(tokens_N, dtype=torch.int64, device=probs.logits_NV.device)[:, None]
    chosen_N = to_list(probs.log_at(ids_N1).squeeze(1))
    depth = min(max(tops_N, default=0), probs.logits_NV.shape[1])
    best_NK = probs.logits_NV.topk(depth).indices
    best, values = to_list(best_NK), to_list(probs.log_at(best_NK))
    return [
        TokenLogprob(
            token=token, logprob=chosen, top=tuple(zip(best[i], values[i], strict=True))[:top]
        )
        for i, (token, chosen, top) in enumerate(zip(tokens_N, chosen_N, tops_N, strict=True))
    ]
