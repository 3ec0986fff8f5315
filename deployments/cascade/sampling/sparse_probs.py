"""Sparse rows: what the drafter samples from, ships, and the expert reads back.

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

# Under half a unit in the last place of the largest weight a token is rounding. Of a trained
# drafter's 64 likeliest tokens four to nine stay, and the others had a thousandth of its mass.
_LEAST_WEIGHT = 2.0**-12

# Stands for a row that nobody needs, at a position where the drafter's own rule keeps.
ABSENT = SparseProbs(ids=np.empty(0, np.uint32), weights=np.empty(0, np.float16))


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """N laws on K tokens each, padded with tokens of probability 0."""

    ids_NK: Tensor  # int64, ascending
    weights_NK: Tensor  # float16, the largest of a row is 1

    def probs(self, dtype: torch.dtype) -> Tensor:
        """Return the probabilities [N, K]: the weights, renormalised."""
        return normalised(self.weights_NK.to(dtype))

    def row(
        self, index: int, *, full: bool = False, unscaled_K: Tensor | None = None
    ) -> SparseProbs:
        """Return one law as a value, without its padding unless it is a full row."""
        weights_K = self.weights_NK[index].numpy()
        q0_K = None if unscaled_K is None else unscaled_K.half().numpy()
        if full:
            return SparseProbs(ids=np.empty(0, np.uint32), weights=weights_K, unscaled=q0_K)
        kept_K = weights_K > 0
        ids_K = self.ids_NK[index].numpy().astype(np.uint32)[kept_K]
        q0_kept_K = None if q0_K is None else q0_K[kept_K]
        return SparseProbs(ids=ids_K, weights=weights_K[kept_K], unscaled=q0_kept_K)


def normalised(weights_NK: Tensor) -> Tensor:
    """Return weights divided by their sum; rows of zeros stay."""
    total_N1 = weights_NK.sum(dim=1, keepdim=True)
    return weights_NK / torch.where(total_N1 > 0, total_N1, 1.0)


def sparsify(q_NV: Tensor, entries: int) -> SparseRows:
    """Return the likeliest `entries` tokens of each row, as float16 weights scaled by the largest.

    Of fewer tokens than there are, those under 2**-12 of the largest leave the law too; of all,
    those under 2**-25, which round to 0.
    """
    if entries >= q_NV.shape[1]:
        ids_V = torch.arange(q_NV.shape[1], device=q_NV.device)
        return SparseRows(ids_NK=ids_V.expand(q_NV.shape), weights_NK=quantised(q_NV))
    ids_NK = q_NV.topk(entries).indices.sort(dim=1).values
    weights_NK = quantised(q_NV.gather(1, ids_NK))
    return SparseRows(ids_NK=ids_NK, weights_NK=weights_NK.where(weights_NK >= _LEAST_WEIGHT, 0.0))


def quantised(q_NK: Tensor) -> Tensor:
    """Return float16 weights proportional to the rows, the largest of each 1."""
    return (q_NK / q_NK.amax(dim=1, keepdim=True)).half()


def one_hot(token: int, *, unscaled: float | None = None) -> SparseProbs:
    """Return the law that is certain of one token."""
    q0_K = None if unscaled is None else np.array([unscaled], np.float16)
    return SparseProbs(
        ids=np.array([token], np.uint32), weights=np.ones(1, np.float16), unscaled=q0_K
    )


def size(row: SparseProbs) -> int:
    """Return the number of entries; 0 for `ABSENT`."""
    return len(row.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The drafter's rows on the tokens that matter: the expert's side of `Sparse`."""

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
    """Return the rows as they were shipped.

    One that was not is known at its drafted token alone; token -1 stands for none.
    """
    sizes_N = [0 if row is None else size(row) for row in rows_N]
    shape = (len(rows_N), max([1, *sizes_N]))
    ids_NK, weights_NK = np.zeros(shape, np.int64), np.zeros(shape, np.float32)
    scale_N1, q0_NK = np.ones((len(rows_N), 1)), np.full(shape, -np.inf)
    for i, row in enumerate(rows_N):
        count = sizes_N[i]
        if row is not None and count:
            ids_NK[i, :count], weights_NK[i, :count] = _ids(row), row.weights
            if row.unscaled is not None:
                q0_NK[i, :count] = row.unscaled
        else:
            ids_NK[i, 0], weights_NK[i, 0] = max(tokens_N[i], 0), tokens_N[i] >= 0
            scale_N1[i], q0_NK[i, 0] = likelihoods_N[i], unscaled_N[i]
    law_NK = normalised(_brought(weights_NK, like))
    return Support(
        ids_NK=torch.from_numpy(ids_NK).to(like.device),
        valid_NK=law_NK > 0,
        q_NK=law_NK * _brought(scale_N1, like),
        q0_NK=_brought(q0_NK, like),
    )


def _ids(row: SparseProbs) -> NDArray[np.uint32] | NDArray[np.int64]:
    return row.ids if len(row.ids) else np.arange(size(row))


def _brought(values: NDArray[np.float32] | NDArray[np.float64], like: Tensor) -> Tensor:
    return torch.from_numpy(values).to(like.device, like.dtype)
