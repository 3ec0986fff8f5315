"""Sparse probabilities: what the drafter samples from and sends, and the expert reads back.

Shapes: `N` rows, `K` entries of a row, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cascade.types import SparseProbs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# Half a unit in the last place of the largest weight; lower weights are rounding errors. Of a
# trained drafter's 64 likeliest tokens four to nine stay, and the others had 0.1 % of its mass.
_MIN_WEIGHT = 2.0**-12

# Stands for probabilities that nobody reads, at a position where the drafter's own rule keeps.
ABSENT = SparseProbs(ids=np.empty(0, np.uint32), weights=np.empty(0, np.float16))


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """N distributions over K tokens each, padded with tokens of probability 0."""

    ids_NK: Tensor  # int64, ascending
    weights_NK: Tensor  # float16, the largest of a row is 1

    def probs(self, dtype: torch.dtype) -> Tensor:
        """Return the probabilities [N, K]: the weights, normalised."""
        return _normalised(self.weights_NK.to(dtype))

    def row(
        self, index: int, *, full: bool = False, unscaled_K: Tensor | None = None
    ) -> SparseProbs:
        """Return one distribution as a value to send.

        Args:
            index: Which of the N.
            full: Whether the K entries are the vocabulary; then ids are left out, zeros are not.
            unscaled_K: Unscaled probabilities of the K tokens, if the rule reads them.
        """
        weights_K = self.weights_NK[index].numpy()
        q0_K = None if unscaled_K is None else unscaled_K.half().numpy()
        if full:
            return SparseProbs(ids=np.empty(0, np.uint32), weights=weights_K, unscaled=q0_K)
        kept_K = weights_K > 0
        ids_K = self.ids_NK[index].numpy().astype(np.uint32)[kept_K]
        q0_kept_K = None if q0_K is None else q0_K[kept_K]
        return SparseProbs(ids=ids_K, weights=weights_K[kept_K], unscaled=q0_kept_K)


def _normalised(weights_NK: Tensor) -> Tensor:
    """Return weights divided by their sum; rows of zeros stay zeros."""
    total_N1 = weights_NK.sum(dim=1, keepdim=True)
    return weights_NK / torch.where(total_N1 > 0, total_N1, 1.0)


def sparsify(q_NV: Tensor, entries: int) -> SparseRows:
    """Return the likeliest `entries` tokens of each row, as float16 weights scaled by the largest.

    If `entries` is less than V, tokens below 2**-12 of the largest are dropped as well; otherwise
    only those below 2**-25, which float16 rounds to 0.
    """
    if entries >= q_NV.shape[1]:
        ids_V = torch.arange(q_NV.shape[1], device=q_NV.device)
        return SparseRows(ids_NK=ids_V.expand(q_NV.shape), weights_NK=_quantised(q_NV))
    ids_NK = q_NV.topk(entries).indices.sort(dim=1).values
    weights_NK = _quantised(q_NV.gather(1, ids_NK))
    return SparseRows(ids_NK=ids_NK, weights_NK=weights_NK.where(weights_NK >= _MIN_WEIGHT, 0.0))


def _quantised(q_NK: Tensor) -> Tensor:
    """Return float16 weights proportional to the rows, the largest of each 1."""
    return (q_NK / q_NK.amax(dim=1, keepdim=True)).half()


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The drafter's probabilities as the expert reads them, on the tokens where they are known."""

    ids_NK: Tensor  # int64, padded with 0
    valid_NK: Tensor  # bool, False on the padding
    q_NK: Tensor  # probabilities, 0 on the padding
    q0_NK: Tensor  # unscaled probabilities, -inf where unknown


def received(
    rows_N: Sequence[SparseProbs | None],
    tokens_N: Sequence[int],
    likelihoods_N: Sequence[float],
    unscaled_N: Sequence[float],
    *,
    like: Tensor,
) -> Support:
    """Return the drafter's probabilities as they were sent.

    Args:
        rows_N: What was sent; None or `ABSENT` is known at the drafted token alone.
        tokens_N: Drafted tokens; -1 stands for none.
        likelihoods_N: q of the drafted tokens, read where no row was sent.
        unscaled_N: q0 of the drafted tokens, read likewise; -inf where unknown.
        like: Gives device and float type.
    """
    sizes_N = [0 if row is None else len(row.weights) for row in rows_N]
    shape = (len(rows_N), max([1, *sizes_N]))
    ids_NK, weights_NK = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    scale_N1, q0_NK = np.ones((len(rows_N), 1)), np.full(shape, -np.inf)
    for i, (row, count) in enumerate(zip(rows_N, sizes_N, strict=True)):
        if row is not None and count:
            ids_NK[i, :count] = row.ids if len(row.ids) else np.arange(count)
            weights_NK[i, :count] = row.weights
            if row.unscaled is not None:
                q0_NK[i, :count] = row.unscaled
        else:
            ids_NK[i, 0], weights_NK[i, 0] = max(tokens_N[i], 0), tokens_N[i] >= 0
            scale_N1[i], q0_NK[i, 0] = likelihoods_N[i], unscaled_N[i]

    def to_device(values: NDArray[np.float32] | NDArray[np.float64]) -> Tensor:
        return torch.from_numpy(values).to(like.device, like.dtype)

    q_NK = _normalised(to_device(weights_NK))
    return Support(
        ids_NK=torch.from_numpy(ids_NK).to(like.device),
        valid_NK=q_NK > 0,
        q_NK=q_NK * to_device(scale_N1),
        q0_NK=to_device(q0_NK),
    )
