"""From logits to the rows q and p that tokens follow, and to the rows q0 and p0 that rules read.

A row stays logits and a normaliser, so that a few tokens of many rows cost a gather, and only a row
that is sampled from is computed whole. On a CPU passes over memory are what costs: there all
probabilities are computed in one and kept, unless penalties or cuts have copied the rows already.
Arithmetic is float32, or float64 for float64 logits.

Shapes: `N` rows, `E` chosen rows, `K` chosen tokens, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor

from cascade.sampling import tensor_ops
from cascade.sampling.penalties import adjusted
from cascade.sampling.tensor_ops import widen
from cascade.sampling.truncation import truncate
from cascade.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.sampling.penalties import Context

# A temperature under this is greedy but for ties; its inverse still times zero is zero.
_LEAST_TEMPERATURE = 1e-30

_PLAIN = SamplingParams()

_LEAST_LOG = -1e30


@dataclass(frozen=True, slots=True, kw_only=True)
class Truncation:
    """Which tokens of rows stay, and what they sum to."""

    least_N1: Tensor  # least logit kept, -inf where all are
    peak_N1: Tensor  # largest logit
    norm_N1: Tensor  # log of the sum of exp((logit - peak) / temperature) over the tokens kept


@dataclass(frozen=True, kw_only=True)
class SoftmaxProbs:
    """Rows softmax(logits / temperature) over the tokens that a cut leaves.

    What is costly and not always read is computed when it is.
    """

    logits_NV: Tensor  # of any float type, widened where they are read
    inverse_N1: Tensor | None  # 1 / temperature; None: all are 1
    cut: Truncation | None  # None keeps all
    whole: bool = False  # all probabilities are computed at once, and kept

    def at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities of the tokens `ids_EK` of chosen rows, by default of all."""
        if self._kept is None:
            return self.log_at(ids_EK, rows_E=rows_E).exp()
        return self._kept[_every(ids_EK, rows_E)[:, None], ids_EK]

    def log_at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the log-probabilities of the tokens `ids_EK` of chosen rows."""
        rows_E = _every(ids_EK, rows_E)
        peak_N1, norm_N1 = self._scale
        logits_EK = widen(self.logits_NV[rows_E[:, None], ids_EK])
        log_EK = logits_EK - peak_N1[rows_E]
        if self.inverse_N1 is not None:
            log_EK *= self.inverse_N1[rows_E]
        log_EK -= norm_N1[rows_E]
        if self.cut is None:
            return log_EK
        return log_EK.masked_fill(logits_EK < self.cut.least_N1[rows_E], -math.inf)

    def rows(self, rows_E: Tensor | slice) -> SoftmaxProbs:
        """Return a selection of the rows."""
        cut = self.cut
        return SoftmaxProbs(
            logits_NV=self.logits_NV[rows_E],
            inverse_N1=None if self.inverse_N1 is None else self.inverse_N1[rows_E],
            cut=cut
            and Truncation(
                least_N1=cut.least_N1[rows_E],
                peak_N1=cut.peak_N1[rows_E],
                norm_N1=cut.norm_N1[rows_E],
            ),
        )

    def log_dense(self) -> Tensor:
        """Return the log-probabilities of every token, [N, V], -inf where impossible."""
        peak_N1, norm_N1 = self._scale
        logits_NV = widen(self.logits_NV)
        log_NV = logits_NV - peak_N1
        if self.inverse_N1 is not None:
            log_NV.mul_(self.inverse_N1)
        log_NV.sub_(norm_N1)
        if self.cut is None:
            return log_NV
        return log_NV.masked_fill_(logits_NV < self.cut.least_N1, -math.inf)

    def dense(self, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities of every token of chosen rows, by default of all; a copy."""
        if rows_E is not None:
            kept_NV = self._kept
            return self.rows(rows_E).dense() if kept_NV is None else kept_NV.index_select(0, rows_E)
        like = widen(self.logits_NV[:0])
        if self.inverse_N1 is None and self.cut is None:
            return self.logits_NV.softmax(dim=1, dtype=like.dtype)
        p_NV = torch.empty(self.logits_NV.shape, dtype=like.dtype, device=like.device)
        for some in tensor_ops.pieces(self.logits_NV):
            torch.softmax(self._scaled(some), dim=1, out=p_NV[some])
        return p_NV

    def peaks(self) -> Tensor:
        """Return the largest probability of each row."""
        if self._kept is None:
            return (-self._scale[1]).exp().squeeze(1)
        return self._kept.amax(dim=1)

    def favourites(self) -> Tensor:
        """Return the likeliest token of each row, the lowest of equals."""
        return tensor_ops.argmax(self.logits_NV)

    def entropies(self) -> Tensor:
        """Return the entropy of each row in nats."""
        parts = [self._entropies(some) for some in tensor_ops.pieces(self.logits_NV)]
        return torch.cat(parts).clamp_min_(0)

    def _entropies(self, some: slice) -> Tensor:
        """Return log Z - sum of p s of some rows, where p = exp(s) / Z and the largest s is 0."""
        p_NV = self.rows(some).dense() if self._kept is None else self._kept[some]
        logits_NV = widen(self.logits_NV[some])
        s_NV = logits_NV - logits_NV.amax(dim=1, keepdim=True)
        if self.inverse_N1 is not None:
            s_NV.mul_(self.inverse_N1[some])
        # An impossible token adds nothing, and its finite logarithm no NaN.
        mean_N = s_NV.clamp_min_(_LEAST_LOG).mul_(p_NV).sum(dim=1)
        return p_NV.amax(dim=1).log_().add_(mean_N).neg_()

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """Peak and norm, as a `Cut` has them."""
        if self.cut is not None:
            return self.cut.peak_N1, self.cut.norm_N1
        inverse_N1 = self.inverse_N1
        parts = [
            tensor_ops.peak_and_norm(
                widen(self.logits_NV[some]), None if inverse_N1 is None else inverse_N1[some]
            )
            for some in tensor_ops.pieces(self.logits_NV)
        ]
        return torch.cat([peak for peak, _ in parts]), torch.cat([norm for _, norm in parts])

    @cached_property
    def _kept(self) -> Tensor | None:
        """All probabilities, if they are computed at once."""
        return self.dense() if self.whole else None

    def _scaled(self, some: slice) -> Tensor:
        logits_NV = widen(self.logits_NV[some])
        scaled_NV = logits_NV - logits_NV.amax(dim=1, keepdim=True)
        if self.inverse_N1 is not None:
            scaled_NV.mul_(self.inverse_N1[some])
        if self.cut is not None:
            scaled_NV.masked_fill_(logits_NV < self.cut.least_N1[some], -math.inf)
        return scaled_NV


