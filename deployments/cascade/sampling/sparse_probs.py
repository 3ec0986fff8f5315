"""The drafter's q: what it samples from and sends, and the expert reads back.

q is what sampling parameters leave of the drafter's distribution, cut and rounded to float16.

Shapes: `N` rows, `K` entries of a row, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from cascade.types import SparseProbs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

# The largest weight of a row. Float16 then has eleven bits for weights down to 2**-29 of it, and
# rounding moves at most 2**-11 of the probability, also of a flat tail over a large vocabulary.
_LARGEST_WEIGHT = 2.0**15

_MIN_RATIO = 2.0**-12  # of a token to the likeliest, where the entries are limited
_CLASSES = 128  # of weights: the exponent and two bits of the mantissa


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Which tokens a drafter's q keeps of those that sampling parameters keep; by default all."""

    entries: int | None = None  # the likeliest, if at least 2**-12 as likely as the likeliest
    lost: float = 0.0  # the probability that the unlikeliest may have together, which are dropped


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseRows:
    """N distributions over K tokens each, padded with tokens of probability 0."""

    ids_NK: Tensor | None  # int64, ascending; None: the vocabulary
    weights_NK: Tensor  # float16, the largest of a row is 2**15

    def row(self, index: int, *, unscaled_K: Tensor | None = None) -> SparseProbs:
        """Return one distribution as a value to send, in the form that takes fewer bytes.

        Args:
            index: Which of the N.
            unscaled_K: Unscaled probabilities of the K tokens, if the rule reads them.
        """
        weights_K = self.weights_NK[index].numpy()
        q0_K = None if unscaled_K is None else unscaled_K.half().numpy()
        kept_E = np.flatnonzero(weights_K)
        bytes_each = weights_K.itemsize * (1 if q0_K is None else 2)
        if self.ids_NK is None and len(kept_E) * (bytes_each + 4) >= len(weights_K) * bytes_each:
            return SparseProbs(ids=np.empty(0, np.uint32), weights=weights_K, unscaled=q0_K)
        ids_E = kept_E if self.ids_NK is None else self.ids_NK[index].numpy()[kept_E]
        q0_E = None if q0_K is None else q0_K[kept_E]
        return SparseProbs(ids=ids_E.astype(np.uint32), weights=weights_K[kept_E], unscaled=q0_E)


def _normalised(weights_NK: Tensor) -> Tensor:
    """Return weights divided by their sum; rows of zeros stay zeros."""
    total_N1 = weights_NK.sum(dim=1, keepdim=True)
    return weights_NK / torch.where(total_N1 > 0, total_N1, 1.0)


def sparsify(
    q_NK: Tensor, cut: Cut, *, ids_NK: Tensor | None = None, vocab: int | None = None
) -> SparseRows:
    """Return the rows cut and rounded; a row of at most `cut.entries` tokens is not cut.

    Args:
        q_NK: Probabilities, each row up to a factor.
        cut: Which of them are kept.
        ids_NK: Their tokens, ascending; those that are missing are impossible or would be cut.
            None: the vocabulary.
        vocab: Number of tokens V; by default K.
    """
    entries, vocab = cut.entries, q_NK.shape[1] if vocab is None else vocab
    if entries is not None and entries < vocab:
        if entries < q_NK.shape[1]:
            index_NK = q_NK.topk(entries).indices.sort(dim=1).values
            q_NK = q_NK.gather(1, index_NK)
            ids_NK = index_NK if ids_NK is None else ids_NK.gather(1, index_NK)
        weights_NK = _quantised(q_NK)
        likely_NK = weights_NK >= _MIN_RATIO * _LARGEST_WEIGHT
        return SparseRows(ids_NK=ids_NK, weights_NK=weights_NK.where(likely_NK, 0.0))
    weights_NK = _quantised(q_NK)
    if cut.lost:
        weights_NK = _without_tail(weights_NK, lost=cut.lost)
    return SparseRows(ids_NK=ids_NK, weights_NK=weights_NK)


def _quantised(q_NK: Tensor) -> Tensor:
    """Return float16 weights proportional to the rows."""
    return (q_NK * (_LARGEST_WEIGHT / q_NK.amax(dim=1, keepdim=True))).half()


def _without_tail(weights_NV: Tensor, *, lost: float) -> Tensor:
    """Return the weights without the lightest, which together are at most `lost` of the sum.

    Whole classes of weights are dropped, so that nothing need be sorted: a float16's first byte is
    its class, and floats that are not negative are ordered as their bits are.
    """
    class_NV, bits_NV = weights_NV.view(torch.uint8)[:, 1::2], weights_NV.view(torch.int16)
    below_NC = _sums_by_class(weights_NV.float(), class_NV).cumsum(dim=1)
    first_N1 = torch.searchsorted(below_NC, lost * below_NC[:, -1:], right=True)
    # On a CPU this takes a fifth of the time of `masked_fill`.
    kept_NV = bits_NV * (bits_NV >= first_N1.to(torch.int16) << 8)
    return kept_NV.view(torch.float16)


