"""What a rule reads and decides at judged positions.

Over a large vocabulary q may be known on so many tokens that positions are read one by one: a few
numbers of each are kept, and a position whose distribution is sampled from is read again.

Shapes: `M` judged positions, `E` chosen ones, `K` tokens of the drafter's support, `N` rows of
logits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cascade.rules import (
    Bild,
    Diff,
    DiffLog,
    Opt,
    OptLog,
    Rule,
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)
from cascade.sampling.probs import OneHotProbs, Probs, SoftmaxProbs
from cascade.sampling.sparse_probs import Support, received
from cascade.sampling.tensor_ops import widen
from cascade.speculation.target_distribution import (
    RuleInputs,
    TargetDistribution,
    target_distribution,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.types import DraftStats, SparseProbs

_BY_TOKEN = TokenV1 | TokenV2 | TokenV3 | Typical


def reads_p0_max(rule: Rule) -> bool:
    """Return whether a rule reads max p0."""
    return isinstance(rule, _BY_TOKEN | Diff | Opt)


def reads_p0_entropy(rule: Rule) -> bool:
    """Return whether a rule reads H(p0)."""
    return isinstance(rule, DiffLog | OptLog | Typical)


class AtTokens(NamedTuple):
    """What is known of the drafted tokens; 0 where q does not know the token."""

    q_M: Tensor
    p_M: Tensor
    pi_M: Tensor
    known_M: Tensor  # bool: q of the token is known and not 0
    deferred_M: Tensor  # bool: the rule defers there, and q knows the token
    divergence_M: Tensor  # float64, the total variation between pi and p


class Target(NamedTuple):
    """The target distribution at chosen positions, and q."""

    ids_EK: Tensor | None  # the support; None: the vocabulary
    valid_EK: Tensor | None  # bool, False on its padding; None: there is none
    q_EK: Tensor
    pi_EK: Tensor
    tail_E: Tensor  # pi / p off the support
    outside_E: Tensor  # p off the support

    def select(self, positions: Sequence[int]) -> Target:
        """Return a selection of the positions."""
        index_E = torch.tensor(positions, dtype=torch.int64, device=self.q_EK.device)
        return Target(*(None if one is None else one[index_E] for one in self))  # pyright: ignore[reportArgumentType] - None where it was


@dataclass(frozen=True, kw_only=True)
class JudgedPositions:
    """M judged positions. What is costly is computed on first use."""

    rule: Rule
    rows: Sequence[int]  # of logits
    tokens: Sequence[int]  # drafted; -1 stands for none
    payload: Sequence[SparseProbs | None]  # what was sent of q
    likelihoods: Sequence[float]  # q of the drafted tokens
    unscaled: Sequence[float]  # q0 of the drafted tokens, -inf where unknown
    stats: Sequence[DraftStats | None]
    p: Probs  # N rows, as all below
    p0: SoftmaxProbs
    p0_max_N: Tensor | None
    p0_entropy_N: Tensor | None

    def subset(self, positions: Sequence[int]) -> JudgedPositions:
        """Return some of the positions, to be read anew."""
        return replace(
            self,
            rows=[self.rows[m] for m in positions],
            tokens=[self.tokens[m] for m in positions],
            payload=[self.payload[m] for m in positions],
            likelihoods=[self.likelihoods[m] for m in positions],
            unscaled=[self.unscaled[m] for m in positions],
            stats=[self.stats[m] for m in positions],
        )

    def at_tokens(self) -> AtTokens:
        """Return what is known of the drafted tokens under the rule."""
        known_M, pi = self._support.has_token_N, self._pi
        deferred_M = torch.zeros_like(known_M)
        if pi.deferred_NK is not None:
            index_N1 = self._support.index_N1
            is_whole = pi.deferred_NK.shape[1] == 1
            deferred_N1 = pi.deferred_NK if is_whole else pi.deferred_NK.gather(1, index_N1)
            deferred_M = deferred_N1.squeeze(1) & known_M
        return AtTokens(
            q_M=self._at_token(self.inputs.q_NK),
            p_M=self._at_token(self.inputs.p_NK),
            pi_M=self._at_token(pi.on_NK),
            known_M=known_M,
            deferred_M=deferred_M,
            divergence_M=pi.distance(self.inputs.p_NK).double(),
        )

    def target(self, within_M: Tensor | None) -> Target:
        """Return the target distribution: the rule's, or p where the divergence budget is spent.

        Args:
            within_M: Whether the budget is not; None: there is none.
        """
        p_NK, pi_NK, tail_N = self.inputs.p_NK, self._pi.on_NK, self._pi.tail_N
        if within_M is not None:
            pi_NK = torch.where(within_M[:, None], pi_NK, p_NK)
            tail_N = torch.where(within_M, tail_N, 1.0)
        return Target(
            ids_EK=self._support.ids_NK,
            valid_EK=self._support.valid_NK,
            q_EK=self.inputs.q_NK,
            pi_EK=pi_NK,
            tail_E=tail_N,
            outside_E=self.inputs.p_off_support(),
        )

    @cached_property
    def inputs(self) -> RuleInputs:
        """What the rule reads of both models."""
        rule, support = self.rule, self._support
        p_NK = self._on_support(self.p)
        return RuleInputs(
            q_NK=support.q_NK,
            p_NK=p_NK if support.valid_NK is None else p_NK * support.valid_NK,
            draft_stats_N=self.stats,
            q0_NK=support.q0_NK,
            p0_NK=self._on_support(self.p0) if isinstance(rule, _BY_TOKEN) else None,
            p0_max_N=None if self.p0_max_N is None else self.p0_max_N[self._row_index],
            p0_entropy_N=None if self.p0_entropy_N is None else self.p0_entropy_N[self._row_index],
            p0_at_argmax_N=self._p0_at_argmax() if isinstance(rule, Bild) else None,
        )

    @cached_property
    def _pi(self) -> TargetDistribution:
        return target_distribution(self.rule, self.inputs)

    @cached_property
    def _support(self) -> Support:
        """The drafter's probabilities; one-hots at the tokens where ids alone are sent."""
        logits_NV = self.p0.logits_NV
        return received(
            self.payload,
            self.tokens,
            self.likelihoods,
            self.unscaled if isinstance(self.rule, TokenV1) else None,
            vocab=logits_NV.shape[1],
            like=widen(logits_NV[:0]),
        )

    @cached_property
    def _row_index(self) -> Tensor:
        return torch.tensor(self.rows, dtype=torch.int64, device=self.p0.logits_NV.device)

    def _on_support(self, probs: Probs) -> Tensor:
        """Return the probabilities of the support's tokens, [M, K]."""
        ids_NK = self._support.ids_NK
        if ids_NK is None:
            return probs.dense(self.rows)
        if len(self.rows) == 1 and not isinstance(probs, OneHotProbs):
            return probs.select(slice(self.rows[0], self.rows[0] + 1)).at(ids_NK)
        return probs.at(ids_NK, rows_E=self._row_index)

    def _at_token(self, values_MK: Tensor) -> Tensor:
        """Return the value at each drafted token, 0 where the support lacks it, [M]."""
        found_M = values_MK.gather(1, self._support.index_N1).squeeze(1)
        return torch.where(self._support.has_token_N, found_M, 0)

    def _p0_at_argmax(self) -> Tensor:
        """Return p0 of argmax q0; without draft statistics the drafted token stands for it."""
        pairs = zip(self.stats, self.tokens, strict=True)
        ids = [one.argmax if one else max(token, 0) for one, token in pairs]
        ids_M1 = torch.tensor(ids, dtype=torch.int64, device=self._row_index.device)[:, None]
        return self.p0.at(ids_M1, rows_E=self._row_index).squeeze(1)
