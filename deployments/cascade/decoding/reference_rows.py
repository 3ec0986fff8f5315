"""The slow twin's mathematics: processed rows and the target of every rule, dense, in float64.

Written again from the definitions, one row at a time, to be compared with the fast path.

Shapes: `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.decoding.rules import (
    Bild,
    Chow,
    ChowLog,
    Diff,
    DiffLog,
    Ensemble,
    Fuzzy,
    Lossless,
    Lossy,
    Opt,
    OptLog,
    Rule,
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)
from cascade.decoding.session import Policy, RowFormat, Sampling

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The rows of one position, dense float64 [V]: processed and unscaled, of both models."""

    position: int
    q: Tensor
    p: Tensor
    q0: Tensor
    p0: Tensor


def processed(
    logits: Tensor, sampling: Sampling, prompt: Sequence[int], answer: Sequence[int]
) -> Tensor:
    """Return the processed row of logits."""
    logits = logits.clone()
    for token, bias in sampling.logit_bias:
        logits[token] += bias
    for token in {*prompt, *answer}:
        penalty = sampling.repetition_penalty
        logits[token] = logits[token] / penalty if logits[token] > 0 else logits[token] * penalty
    for token in set(answer):
        times = list(answer).count(token)
        logits[token] -= sampling.presence_penalty + sampling.frequency_penalty * times
    if sampling.greedy:
        return torch.zeros_like(logits).index_fill(0, logits.argmax(), 1.0)
    return _truncated((logits / sampling.temperature).softmax(0), sampling)


def _truncated(row: Tensor, sampling: Sampling) -> Tensor:
    """Return the row after top-k, top-p and min-p, each on what the one before left."""
    if 0 < sampling.top_k < len(row):
        row = row * (row >= row.sort(descending=True).values[sampling.top_k - 1])
    if sampling.top_p < 1:
        ordered = (row / row.sum()).sort(descending=True).values
        last = int((ordered.cumsum(0) < sampling.top_p).sum())
        row = row * (row / row.sum() >= ordered[last])
    row = row * (row >= sampling.min_p * row.max())
    return row / row.sum()


def shipped(q: Tensor, policy: Policy) -> Tensor:
    """Return the row as the wire carries it: its top in float16, renormalised."""
    weights = (q / q.max()).half().double()
    if policy.rows is not RowFormat.FULL and policy.row_entries < len(q):
        likely = q >= q.sort(descending=True).values[policy.row_entries - 1]
        weights = weights * (likely & (weights >= 2.0**-12))
    return weights / weights.sum()


def inverted(law: Tensor, coin: float) -> int:
    """Return the first token at which the cumulated law exceeds the coin."""
    cumulated = law.cumsum(0)
    return int((cumulated <= coin * cumulated[-1]).sum().clamp_max(len(law) - 1))


def target(rule: Rule, place: Place) -> tuple[Tensor, Tensor]:
    """Return pi = T(q, p) and which tokens are deferred, both [V]."""
    q, p, q0, p0 = place.q, place.p, place.q0, place.p0
    match rule:
        case Lossless():
            return p, q > p
        case Ensemble(weight=weight):
            return weight * p + (1 - weight) * q, q > p
        case Lossy(alpha=alpha, beta="one"):
            lenient, over = torch.minimum(q, p / (1 - alpha)), (p - q).clamp_min(0)
            share = (q - lenient).sum() / over.sum() if over.sum() > 0 else 0.0
            return lenient + share * over, q > lenient
        case Lossy(alpha=alpha):
            lenient = torch.minimum(q, p / (1 - alpha))
            return _mentored(lenient, p, high=1 / (1 - alpha)), q > lenient
        case TokenV1() | TokenV2() | TokenV3() | Typical():
            deferred = unacceptable(rule, q0, p0)
            return q * ~deferred + p * q[deferred].sum(), deferred
        case _:
            deferred = defers(rule, q, p, q0, p0)
            return (p if deferred else q), torch.full_like(q, deferred).bool()


def _mentored(lenient: Tensor, p: Tensor, *, high: float) -> Tensor:
    """Return max(lenient, p / beta) with the beta that makes it sum to one."""
    low = 0.0
    for _ in range(200):
        middle = (low + high) / 2
        if torch.maximum(lenient, middle * p).sum() < 1:
            low = middle
        else:
            high = middle
    return torch.maximum(lenient, high * p)


def unacceptable(rule: TokenV1 | TokenV2 | TokenV3 | Typical, q0: Tensor, p0: Tensor) -> Tensor:
    """Return r(v) of the token rules: which tokens are not acceptable."""
    match rule:
        case TokenV1(alpha=alpha):
            return q0 < p0.max() - alpha
        case TokenV2(alpha=alpha):
            return p0 < p0.max() - alpha
        case TokenV3(alpha=alpha):
            return p0 < (1 - alpha) * p0.max()
        case Typical(epsilon=epsilon, delta=delta):
            return p0 < min(epsilon, delta * math.exp(-entropy(p0)))


def defers(rule: Rule, q: Tensor, p: Tensor, q0: Tensor, p0: Tensor) -> bool:
    """Return r of the position rules: whether the expert writes here."""
    sure_q, sure_p, distance = float(q0.max()), float(p0.max()), float((p - q).clamp_min(0).sum())
    match rule:
        case Chow(alpha=alpha):
            deferred = sure_q < 1 - alpha
        case Diff(alpha=alpha):
            deferred = sure_q < sure_p - alpha
        case Opt(alpha=alpha):
            deferred = sure_q < sure_p - alpha * distance
        case ChowLog(alpha=alpha):
            deferred = entropy(q0) > alpha
        case DiffLog(alpha=alpha):
            deferred = entropy(q0) > entropy(p0) + alpha
        case OptLog(alpha=alpha):
            deferred = entropy(q0) > entropy(p0) + alpha * distance
        case Bild(alpha=alpha):
            deferred = float(-p0[q0.argmax()].log()) > alpha
        case Fuzzy(alpha=alpha):
            deferred = entropy((p + q) / 2) - (entropy(p) + entropy(q)) / 2 > alpha
        case _:
            raise TypeError(f"{rule.kind} does not decide by position")
    return deferred


def entropy(row: Tensor) -> float:
    """Return the entropy of a row in nats."""
    return float(torch.special.entr(row).sum())