def _sums_by_class(weights_NV: Tensor, class_NV: Tensor) -> Tensor:
    """Return the sum of each class of weights, [N, C]."""
    if weights_NV.device.type == "cpu":  # elsewhere `bincount` waits for the device
        pairs = zip(class_NV, weights_NV, strict=True)
        return torch.stack([torch.bincount(c, w, minlength=_CLASSES) for c, w in pairs])
    sums_NC = weights_NV.new_zeros(len(weights_NV), _CLASSES)
    return sums_NC.scatter_add_(1, class_NV.long(), weights_NV)


@dataclass(frozen=True, slots=True, kw_only=True)
class Support:
    """The drafter's probabilities as the expert reads them, on the tokens where they are known.

    These are the vocabulary if all of it was sent for some row.
    """

    ids_NK: Tensor | None  # int64, padded with 0; None: the vocabulary
    valid_NK: Tensor | None  # bool, False on the padding; None: there is none
    q_NK: Tensor  # probabilities, 0 on the padding
    q0_NK: Tensor | None  # unscaled probabilities, -inf where unknown; None: nobody reads them
    index_N1: Tensor  # at which the drafted token is, 0 where it is not
    has_token_N: Tensor  # bool: q of the drafted token is known and not 0


def support_size(rows_N: Sequence[SparseProbs | None], vocab: int) -> int:
    """Return the number K of tokens on which the drafter's probabilities are known."""
    sizes = [0 if row is None else len(row.weights) for row in rows_N]
    return vocab if any(map(_is_whole, rows_N)) else max([1, *sizes])


def _is_whole(row: SparseProbs | None) -> bool:
    return row is not None and len(row.weights) > len(row.ids)


def received(  # noqa: PLR0913 - one parameter a part of what was sent
    rows_N: Sequence[SparseProbs | None],
    tokens_N: Sequence[int],
    likelihoods_N: Sequence[float],
    unscaled_N: Sequence[float] | None,
    *,
    vocab: int,
    like: Tensor,
) -> Support:
    """Return the drafter's probabilities as they were sent.

    Args:
        rows_N: What was sent; q is known at the drafted token alone if that is None or empty.
        tokens_N: Drafted tokens; -1 stands for none.
        likelihoods_N: q of the drafted tokens, read where no row was sent.
        unscaled_N: q0 of the drafted tokens, read likewise; -inf where unknown. None: nobody reads
            unscaled probabilities.
        vocab: Number of tokens V.
        like: Gives device and float type.
    """
    count, size = len(rows_N), support_size(rows_N, vocab)
    is_whole = any(map(_is_whole, rows_N))
    ids_NK = np.zeros((count, 0 if is_whole else size), np.int64)
    weights_NK = np.zeros((count, size), np.float16)
    q0_NK = None if unscaled_N is None else np.full((count, size), -np.inf)
    scale_N1, index_N = np.ones((count, 1)), np.full(count, -1)
    for i, row in enumerate(rows_N):
        token = tokens_N[i]
        if row is None or not len(row.weights):
            known = np.array([max(token, 0)])
            weights, unscaled = np.array([token >= 0], np.float16), None
            scale_N1[i] = likelihoods_N[i]
            if unscaled_N is not None:
                unscaled = np.array([unscaled_N[i]])
        else:
            known, weights, unscaled = row.ids, row.weights, row.unscaled
        places = slice(len(weights)) if not is_whole or len(weights) > len(known) else known
        weights_NK[i, places] = weights
        if not is_whole:
            ids_NK[i, places] = known
        if q0_NK is not None and unscaled is not None:
            q0_NK[i, places] = unscaled
        found = np.flatnonzero(known == token) if not is_whole else np.array([token])
        if len(found) and token >= 0 and weights_NK[i, found[0]] > 0:
            index_N[i] = found[0]

    def to_device(values: NDArray[Any]) -> Tensor:
        return torch.from_numpy(values).to(like.device, like.dtype)

    q_NK = _normalised(to_device(weights_NK))
    if (scale_N1 != 1).any():
        q_NK.mul_(to_device(scale_N1))
    # Half floats that are not negative are ordered as their bits are, which are faster to compare.
    valid_NK = weights_NK.view(np.int16) > 0
    index_N1 = torch.from_numpy(index_N)[:, None].to(like.device)
    return Support(
        ids_NK=None if is_whole else torch.from_numpy(ids_NK).to(like.device),
        valid_NK=None if is_whole or valid_NK.all() else torch.from_numpy(valid_NK).to(like.device),
        q_NK=q_NK,
        q0_NK=None if q0_NK is None else to_device(q0_NK),
        index_N1=index_N1.clamp_min(0),
        has_token_N=(index_N1 >= 0).squeeze(1),
    )
