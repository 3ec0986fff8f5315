"""From a law and a coin to a token, and what a token's log-probability was.

Shapes: `N` rows, `K` entries of a law, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.decoding.host import fetch
from cascade.decoding.session import TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.decoding.distribution import Soft


def invert(weights_NK: Tensor, coins_N: Tensor) -> Tensor:
    """Return the index at which each coin falls in the cumulated weights, int64 [N].

    Weights need not sum to one; an index of weight 0 is never returned unless all are 0. Sums are
    float64: over a long vocabulary float32 ones would lose the light tokens.
    """
    cumulated_NK = weights_NK.cumsum(dim=1, dtype=torch.float64)
    total_N1 = cumulated_NK[:, -1:]
    # A coin of almost 1 may round to the total, which no index exceeds.
    below_N1 = torch.nextafter(total_N1, torch.zeros_like(total_N1))
    points_N1 = torch.minimum(coins_N.to(total_N1.device)[:, None] * total_N1, below_N1)
    index_N1 = torch.searchsorted(cumulated_NK, points_N1, right=True)
    return index_N1.squeeze(1).clamp_max(weights_NK.shape[1] - 1)


def logprobs(law: Soft, tokens_N: Sequence[int], tops_N: Sequence[int]) -> list[TokenLogprob]:
    """Return the log-probability of a token of each row, with that row's likeliest tokens."""
    ids_N1 = torch.tensor(tokens_N, dtype=torch.int64, device=law.logits_NV.device)[:, None]
    chosen_N = fetch(law.log_at(ids_N1).squeeze(1))
    depth = min(max(tops_N, default=0), law.logits_NV.shape[1])
    best_NK = law.logits_NV.topk(depth).indices
    best, values = fetch(best_NK), fetch(law.log_at(best_NK))
    return [
        TokenLogprob(
            token=token, logprob=chosen, top=tuple(zip(best[i], values[i], strict=True))[:top]
        )
        for i, (token, chosen, top) in enumerate(zip(tokens_N, chosen_N, tops_N, strict=True))
    ]