def _every(ids_EK: Tensor, rows_E: Tensor | None) -> Tensor:
    return torch.arange(len(ids_EK), device=ids_EK.device) if rows_E is None else rows_E


@dataclass(frozen=True, slots=True, kw_only=True)
class OneHotProbs:
    """Rows at temperature 0: all mass on the likeliest token."""

    best_N: Tensor
    vocab: int
    dtype: torch.dtype

    def at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities, 0 or 1, of the tokens `ids_EK` of chosen rows."""
        best_E = self.best_N if rows_E is None else self.best_N[rows_E]
        return (ids_EK == best_E[:, None]).to(self.dtype)

    def rows(self, rows_E: Tensor) -> OneHotProbs:
        """Return a selection of the rows."""
        return OneHotProbs(best_N=self.best_N[rows_E], vocab=self.vocab, dtype=self.dtype)

    def log_dense(self) -> Tensor:
        """Return the log-probabilities of every token, [N, V]: 0, or -inf where impossible."""
        return self.dense().log_()

    def dense(self, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities of every token of chosen rows, by default of all."""
        best_E = self.best_N if rows_E is None else self.best_N[rows_E]
        shape = (len(best_E), self.vocab)
        empty_EV = torch.zeros(shape, dtype=self.dtype, device=best_E.device)
        return empty_EV.scatter_(1, best_E[:, None], 1.0)

    def favourites(self) -> Tensor:
        """Return the only possible token of each row."""
        return self.best_N


