"""From logits to probabilities: q and p that tokens follow, q0 and p0 that rules read.

A row is kept as logits and a normaliser, so that a few tokens of many rows cost a gather, and only
a row that is sampled from is computed in full. On a CPU passes over memory are what costs: there
rows are processed a few at a time, in a buffer that stays in cache. Arithmetic is float32, or
float64 for float64 logits.

Shapes: `N` rows, `E` chosen rows, `K` chosen tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
import torch
from torch import Tensor

from cascade.sampling import tensor_ops
from cascade.sampling.penalties import apply_penalties
from cascade.sampling.tensor_ops import map_rows, to_list, upload, widen
from cascade.sampling.truncation import inverse_temperature, top_k, truncate, weights_of
from cascade.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray

    from cascade.sampling.penalties import Context

_Value = TypeVar("_Value")

_MIN_LOG = -1e30
_UNSCALED = SamplingParams()
_SPARSE = 4  # rows with more than one in so many tokens are not gathered


@dataclass(frozen=True, kw_only=True)
class SoftmaxProbs:
    """Rows softmax(logits / temperature) over the tokens that truncation keeps.

    What is costly and not always read is computed on first use.
    """

    logits_NV: Tensor  # any float type, widened where read
    inverse_N1: Tensor | None = None  # 1 / temperature; None: all are 1
    least_N1: Tensor | None = None  # least logit kept; None: nothing is truncated
    known_scale: tuple[Tensor, Tensor] | None = None  # see `_scale`; given where truncated
    unscaled: SoftmaxProbs | None = None  # of the same logits, where its scale is known too

    def at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities of the tokens `ids_EK` of chosen rows, by default of all."""
        return self.log_at(ids_EK, rows_E=rows_E).exp_()

    def log_at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the log-probabilities of the tokens `ids_EK` of chosen rows."""
        if rows_E is None:
            return self._log_probs(widen(self.logits_NV.gather(1, ids_EK)), slice(None))
        return self._log_probs(widen(self.logits_NV[rows_E[:, None], ids_EK]), rows_E)

    def log_dense(self) -> Tensor:
        """Return the log-probabilities of every token, [N, V], -inf where impossible."""
        return self._log_probs(widen(self.logits_NV), slice(None))

    def dense(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the probabilities of every token of chosen rows, by default of all; a copy."""
        if rows is not None:
            one = len(rows) == 1  # a view
            device = self.logits_NV.device
            return self.select(
                slice(rows[0], rows[0] + 1) if one else torch.tensor(rows, device=device)
            ).dense()
        like = widen(self.logits_NV[:0])
        p_NV = torch.empty(self.logits_NV.shape, dtype=like.dtype, device=like.device)

        def fill(rows: slice) -> None:
            weights_NV = self._weights(rows, out=p_NV[rows])
            scale = self.known_scale or self.__dict__.get("_scale")
            if scale is None:
                weights_NV.div_(weights_NV.sum(dim=1, keepdim=True))
            else:
                weights_NV.mul_((-scale[1][rows]).exp())

        self._map(fill)
        return p_NV

    def likeliest(self, count: int | None) -> tuple[Tensor | None, Tensor]:
        """Return the `count` likeliest tokens of each row, ids ascending, and weights, [N, K] each.

        A weight is a probability up to a factor of its row, and 0 where a row has fewer tokens.
        Without a count they are all that truncation keeps. The ids are None where a row has so many
        that the whole vocabulary is returned, and on a device, which would have to be read.
        """
        vocab = self.logits_NV.shape[1]
        if self.logits_NV.device.type != "cpu" or (count is None and self.least_N1 is None):
            return None, self.dense()
        least_N = [-math.inf] * len(self.logits_NV)
        if self.least_N1 is not None:
            least_N = to_list(self.least_N1.squeeze(1))
        found = [
            _likeliest(widen(logits_V).numpy(), count, least)
            for logits_V, least in zip(self.logits_NV, least_N, strict=True)
        ]
        size = max([1, *map(len, found)])
        if size > vocab // _SPARSE:
            return None, self.dense()
        ids_NK = np.zeros((len(found), size), np.int64)
        for ids_K, own_K in zip(ids_NK, found, strict=True):
            ids_K[: len(own_K)] = own_K
        size_N1 = torch.tensor([len(own_K) for own_K in found])[:, None]
        ids = torch.from_numpy(ids_NK)
        every = slice(None)
        weights_NK = weights_of(
            widen(self.logits_NV.gather(1, ids)), self._peaks(every), self._inverse(every)
        )
        return ids, weights_NK.mul_(torch.arange(size) < size_N1)

    def select(self, rows_E: Tensor | slice) -> SoftmaxProbs:
        """Return a selection of the rows."""
        inverse_N1, least_N1 = self.inverse_N1, self.least_N1
        scale = self.known_scale or self.__dict__.get("_scale")
        return SoftmaxProbs(
            logits_NV=self.logits_NV[rows_E],
            inverse_N1=None if inverse_N1 is None else inverse_N1[rows_E],
            least_N1=None if least_N1 is None else least_N1[rows_E],
            known_scale=None if scale is None else (scale[0][rows_E], scale[1][rows_E]),
        )

    def max_probs(self) -> Tensor:
        """Return the largest probability of each row."""
        return (-self._scale[1]).exp().squeeze(1)

    def argmax(self) -> Tensor:
        """Return the likeliest token of each row, the lowest id of equal ones."""
        return tensor_ops.argmax(self.logits_NV)

    def entropies(self) -> Tensor:
        """Return the entropy of each row in nats."""

        def entropies(rows: slice) -> Tensor:
            weights_NV = self._weights(rows)
            total_N = weights_NV.sum(dim=1)
            # log Z - sum of w s / Z, where w = exp(s) and the largest s is 0. An impossible token
            # adds nothing; a finite logarithm keeps its product from being NaN.
            logs_NV = self._scaled(rows).clamp_min_(_MIN_LOG)
            return total_N.log() - logs_NV.mul_(weights_NV).sum(dim=1).div_(total_N)

        return torch.cat(self._map(entropies)).clamp_min_(0)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """The peak, each row's largest logit, and log sum exp((logit - peak) / temperature)."""
        if self.known_scale is not None:
            return self.known_scale

        def scale(rows: slice) -> tuple[Tensor, Tensor]:
            return self._peaks(rows), self._weights(rows).sum(dim=1, keepdim=True).log_()

        peaks, norms = zip(*self._map(scale), strict=True)
        return torch.cat(peaks), torch.cat(norms)

    def _log_probs(self, logits: Tensor, rows: Tensor | slice) -> Tensor:
        """Return log-probabilities of logits of some rows."""
        peak_N1, norm_N1 = self._scale
        log = logits - peak_N1[rows]
        if self.inverse_N1 is not None:
            log.mul_(self.inverse_N1[rows])
        log.sub_(norm_N1[rows])
        if self.least_N1 is None:
            return log
        return log.masked_fill_(logits < self.least_N1[rows], -math.inf)

    def _weights(self, rows: slice, *, out: Tensor | None = None) -> Tensor:
        """Return exp((logit - largest) / temperature) of some rows, 0 where impossible."""
        logits_NV = widen(self.logits_NV[rows])
        weights_NV = weights_of(logits_NV, self._peaks(rows), self._inverse(rows), out=out)
        if self.least_N1 is not None:
            tensor_ops.zero_where_less(weights_NV, logits_NV, self.least_N1[rows])
        return weights_NV

    def _map(self, function: Callable[[slice], _Value]) -> list[_Value]:
        return map_rows(function, self.logits_NV.shape, self.logits_NV.device)

    def _peaks(self, rows: slice) -> Tensor:
        """Return the largest logit of some rows."""
        if self.known_scale is not None:
            return self.known_scale[0][rows]
        return widen(self.logits_NV[rows].amax(dim=1, keepdim=True))

    def _inverse(self, rows: slice) -> Tensor | int:
        """Return 1 / temperature of some rows."""
        return 1 if self.inverse_N1 is None else self.inverse_N1[rows]

    def _scaled(self, rows: slice) -> Tensor:
        """Return (logit - largest) / temperature of some rows."""
        scaled_NV = widen(self.logits_NV[rows]) - self._peaks(rows)
        return scaled_NV if self.inverse_N1 is None else scaled_NV.mul_(self.inverse_N1[rows])


