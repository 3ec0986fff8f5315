"""Bias and penalties: what a request adds to the logits before anything else reads them.

The rows of a block are adjusted together, for they share all but a few drafted tokens. Every logit
is changed by one and the same sum, however long the block is, so that text does not depend on it.

Shapes: `N` rows, `R` rows of one block, `E` single logits of them, `K` tokens, `V` vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
import torch

from cascade.sampling.tensor_ops import widen

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor

    from cascade.types import SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The tokens before a row: what penalties count."""

    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    drafted: Sequence[int] = ()  # after the answer


def adjusted(
    logits_NV: Tensor, samplings_N: Sequence[SamplingParams], contexts_N: Sequence[Context]
) -> Tensor:
    """Return logits with bias and penalties, widened.

    Rows that follow one another with the very same sampling, prompt and answer are one block.
    """
    logits_NV = logits_NV.to(widen(logits_NV[:0]).dtype, copy=True)
    first = 0
    for _, rows in groupby(zip(samplings_N, contexts_N, strict=True), key=_block):
        samplings, contexts = zip(*rows, strict=True)
        block_RV = logits_NV[first : first + len(contexts)]
        _bias(block_RV, samplings[0])
        _repetition(block_RV, samplings[0], contexts)
        _counts(block_RV, samplings[0], contexts)
        first += len(contexts)
    return logits_NV


def _block(row: tuple[SamplingParams, Context]) -> tuple[int, int, int]:
    sampling, context = row
    return id(sampling), id(context.prompt), id(context.answer)


def _bias(logits_RV: Tensor, sampling: SamplingParams) -> None:
    """Add the logit bias in place; tokens outside the vocabulary have no logit to bias."""
    known = [(token, bias) for token, bias in sampling.logit_bias if token < logits_RV.shape[1]]
    ids_RK = _everywhere(logits_RV, [token for token, _ in known])
    bias_K = logits_RV.new_tensor([bias for _, bias in known])
    logits_RV.scatter_add_(1, ids_RK, bias_K.expand_as(ids_RK))


def _repetition(logits_RV: Tensor, sampling: SamplingParams, contexts: Sequence[Context]) -> None:
    """Divide logits of tokens that were seen, or multiply them if negative, in place."""
    factor = sampling.repetition_penalty
    if factor == 1:
        return
    seen = {*contexts[0].prompt, *contexts[0].answer}
    more = [(row, token) for row, one in enumerate(contexts) for token in {*one.drafted} - seen]
    ids_RK = _everywhere(logits_RV, seen)
    logits_RV.scatter_(1, ids_RK, _damped(logits_RV.gather(1, ids_RK), factor))
    places = _places(logits_RV, more)
    logits_RV[places] = _damped(logits_RV[places], factor)


def _counts(logits_RV: Tensor, sampling: SamplingParams, contexts: Sequence[Context]) -> None:
    """Subtract presence and frequency penalties in place: of tokens that were answered."""
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
    if not (presence or frequency):
        return
    counts = Counter(contexts[0].answer)
    more = {
        (row, token): counts[token] + times
        for row, one in enumerate(contexts)
        for token, times in Counter(one.drafted).items()
    }
    places = _places(logits_RV, more)
    times_E = logits_RV.new_tensor(list(more.values()))
    afterwards_E = logits_RV[places] - (presence + frequency * times_E)
    ids_RK = _everywhere(logits_RV, counts)
    times_K = logits_RV.new_tensor(list(counts.values()))
    logits_RV.scatter_add_(1, ids_RK, -(presence + frequency * times_K).expand_as(ids_RK))
    logits_RV[places] = afterwards_E


def _damped(values: Tensor, factor: float) -> Tensor:
    return torch.where(values > 0, values / factor, values * factor)


def _everywhere(like_RV: Tensor, tokens: Collection[int]) -> Tensor:
    """Return some tokens for each row, [R, K]."""
    ids_K = torch.from_numpy(np.fromiter(tokens, np.int64, len(tokens)))
    return ids_K.to(like_RV.device).expand(len(like_RV), -1)


def _places(like_RV: Tensor, places: Collection[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return rows and tokens of single logits, [E] each."""
    places_E2 = torch.tensor(list(places), dtype=torch.int64, device=like_RV.device).reshape(-1, 2)
    return places_E2[:, 0], places_E2[:, 1]
