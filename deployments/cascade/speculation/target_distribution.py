"""The target distribution pi = T(q, p) of every rule.

The support is the set of tokens on which the drafter's probabilities q are known. Off the support q
is 0 and every rule's pi is a multiple of the expert's p: pi(v) = tail * p(v). So pi on the support
and one factor describe a row completely, whether the support is the top of a sparse row or the
whole vocabulary.

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
    from collections.abc import Sequence

    from cascade.types import DraftStats

# Halvings of the bracket of 1 / beta: beyond float64's 53 bits nothing changes.
_HALVINGS = 60


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleInputs:
    """What rules read of both models; what the rule at hand does not read may be None.

    The padding of the support has q = p = 0.
    """

    q_NK: Tensor  # processed, sums to 1 on the support
    p_NK: Tensor  # processed
    draft_stats_N: Sequence[DraftStats | None] = ()  # None: the drafter sent none
    q0_NK: Tensor | None = None  # unscaled
    p0_NK: Tensor | None = None  # unscaled
    p0_max_N: Tensor | None = None  # max p0
    p0_entropy_N: Tensor | None = None  # H(p0) in nats
    p0_at_argmax_N: Tensor | None = None  # p0(argmax q0)

    def p_off_support(self) -> Tensor:
        """Return the expert's total probability off the support, [N]."""
        return (1 - self.p_NK.sum(dim=1)).clamp_min(0)

    def tv_distance(self) -> Tensor:
        """Return D_TV(p, q) = sum (q - p)+, [N]; off the support q is 0."""
        return (self.q_NK - self.p_NK).clamp_min_(0).sum(dim=1)

    def q0_max(self) -> Tensor:
        """Return max q0, [N], -inf where unknown."""
        return self.p_NK.new_tensor([s.max_prob if s else -math.inf for s in self.draft_stats_N])

    def q0_entropy(self) -> Tensor:
        """Return H(q0) in nats, [N], inf where unknown."""
        return self.p_NK.new_tensor([s.entropy if s else math.inf for s in self.draft_stats_N])


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetDistribution:
    """The target distribution pi of N rows, and what the rule decided."""

    on_NK: Tensor  # pi on the support
    tail_N: Tensor  # pi / p off the support
    deferred_NK: Tensor | None = None  # [N, 1] for position rules; None: the rule does not defer

    def distance(self, p_NK: Tensor) -> Tensor:
        """Return D_TV(pi, p) = sum (pi - p)+, [N]; off the support no rule's pi exceeds p."""
        if self.on_NK is p_NK:
            return torch.zeros_like(self.tail_N)
        return (self.on_NK - p_NK).clamp_min_(0).sum(dim=1)


def target_distribution(rule: Rule, inputs: RuleInputs) -> TargetDistribution:
    """Return the target distribution that the rule implies.

    Example: q = [.5, .3, .15, .05] and p = [.2, .45, .3, .05], both unscaled, under
    `TokenV3(alpha=.4)` give pi = [.11, .5475, .315, .0275].
    """
    q_NK, p_NK = inputs.q_NK, inputs.p_NK
    match rule:
        case Lossless():
            return TargetDistribution(on_NK=p_NK, tail_N=torch.ones_like(p_NK[:, 0]))
        case Ensemble(weight=weight):
            on_NK = weight * p_NK + (1 - weight) * q_NK
            return TargetDistribution(on_NK=on_NK, tail_N=torch.full_like(on_NK[:, 0], weight))
        case Lossy(alpha=alpha, beta="one"):
            return _lossy_one(alpha, inputs)
        case Lossy(alpha=alpha):
            return _lossy_solved(alpha, inputs)
        case TokenV1() | TokenV2() | TokenV3() | Typical():
            # pi = q (1 - r) + p eta (Eq. 11), with eta on the whole vocabulary.
            deferred_NK = token_defers(rule, inputs)
            eta_N = (q_NK * deferred_NK).sum(dim=1)
            on_NK = q_NK * ~deferred_NK + p_NK * eta_N[:, None]
            return TargetDistribution(on_NK=on_NK, tail_N=eta_N, deferred_NK=deferred_NK)
        case _:
            # pi = q where the position is kept, and p where it is deferred.
            deferred_N1 = position_defers(rule, inputs)[:, None]
            on_NK = _choose(deferred_N1, p_NK, q_NK)
            tail_N = deferred_N1.squeeze(1).to(on_NK.dtype)
            return TargetDistribution(on_NK=on_NK, tail_N=tail_N, deferred_NK=deferred_N1)


def _choose(chosen_N1: Tensor, first_NK: Tensor, second_NK: Tensor) -> Tensor:
    """Return rows of the first where chosen, else of the second; a row of a CPU is not copied."""
    if len(chosen_N1) == 1 and chosen_N1.device.type == "cpu":
        return first_NK if chosen_N1[0, 0] else second_NK
    return torch.where(chosen_N1, first_NK, second_NK)