def _likeliest(logits_V: NDArray[Any], count: int | None, least: float) -> NDArray[np.intp]:
    """Return the tokens of the `count` largest logits that are at least `least`."""
    if count is None or count >= len(logits_V):
        return np.flatnonzero(logits_V >= least)
    ids_K = top_k(logits_V, count)
    # Of equal logits the lowest ids are taken.
    chosen_K = ids_K[np.sort(np.argsort(-logits_V[ids_K], kind="stable")[:count])]
    return chosen_K[logits_V[chosen_K] >= least]


@dataclass(frozen=True, slots=True, kw_only=True)
class OneHotProbs:
    """Rows at temperature 0: probability 1 on the likeliest token."""

    best_N: Tensor
    vocab: int
    dtype: torch.dtype

    def at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities, 0 or 1, of the tokens `ids_EK` of chosen rows."""
        best_E = self.best_N if rows_E is None else self.best_N[rows_E]
        return (ids_EK == best_E[:, None]).to(self.dtype)

    def dense(self, rows: Sequence[int] | None = None) -> Tensor:
        """Return the probabilities of every token of chosen rows, by default of all."""
        best_E = self.best_N
        if rows is not None:
            best_E = best_E[torch.tensor(rows, device=best_E.device)]
        shape = (len(best_E), self.vocab)
        zeros_EV = torch.zeros(shape, dtype=self.dtype, device=best_E.device)
        return zeros_EV.scatter_(1, best_E[:, None], 1.0)


Probs: TypeAlias = SoftmaxProbs | OneHotProbs


def process(
    logits_NV: Tensor, samplings_N: Sequence[SamplingParams], contexts_N: Sequence[Context]
) -> Probs:
    """Return the probabilities that sampling parameters make of logits, in the order they state.

    Top-k and top-p also keep tokens that tie with the last one kept. Top-p is relative to the
    probability that top-k keeps.

    Args:
        logits_NV: Raw logits, any float type.
        samplings_N: Sampling parameters of each row; either all are greedy or none is.
        contexts_N: What penalties count; not read if no row has penalties or bias.
    """
    # The rows of a block share one object.
    distinct = {id(sampling): sampling for sampling in samplings_N}.values()
    adjusts = any(s.logit_bias or s.counts_tokens for s in distinct)
    if adjusts:
        logits_NV = apply_penalties(logits_NV, samplings_N, contexts_N)
    like = widen(logits_NV[:0])
    if samplings_N and samplings_N[0].greedy:
        best_N, vocab = tensor_ops.argmax(logits_NV), logits_NV.shape[1]
        return OneHotProbs(best_N=best_N, vocab=vocab, dtype=like.dtype)
    inverse_N1 = upload(
        [inverse_temperature(s) for s in samplings_N], like.device, dtype=like.dtype
    )[:, None]
    is_scaled = any(s.temperature != 1 for s in distinct)
    if not any(s.top_k or s.top_p < 1 or s.min_p for s in distinct):
        return SoftmaxProbs(logits_NV=logits_NV, inverse_N1=inverse_N1 if is_scaled else None)
    found = truncate(logits_NV, samplings_N)
    # Top-p alone weighs all tokens.
    knows_all = all(s.top_p < 1 and not s.top_k for s in distinct) and not (is_scaled or adjusts)
    whole = (found.peak_N1, found.whole_N1)
    return SoftmaxProbs(
        logits_NV=logits_NV,
        inverse_N1=inverse_N1 if is_scaled else None,
        least_N1=found.least_N1,
        known_scale=(found.peak_N1, found.norm_N1),
        unscaled=SoftmaxProbs(logits_NV=logits_NV, known_scale=whole) if knows_all else None,
    )


def unscaled_probs(
    logits_NV: Tensor,
    *,
    processed: Probs | None = None,
    samplings_N: Sequence[SamplingParams] = (),
) -> SoftmaxProbs:
    """Return the probabilities at temperature 1, without truncation, penalties or bias.

    Args:
        logits_NV: Raw logits.
        processed: Their processed probabilities, if known; reused where they are the same.
        samplings_N: What `processed` was processed with.
    """
    if isinstance(processed, SoftmaxProbs) and all(s == _UNSCALED for s in samplings_N):
        return processed
    if isinstance(processed, SoftmaxProbs) and processed.unscaled is not None:
        return processed.unscaled
    return SoftmaxProbs(logits_NV=logits_NV)