Probs: TypeAlias = SoftmaxProbs | OneHotProbs


def process(
    logits_NV: Tensor, samplings_N: Sequence[SamplingParams], contexts_N: Sequence[Context]
) -> Probs:
    """Return the processed rows; either all samplings are greedy or none is.

    The order is that of `Sampling`. Top-k keeps every token that ties with the last kept. Top-p
    keeps the fewest tokens whose mass reaches it, relative to what top-k left, and what ties with
    the last.
    """
    distinct = _distinct(samplings_N)
    touched = any(s.logit_bias or s.counts_tokens for s in distinct)
    if touched:
        logits_NV = adjusted(logits_NV, samplings_N, contexts_N)
    like = widen(logits_NV[:0])
    if samplings_N and samplings_N[0].greedy:
        best_N, vocab = tensor_ops.argmax(logits_NV), logits_NV.shape[1]
        return OneHotProbs(best_N=best_N, vocab=vocab, dtype=like.dtype)
    inverse = [1.0 / max(s.temperature, _LEAST_TEMPERATURE) for s in samplings_N]
    inverse_N1 = like.new_tensor(inverse)[:, None]
    cuts = any(map(_truncates, distinct))
    return SoftmaxProbs(
        logits_NV=logits_NV,
        inverse_N1=inverse_N1 if any(s.temperature != 1 for s in distinct) else None,
        cut=_cut(logits_NV, inverse_N1, samplings_N) if cuts else None,
        whole=logits_NV.device.type == "cpu" and not (touched or cuts),
    )


def _distinct(samplings_N: Sequence[SamplingParams]) -> list[SamplingParams]:
    """Return each object once: the rows of a block share theirs."""
    return list({id(sampling): sampling for sampling in samplings_N}.values())


def _truncates(sampling: SamplingParams) -> bool:
    """Whether rows may lose tokens."""
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)


def _cut(
    logits_NV: Tensor, inverse_N1: Tensor, samplings_N: Sequence[SamplingParams]
) -> Truncation:
    """Return what top-k, top-p and min-p leave."""
    found = [
        _cut_at_once(widen(logits_NV[some]), inverse_N1[some], samplings_N[some])
        for some in tensor_ops.pieces(logits_NV)
    ]
    least, peaks, norms = zip(*found, strict=True)
    return Truncation(least_N1=torch.cat(least), peak_N1=torch.cat(peaks), norm_N1=torch.cat(norms))


def _cut_at_once(
    logits_NV: Tensor, inverse_N1: Tensor, samplings_N: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least logit kept, peak and norm of some rows, [N, 1] each."""
    peak_N1 = logits_NV.amax(dim=1, keepdim=True)
    scaled_NV = (logits_NV - peak_N1).mul_(inverse_N1)
    p_NV = torch.softmax(scaled_NV, dim=1, out=scaled_NV)
    least_N1, kept_N1 = truncate(logits_NV, p_NV, samplings_N)
    return least_N1, peak_N1, (kept_N1 / p_NV.amax(dim=1, keepdim=True)).log_()


def unscaled(logits_NV: Tensor) -> SoftmaxProbs:
    """Return the rows at temperature 1, untruncated, without penalties or bias: what gates read."""
    law = process(logits_NV, [_PLAIN] * logits_NV.shape[0], [])
    assert isinstance(law, SoftmaxProbs), "temperature 1 is not greedy"
    return law


def is_plain(sampling: SamplingParams) -> bool:
    """Whether the processed row is the unscaled row."""
    return sampling == _PLAIN
