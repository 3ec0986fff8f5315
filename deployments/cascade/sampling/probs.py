"""From logits to probabilities: q and p that tokens follow, q0 and p0 that rules read.

A row is kept as logits and a normaliser, so that a few tokens of many rows cost a gather, and only
a row that is sampled from is computed in full. On a CPU passes over memory are what costs: there
all probabilities are computed in one pass and kept, unless penalties or truncation have copied the
rows already. Arithmetic is float32, or float64 for float64 logits.

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
from cascade.sampling.penalties import apply_penalties
from cascade.sampling.tensor_ops import upload, widen
from cascade.sampling.truncation import truncate
from cascade.types import SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.sampling.penalties import Context

# Lower temperatures differ from greedy in ties only; the inverse of this one is finite.
_MIN_TEMPERATURE = 1e-30
_MIN_LOG = -1e30
_UNSCALED = SamplingParams()


@dataclass(frozen=True, kw_only=True)
class SoftmaxProbs:
    """Rows softmax(logits / temperature) over the tokens that truncation keeps.

    What is costly and not always read is computed on first use.
    """

    logits_NV: Tensor  # any float type, widened where read
    inverse_N1: Tensor | None = None  # 1 / temperature; None: all are 1
    least_N1: Tensor | None = None  # least logit kept; None: nothing is truncated
    known_scale: tuple[Tensor, Tensor] | None = None  # see `_scale`; given where truncated
    eager: bool = False  # compute all probabilities at once and keep them

    def at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities of the tokens `ids_EK` of chosen rows, by default of all."""
        if self._cached is None:
            return self.log_at(ids_EK, rows_E=rows_E).exp()
        return self._cached[_rows_of(ids_EK, rows_E)[:, None], ids_EK]

    def log_at(self, ids_EK: Tensor, *, rows_E: Tensor | None = None) -> Tensor:
        """Return the log-probabilities of the tokens `ids_EK` of chosen rows."""
        rows_E = _rows_of(ids_EK, rows_E)
        return self._log_probs(widen(self.logits_NV[rows_E[:, None], ids_EK]), rows_E)

    def log_dense(self) -> Tensor:
        """Return the log-probabilities of every token, [N, V], -inf where impossible."""
        return self._log_probs(widen(self.logits_NV), slice(None))

    def dense(self, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities of every token of chosen rows, by default of all; a copy."""
        if rows_E is not None:
            cached_NV = self._cached
            if cached_NV is None:
                return self.select(rows_E).dense()
            return cached_NV.index_select(0, rows_E)
        like = widen(self.logits_NV[:0])
        if self.inverse_N1 is None and self.least_N1 is None:
            return self.logits_NV.softmax(dim=1, dtype=like.dtype)
        p_NV = torch.empty(self.logits_NV.shape, dtype=like.dtype, device=like.device)
        for rows in tensor_ops.row_chunks(self.logits_NV):
            torch.softmax(self._scaled(rows), dim=1, out=p_NV[rows])
        return p_NV

    def select(self, rows_E: Tensor | slice) -> SoftmaxProbs:
        """Return a selection of the rows."""
        inverse_N1, least_N1, scale = self.inverse_N1, self.least_N1, self.known_scale
        return SoftmaxProbs(
            logits_NV=self.logits_NV[rows_E],
            inverse_N1=None if inverse_N1 is None else inverse_N1[rows_E],
            least_N1=None if least_N1 is None else least_N1[rows_E],
            known_scale=None if scale is None else (scale[0][rows_E], scale[1][rows_E]),
        )

    def max_probs(self) -> Tensor:
        """Return the largest probability of each row."""
        if self._cached is None:
            return (-self._scale[1]).exp().squeeze(1)
        return self._cached.amax(dim=1)

    def argmax(self) -> Tensor:
        """Return the likeliest token of each row, the lowest id of equal ones."""
        return tensor_ops.argmax(self.logits_NV)

    def entropies(self) -> Tensor:
        """Return the entropy of each row in nats."""
        found = list[Tensor]()
        for rows in tensor_ops.row_chunks(self.logits_NV):
            p_NV = self.select(rows).dense() if self._cached is None else self._cached[rows]
            # log Z - sum of p s, where p = exp(s) / Z and the largest s is 0. An impossible token
            # adds nothing; a finite logarithm keeps its product from being NaN.
            mean_N = self._scaled(rows).clamp_min_(_MIN_LOG).mul_(p_NV).sum(dim=1)
            found.append(p_NV.amax(dim=1).log_().add_(mean_N).neg_())
        return torch.cat(found).clamp_min_(0)

    @cached_property
    def _scale(self) -> tuple[Tensor, Tensor]:
        """The peak, each row's largest logit, and log sum exp((logit - peak) / temperature)."""
        if self.known_scale is not None:
            return self.known_scale
        peaks, norms = list[Tensor](), list[Tensor]()
        for rows in tensor_ops.row_chunks(self.logits_NV):
            logits_NV = widen(self.logits_NV[rows])
            best_N1 = tensor_ops.argmax(logits_NV)[:, None]
            peaks.append(logits_NV.gather(1, best_N1))
            if self.inverse_N1 is not None:
                logits_NV = (logits_NV - peaks[-1]).mul_(self.inverse_N1[rows])
            # The likeliest token has probability 1 / sum, and softmax is one pass over memory.
            norms.append(logits_NV.softmax(dim=1).gather(1, best_N1).log_().neg_())
        return torch.cat(peaks), torch.cat(norms)

    @cached_property
    def _cached(self) -> Tensor | None:
        return self.dense() if self.eager else None

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

    def _scaled(self, rows: slice) -> Tensor:
        """Return (logit - largest) / temperature of some rows, -inf where impossible."""
        logits_NV = widen(self.logits_NV[rows])
        scaled_NV = logits_NV - logits_NV.amax(dim=1, keepdim=True)
        if self.inverse_N1 is not None:
            scaled_NV.mul_(self.inverse_N1[rows])
        if self.least_N1 is not None:
            scaled_NV.masked_fill_(logits_NV < self.least_N1[rows], -math.inf)
        return scaled_NV


def _rows_of(ids_EK: Tensor, rows_E: Tensor | None) -> Tensor:
    return torch.arange(len(ids_EK), device=ids_EK.device) if rows_E is None else rows_E


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

    def dense(self, rows_E: Tensor | None = None) -> Tensor:
        """Return the probabilities of every token of chosen rows, by default of all."""
        best_E = self.best_N if rows_E is None else self.best_N[rows_E]
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
    inverse = [1.0 / max(s.temperature, _MIN_TEMPERATURE) for s in samplings_N]
    inverse_N1 = upload(inverse, like.device, dtype=like.dtype)[:, None]
    truncates = any(s.top_k or s.top_p < 1 or s.min_p for s in distinct)
    found = _truncation(logits_NV, inverse_N1, samplings_N) if truncates else None
    return SoftmaxProbs(
        logits_NV=logits_NV,
        inverse_N1=inverse_N1 if any(s.temperature != 1 for s in distinct) else None,
        least_N1=found and found[0],
        known_scale=found and found[1:],
        eager=logits_NV.device.type == "cpu" and not (adjusts or truncates),
    )


def _truncation(
    logits_NV: Tensor, inverse_N1: Tensor, samplings_N: Sequence[SamplingParams]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the least logit kept, the largest, and the log-normaliser of each row, [N, 1] each."""
    found = list[tuple[Tensor, Tensor, Tensor]]()
    for rows in tensor_ops.row_chunks(logits_NV):
        chunk_NV = widen(logits_NV[rows])
        peak_N1 = chunk_NV.amax(dim=1, keepdim=True)
        scaled_NV = (chunk_NV - peak_N1).mul_(inverse_N1[rows])
        p_NV = torch.softmax(scaled_NV, dim=1, out=scaled_NV)
        least_N1, kept_N1 = truncate(chunk_NV, p_NV, samplings_N[rows])
        found.append((least_N1, peak_N1, (kept_N1 / p_NV.amax(dim=1, keepdim=True)).log_()))
    least, peaks, norms = zip(*found, strict=True)
    return torch.cat(least), torch.cat(peaks), torch.cat(norms)


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
    return SoftmaxProbs(logits_NV=logits_NV, eager=logits_NV.device.type == "cpu")