def token_defers(rule: TokenRule, inputs: RuleInputs) -> Tensor:
    """Return which tokens of the support are not acceptable, bool [N, K]."""
    p0_NK, max_N1 = _known(inputs.p0_NK), _known(inputs.p0_max_N)[:, None]
    match rule:
        case TokenV1(alpha=alpha):
            return _known(inputs.q0_NK) < max_N1 - alpha
        case TokenV2(alpha=alpha):
            return p0_NK < max_N1 - alpha
        case TokenV3(alpha=alpha):
            return p0_NK < (1 - alpha) * max_N1
        case Typical(epsilon=epsilon, delta=delta):
            floor_N = (delta * (-_known(inputs.p0_entropy_N)).exp()).clamp_max(epsilon)
            return p0_NK < floor_N[:, None]
        case _:
            assert_never(rule)


def position_defers(rule: PositionRule, inputs: RuleInputs) -> Tensor:
    """Return which rows are deferred, bool [N].

    A row without draft statistics is deferred by the rules that read them: a draft that is not the
    drafter's, such as a client's prediction, has no confidence that could keep it.
    """
    match rule:
        case Chow() | ChowLog():
            decisions = [stats is None or defers(rule, stats) for stats in inputs.draft_stats_N]
            deferred_N = torch.tensor(decisions, dtype=torch.bool, device=inputs.p_NK.device)
        case Diff(alpha=alpha):
            deferred_N = inputs.q0_max() < _known(inputs.p0_max_N) - alpha
        case Opt(alpha=alpha):
            slack_N = alpha * inputs.tv_distance()
            deferred_N = inputs.q0_max() < _known(inputs.p0_max_N) - slack_N
        case DiffLog(alpha=alpha):
            deferred_N = inputs.q0_entropy() > _known(inputs.p0_entropy_N) + alpha
        case OptLog(alpha=alpha):
            slack_N = alpha * inputs.tv_distance()
            deferred_N = inputs.q0_entropy() > _known(inputs.p0_entropy_N) + slack_N
        case Bild(alpha=alpha):
            deferred_N = -_known(inputs.p0_at_argmax_N).log() > alpha
        case Fuzzy(alpha=alpha):
            deferred_N = jensen_shannon(inputs) > alpha
        case _:
            assert_never(rule)
    return deferred_N


def defers(rule: Chow | ChowLog, stats: DraftStats) -> bool:
    """Return whether a rule that reads the drafter alone defers. Both tiers call this."""
    match rule:
        case Chow(alpha=alpha):
            return stats.max_prob < 1 - alpha
        case ChowLog(alpha=alpha):
            return stats.entropy > alpha
        case _:
            assert_never(rule)


def jensen_shannon(inputs: RuleInputs) -> Tensor:
    """Return the Jensen-Shannon divergence of p and q in nats, p off the support included, [N]."""
    q_NK, p_NK, entropy = inputs.q_NK, inputs.p_NK, torch.special.entr
    # JS = H(m) - (H(q) + H(p)) / 2; off the support m = p / 2, whose terms add up to p log 2 / 2.
    gap_NK = entropy((q_NK + p_NK) / 2) - (entropy(q_NK) + entropy(p_NK)) / 2
    return (gap_NK.sum(dim=1) + inputs.p_off_support() * (math.log(2) / 2)).clamp_min(0)


def _lossy_one(alpha: float, inputs: RuleInputs) -> TargetDistribution:
    """Return pi = min(q, p / (1 - alpha)) + R norm((p - q)+)."""
    q_NK, p_NK = inputs.q_NK, inputs.p_NK
    lenient_NK = torch.minimum(q_NK, p_NK / (1 - alpha))
    rejected_N = (q_NK - lenient_NK).sum(dim=1)
    distance_N = inputs.tv_distance()
    tail_N = torch.where(distance_N > 0, rejected_N / distance_N, torch.zeros_like(distance_N))
    on_NK = lenient_NK + tail_N[:, None] * (p_NK - q_NK).clamp_min(0)
    return TargetDistribution(on_NK=on_NK, tail_N=tail_N)


def _lossy_solved(alpha: float, inputs: RuleInputs) -> TargetDistribution:
    """Return pi = max(min(q, p / (1 - alpha)), p / beta) with the beta that makes it sum to 1."""
    p_NK, outside_N = inputs.p_NK, inputs.p_off_support()
    lenient_NK = torch.minimum(inputs.q_NK, p_NK / (1 - alpha))
    low_N, high_N = torch.zeros_like(outside_N), torch.full_like(outside_N, 1 / (1 - alpha))
    for _ in range(_HALVINGS):
        tail_N = (low_N + high_N) / 2
        mass_N = torch.maximum(lenient_NK, tail_N[:, None] * p_NK).sum(dim=1) + tail_N * outside_N
        low_N = torch.where(mass_N < 1, tail_N, low_N)
        high_N = torch.where(mass_N < 1, high_N, tail_N)
    return TargetDistribution(
        on_NK=torch.maximum(lenient_NK, high_N[:, None] * p_NK), tail_N=high_N
    )


def _known(tensor: Tensor | None) -> Tensor:
    assert tensor is not None, "the rule reads an input that is missing"
    return tensor
