"""Logit bias and the repetition, presence and frequency penalties.

The rows of one block are adjusted together, because their contexts differ in a few drafted tokens
only. Each logit goes through the same arithmetic whatever the block length, so that greedy text
does not depend on it.

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
    """The tokens before a row, which penalties count."""

    prompt: Sequence[int] = ()
    answer: Sequence[int] = ()
    drafted: Sequence[int] = ()  # after the answer


def apply_penalties(
    logits_NV: Tensor, samplings_N: Sequence[SamplingParams], contexts_N: Sequence[Context]
) -> Tensor:
    """Return a widened copy of the logits with bias and penalties.

    Args:
        logits_NV: Any float type.
        samplings_N: Sampling parameters of each row.
        contexts_N: Context of each row. Neighbouring rows whose sampling parameters, prompt and
            answer are the same objects are processed as one block.
    """
    logits_NV = logits_NV.to(widen(logits_NV[:0]).dtype, copy=True)
    first = 0
    for _, rows in groupby(zip(samplings_N, contexts_N, strict=True), key=_block_key):
        samplings, contexts = zip(*rows, strict=True)
        block_RV = logits_NV[first : first + len(contexts)]
        _add_bias(block_RV, samplings[0])
        _penalise_repetition(block_RV, samplings[0], contexts)
        _penalise_counts(block_RV, samplings[0], contexts)
        first += len(contexts)
    return logits_NV


def _block_key(row: tuple[SamplingParams, Context]) -> tuple[int, int, int]:
    sampling, context = row
    return id(sampling), id(context.prompt), id(context.answer)


def _add_bias(logits_RV: Tensor, sampling: SamplingParams) -> None:
    """Add the logit bias in place; ids beyond the vocabulary are ignored."""
    known = [(token, bias) for token, bias in sampling.logit_bias if token < logits_RV.shape[1]]
    ids_RK = _in_every_row(logits_RV, [token for token, _ in known])
    bias_K = logits_RV.new_tensor([bias for _, bias in known])
    logits_RV.scatter_add_(1, ids_RK, bias_K.expand_as(ids_RK))


def _penalise_repetition(
    logits_RV: Tensor, sampling: SamplingParams, contexts: Sequence[Context]
) -> None:
    """Divide the logits of tokens seen before, or multiply them if negative, in place."""
    factor = sampling.repetition_penalty
    if factor == 1:
        return
    seen = {*contexts[0].prompt, *contexts[0].answer}
    more = [(row, token) for row, one in enumerate(contexts) for token in {*one.drafted} - seen]
    ids_RK = _in_every_row(logits_RV, seen)
    logits_RV.scatter_(1, ids_RK, _damped(logits_RV.gather(1, ids_RK), factor))
    index = _index(logits_RV, more)
    logits_RV[index] = _damped(logits_RV[index], factor)


def _penalise_counts(
    logits_RV: Tensor, sampling: SamplingParams, contexts: Sequence[Context]
) -> None:
    """Subtract presence and frequency penalties of the answer's tokens in place."""
    presence, frequency = sampling.presence_penalty, sampling.frequency_penalty
    if not (presence or frequency):
        return
    counts = Counter(contexts[0].answer)
    more = {
        (row, token): counts[token] + times
        for row, one in enumerate(contexts)
        for token, times in Counter(one.drafted).items()
    }
    index = _index(logits_RV, more)
    times_E = logits_RV.new_tensor(list(more.values()))
    penalised_E = logits_RV[index] - (presence + frequency * times_E)
    ids_RK = _in_every_row(logits_RV, counts)
    times_K = logits_RV.new_tensor(list(counts.values()))
    logits_RV.scatter_add_(1, ids_RK, -(presence + frequency * times_K).expand_as(ids_RK))
    logits_RV[index] = penalised_E


def _damped(values: Tensor, factor: float) -> Tensor:
    return torch.where(values > 0, values / factor, values * factor)


def _in_every_row(like_RV: Tensor, tokens: Collection[int]) -> Tensor:
    """Return the same token ids for every row, [R, K]."""
    ids_K = torch.from_numpy(np.fromiter(tokens, np.int64, len(tokens)))
    return ids_K.to(like_RV.device).expand(len(like_RV), -1)


def _index(like_RV: Tensor, entries: Collection[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Return the rows and the tokens of single logits, [E] each."""
    index_E2 = torch.tensor(list(entries), dtype=torch.int64, device=like_RV.device).reshape(-1, 2)
    return index_E2[:, 0], index_E2[:, 1]
