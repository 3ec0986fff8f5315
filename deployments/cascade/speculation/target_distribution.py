"""The target law pi = T(q, p) of every rule, on few tokens.

Off the support S of the drafter's row, where q is 0, every rule's law is a multiple of the
expert's: pi(v) = tail * p(v). So pi on S and one number a row are all of it, whether S is the top
of a sparse row or the whole vocabulary.

Shapes: `N` rows, `K` tokens of the support.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

import torch
from torch import Tensor

from cascade.rules import (
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
    PositionRule,
    Rule,
    TokenRule,
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)

if TYPE_CHECKING:
    from cascade.types import DraftStats

# Halvings of the bracket of 1 / beta: beyond float64's 53 bits nothing moves.
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleInputs:
    """What rules read of both models' rows; what the rule at hand does not read may be None.

    Padding of the support has q = p = 0.
    """

    q_NK: Tensor  # processed, sums to 1 on the support
    p_NK: Tensor  # processed
    draft_stats_N: tuple[
        DraftStats | None, ...
    ] = ()  # of the unscaled q0; None: the drafter gave none
    q0_NK: Tensor | None = None  # unscaled
    p0_NK: Tensor | None = None  # unscaled
    p0_peak_N: Tensor | None = None  # max p0
    p0_entropy_N: Tensor | None = None  # H(p0) in nats
    p0_favourite_N: Tensor | None = None  # p0(argmax q0)

    def outside(self) -> Tensor:
        """Return the expert's mass off the support."""
        return (1 - self.p_NK.sum(dim=1)).clamp_min(0)

    def distance(self) -> Tensor:
        """Return D_TV(p, q) = sum (q - p)+; off the support q is 0."""
        return (self.q_NK - self.p_NK).clamp_min(0).sum(dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetDistribution:
    """The law pi of N rows, and what the rule decided."""

    on_NK: Tensor  # pi on the support
    tail_N: Tensor  # pi / p off the support
    deferred_NK: Tensor | None  # [N, K], or [N, 1] for a position rule; None: not a matter of rule


def target_distribution(rule: Rule, evidence: RuleInputs) -> TargetDistribution:
    """Return the law that the rule implies.

    Example: q = [.5, .3, .15, .05] and p = [.2, .45, .3, .05], both unscaled, under
    `TokenV3(alpha=.4)` give pi = [.11, .5475, .315, .0275].
    """
    match rule:
        case Lossless():
            on_NK, tail_N = evidence.p_NK, torch.ones_like(evidence.p_NK[:, 0])
            return TargetDistribution(on_NK=on_NK, tail_N=tail_N, deferred_NK=None)
        case Ensemble(weight=weight):
            on_NK = weight * evidence.p_NK + (1 - weight) * evidence.q_NK
            tail_N = torch.full_like(on_NK[:, 0], weight)
            return TargetDistribution(on_NK=on_NK, tail_N=tail_N, deferred_NK=None)
        case Lossy(alpha=alpha, beta="one"):
            return _lossy_one(alpha, evidence)
        case Lossy(alpha=alpha):
            return _lossy_solved(alpha, evidence)
        case TokenV1() | TokenV2() | TokenV3() | Typical():
            return _by_token(token_defers(rule, evidence), evidence)
        case _:
            return _by_position(position_defers(rule, evidence), evidence)


def token_defers(rule: TokenRule, evidence: RuleInputs) -> Tensor:
    """Return which tokens of the support are not acceptable, bool [N, K]."""
    assert evidence.p0_NK is not None, "token rules read p0"
    assert evidence.p0_peak_N is not None, "token rules read max p0"
    p0_NK, peak_N1 = evidence.p0_NK, evidence.p0_peak_N[:, None]
    match rule:
        case TokenV1(alpha=alpha):
            assert evidence.q0_NK is not None, "token_v1 reads q0"
            return evidence.q0_NK < peak_N1 - alpha
        case TokenV2(alpha=alpha):
            return p0_NK < peak_N1 - alpha
        case TokenV3(alpha=alpha):
            return p0_NK < (1 - alpha) * peak_N1
        case Typical(epsilon=epsilon, delta=delta):
            assert evidence.p0_entropy_N is not None, "typical reads H(p0)"
            floor_N = (delta * (-evidence.p0_entropy_N).exp()).clamp_max(epsilon)
            return p0_NK < floor_N[:, None]
        case _:
            assert_never(rule)


def position_defers(rule: PositionRule, evidence: RuleInputs) -> Tensor:
    """Return which rows are deferred, bool [N].

    Rows without gates defer under rules that read them: a draft that came without the drafter's
    law, as a client's prediction does, has no confidence to be kept for.
    """
    match rule:
        case Chow() | ChowLog():
            decisions = [gates is None or defers(rule, gates) for gates in evidence.draft_stats_N]
            deferred_N = torch.tensor(decisions, dtype=torch.bool, device=evidence.p_NK.device)
        case Diff(alpha=alpha):
            deferred_N = _peaks(evidence) < _known(evidence.p0_peak_N) - alpha
        case Opt(alpha=alpha):
            slack_N = alpha * evidence.distance()
            deferred_N = _peaks(evidence) < _known(evidence.p0_peak_N) - slack_N
        case DiffLog(alpha=alpha):
            deferred_N = _entropies(evidence) > _known(evidence.p0_entropy_N) + alpha
        case OptLog(alpha=alpha):
            slack_N = alpha * evidence.distance()
            deferred_N = _entropies(evidence) > _known(evidence.p0_entropy_N) + slack_N
        case Bild(alpha=alpha):
            deferred_N = -_known(evidence.p0_favourite_N).log() > alpha
        case Fuzzy(alpha=alpha):
            deferred_N = jensen_shannon(evidence) > alpha
        case _:
            assert_never(rule)
    return deferred_N


def defers(rule: Chow | ChowLog, gates: DraftStats) -> bool:
    """Return whether a rule that reads the drafter alone defers; both tiers ask here."""
    match rule:
        case Chow(alpha=alpha):
            return gates.peak < 1 - alpha
        case ChowLog(alpha=alpha):
            return gates.entropy > alpha
        case _:
            assert_never(rule)


def jensen_shannon(evidence: RuleInputs) -> Tensor:
    """Return the Jensen-Shannon divergence of p and q in nats, p off the support included, [N]."""
    q_NK, p_NK = evidence.q_NK, evidence.p_NK
    entropy = torch.special.entr
    # JS = H(m) - (H(q) + H(p)) / 2; off the support m = p / 2, where the terms leave p log 2 / 2.
    gap_NK = entropy((q_NK + p_NK) / 2) - (entropy(q_NK) + entropy(p_NK)) / 2
    return (gap_NK.sum(dim=1) + evidence.outside() * (math.log(2) / 2)).clamp_min(0)


def _by_position(deferred_N: Tensor, evidence: RuleInputs) -> TargetDistribution:
    """Return pi = q where the position is kept and p where it is deferred."""
    deferred_N1 = deferred_N[:, None]
    on_NK = torch.where(deferred_N1, evidence.p_NK, evidence.q_NK)
    return TargetDistribution(
        on_NK=on_NK, tail_N=deferred_N.to(on_NK.dtype), deferred_NK=deferred_N1
    )


def _by_token(deferred_NK: Tensor, evidence: RuleInputs) -> TargetDistribution:
    """Return pi = q (1 - r) + p eta (Eq. 11); eta goes to p over the whole vocabulary."""
    eta_N = (evidence.q_NK * deferred_NK).sum(dim=1)
    kept_NK = evidence.q_NK * ~deferred_NK
    on_NK = kept_NK + evidence.p_NK * eta_N[:, None]
    return TargetDistribution(on_NK=on_NK, tail_N=eta_N, deferred_NK=deferred_NK)


def _lossy_one(alpha: float, evidence: RuleInputs) -> TargetDistribution:
    """Return pi = min(q, p / (1 - alpha)) + R norm((p - q)+)."""
    q_NK, p_NK = evidence.q_NK, evidence.p_NK
    lenient_NK = torch.minimum(q_NK, p_NK / (1 - alpha))
    refused_N = (q_NK - lenient_NK).sum(dim=1)
    distance_N = evidence.distance()
    tail_N = torch.where(distance_N > 0, refused_N / distance_N, torch.zeros_like(distance_N))
    on_NK = lenient_NK + tail_N[:, None] * (p_NK - q_NK).clamp_min(0)
    return TargetDistribution(on_NK=on_NK, tail_N=tail_N, deferred_NK=None)


def _lossy_solved(alpha: float, evidence: RuleInputs) -> TargetDistribution:
    """Return pi = max(min(q, p / (1 - alpha)), p / beta) with the beta that makes it sum to 1."""
    p_NK, outside_N = evidence.p_NK, evidence.outside()
    lenient_NK = torch.minimum(evidence.q_NK, p_NK / (1 - alpha))
    low_N, high_N = torch.zeros_like(outside_N), torch.full_like(outside_N, 1 / (1 - alpha))
    for _ in range(_HALVINGS):
        tail_N = (low_N + high_N) / 2
        mass_N = torch.maximum(lenient_NK, tail_N[:, None] * p_NK).sum(dim=1) + tail_N * outside_N
        low_N = torch.where(mass_N < 1, tail_N, low_N)
        high_N = torch.where(mass_N < 1, high_N, tail_N)
    on_NK = torch.maximum(lenient_NK, high_N[:, None] * p_NK)
    return TargetDistribution(on_NK=on_NK, tail_N=high_N, deferred_NK=None)


def _known(tensor: Tensor | None) -> Tensor:
    """Return what the rule reads."""
    assert tensor is not None, "the rule reads what the evidence lacks"
    return tensor


def _peaks(evidence: RuleInputs) -> Tensor:
    """Return max q0 of each row, -inf where unknown."""
    peaks = [-math.inf if gates is None else gates.peak for gates in evidence.draft_stats_N]
    return evidence.p_NK.new_tensor(peaks)


def _entropies(evidence: RuleInputs) -> Tensor:
    """Return H(q0) of each row, inf where unknown."""
    entropies = [math.inf if gates is None else gates.entropy for gates in evidence.draft_stats_N]
    return evidence.p_NK.new_tensor(entropies)
