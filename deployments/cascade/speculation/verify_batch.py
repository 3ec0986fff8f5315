"""Blocks of one kind laid out flat: which row of logits speaks of which drafted token.

Shapes: `N` rows of logits, `M` judged rows, `K` tokens of the drafter's support, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from cascade.rules import Bild, Diff, DiffLog, Opt, OptLog, TokenV1, TokenV2, TokenV3, Typical
from cascade.sampling.penalties import Context
from cascade.sampling.probs import Probs, SoftmaxProbs, is_plain, process, unscaled
from cascade.sampling.sparse_probs import Support, received, size
from cascade.sampling.tensor_ops import widen
from cascade.speculation.payload import sends_ids_only, wants_target
from cascade.speculation.target_distribution import (
    RuleInputs,
    TargetDistribution,
    target_distribution,
)
from cascade.types import Block, Bonus, DecodingParams, DraftStats, SamplingParams, SparseProbs

if TYPE_CHECKING:
    from collections.abc import Sequence

_Value = TypeVar("_Value")

# No token: the row after a block, where bonus `target` needs pi and nothing was drafted.
NOTHING = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTask:
    """One block to judge at a position; an empty block asks for the next token."""

    policy: DecodingParams
    position: int
    block: Block = field(default_factory=Block)
    prompt: Sequence[int] = ()  # read if the sampling counts tokens
    answer: Sequence[int] = ()  # committed tokens, likewise


def live_length(policy: DecodingParams, tokens: Sequence[int]) -> int:
    """Return how many drafted tokens matter: those up to the first that ends the answer."""
    for i, token in enumerate(tokens):
        if token in policy.stop_ids:
            return i + 1
    return len(tokens)


def rows_needed(policy: DecodingParams, tokens: Sequence[int]) -> int:
    """Return how many rows of logits judge these tokens.

    The expert reads the last committed token and the first `rows_needed - 1` drafted ones.
    """
    length = live_length(policy, tokens)
    return max(1, length + (1 if _has_bonus(policy, tokens[:length]) else 0))


def _has_bonus(policy: DecodingParams, tokens: Sequence[int]) -> bool:
    """Return whether a token follows when all of these stand."""
    if not tokens:
        return True
    return policy.bonus is not Bonus.NONE and tokens[-1] not in policy.stop_ids


@dataclass(frozen=True, kw_only=True)
class VerifyBatch:
    """Tasks of one kind, flat. What is costly and not always read is computed when it is."""

    tasks: Sequence[VerifyTask]
    logits_NV: Tensor
    lengths: list[int]  # live drafted tokens of each task
    bonuses: list[bool]  # whether a token follows when all stand
    counts: list[int]  # rows of logits of each task
    firsts: list[int]  # the first of them
    owner_M: list[int]  # task of each judged row
    place_M: list[int]  # place in the block of each judged row
    token_M: list[int]  # drafted token, or NOTHING
    heads: list[int]  # first judged row of each task

    @property
    def policy(self) -> DecodingParams:
        """What the tasks share: rule, bonus, coupling, verification, greedy or not."""
        return self.tasks[0].policy

    @property
    def rows(self) -> list[int]:
        """Row of logits of each judged row."""
        return [self.firsts[i] + j for i, j in zip(self.owner_M, self.place_M, strict=True)]

    def judged(self, owner: int, place: int) -> int | None:
        """Return the judged row at a place of a task, None where there is none."""
        index = self.heads[owner] + place
        if index < len(self.owner_M) and self.owner_M[index] == owner:
            return index
        return None

    @cached_property
    def law(self) -> Probs:
        """The expert's processed rows, one for each row of logits."""
        samplings, contexts = list[SamplingParams](), list[Context]()
        for task, count in zip(self.tasks, self.counts, strict=True):
            samplings += [task.policy.sampling] * count
            contexts += _contexts(task, count)
        return process(self.logits_NV, samplings, contexts)

    @cached_property
    def unscaled(self) -> SoftmaxProbs:
        """The expert's unscaled rows, one for each row of logits."""
        plain = all(is_plain(task.policy.sampling) for task in self.tasks)
        return (
            self.law if plain and isinstance(self.law, SoftmaxProbs) else unscaled(self.logits_NV)
        )

    @cached_property
    def support(self) -> Support:
        """The drafter's judged rows; what is not said of a draft is certainty of its token."""
        fresh = sends_ids_only(self.policy)
        count, blocks = len(self.token_M), [task.block for task in self.tasks]
        rows: Sequence[Sequence[SparseProbs | None]] = [block.rows for block in blocks]
        return received(
            [None] * count if fresh else self._said(rows, absent=None),
            self.token_M,
            [1.0] * count if fresh else self._likelihoods(),
            self._said([block.unscaled for block in blocks], absent=-math.inf),
            like=widen(self.logits_NV[:0]),
        )

    def lossless_ratios(self) -> Tensor:
        """Return p / q at each drafted token, float64 [M], where q is what it was drafted from."""
        p_M = self.on_token(self.evidence.p_NK).double()
        if not sends_ids_only(self.policy):
            return quotient(p_M, self.on_token(self.evidence.q_NK).double())
        return p_M / torch.tensor(self._likelihoods(), dtype=torch.float64, device=p_M.device)

    def _likelihoods(self) -> list[float]:
        return self._said([task.block.likelihoods for task in self.tasks], absent=1.0)

    def _said(self, told: Sequence[Sequence[_Value]], *, absent: _Value) -> list[_Value]:
        """Return what each task's block tells of its judged rows."""
        found: list[_Value] = []
        for here, head, end in zip(
            told, self.heads, [*self.heads[1:], len(self.token_M)], strict=True
        ):
            found += here[: end - head]
            found += [absent] * (end - len(found))
        return found

    @cached_property
    def evidence(self) -> RuleInputs:
        """What the rule reads of both models."""
        rule, support = self.policy.rule, self.support
        rows_M = torch.tensor(self.rows, dtype=torch.int64, device=self.logits_NV.device)
        p_MK = self.law.at(support.ids_NK, rows_E=rows_M) * support.valid_NK
        by_token = isinstance(rule, TokenV1 | TokenV2 | TokenV3 | Typical)
        if not (by_token or isinstance(rule, Diff | Opt | DiffLog | OptLog | Bild)):
            return RuleInputs(q_NK=support.q_NK, p_NK=p_MK, draft_stats_N=self._gates())
        raw = self.unscaled
        entropic = isinstance(rule, DiffLog | OptLog | Typical)
        return RuleInputs(
            q_NK=support.q_NK,
            p_NK=p_MK,
            draft_stats_N=self._gates(),
            q0_NK=support.q0_NK,
            p0_NK=raw.at(support.ids_NK, rows_E=rows_M) if by_token else None,
            p0_peak_N=raw.peaks()[rows_M],
            p0_entropy_N=raw.entropies()[rows_M] if entropic else None,
            p0_favourite_N=self._favourites(rows_M) if isinstance(rule, Bild) else None,
        )

    def _gates(self) -> tuple[DraftStats | None, ...]:
        """Return the drafter's gates of each judged row."""
        gates: Sequence[Sequence[DraftStats | None]] = [
            task.block.draft_stats for task in self.tasks
        ]
        return tuple(self._said(gates, absent=None))

    def _favourites(self, rows_M: Tensor) -> Tensor:
        """Return p0 of the drafter's favourite; without gates the drafted token speaks for it."""
        pairs = zip(self._gates(), self.token_M, strict=True)
        ids = [gates.favourite if gates else max(token, 0) for gates, token in pairs]
        ids_M1 = torch.tensor(ids, dtype=torch.int64, device=rows_M.device)[:, None]
        return self.unscaled.at(ids_M1, rows_E=rows_M).squeeze(1)

    @cached_property
    def target(self) -> TargetDistribution:
        """The law pi of each judged row."""
        return target_distribution(self.policy.rule, self.evidence)

    def on_token(self, values_MK: Tensor) -> Tensor:
        """Return the value at each judged row's drafted token, 0 where the row lacks it."""
        return torch.where(self._hits, values_MK, 0).sum(dim=1)

    @cached_property
    def _hits(self) -> Tensor:
        """Which entries of the support are the drafted tokens."""
        support = self.support
        token_M1 = torch.tensor(self.token_M, device=support.ids_NK.device)[:, None]
        return (support.ids_NK == token_M1) & support.valid_NK


def quotient(above_M: Tensor, below_M: Tensor) -> Tensor:
    """Return above / below, and 0 where below is."""
    return torch.where(below_M > 0, above_M / torch.where(below_M > 0, below_M, 1.0), 0.0)


def _contexts(task: VerifyTask, count: int) -> list[Context]:
    """Return what penalties count before each place of the block."""
    if not task.policy.sampling.counts_tokens:
        return [Context()] * count
    drafted = task.block.tokens
    return [
        Context(prompt=task.prompt, answer=task.answer, drafted=drafted[:place])
        for place in range(count)
    ]


def build_batch(logits_NV: Tensor, tasks: Sequence[VerifyTask]) -> VerifyBatch:
    """Return the tasks of one kind as a bench; the rows of logits are theirs in order."""
    lengths = [live_length(t.policy, t.block.tokens) for t in tasks]
    counts = [rows_needed(t.policy, t.block.tokens) for t in tasks]
    places = [range(n + _asks_target(t, n)) for t, n in zip(tasks, lengths, strict=True)]
    return VerifyBatch(
        tasks=tasks,
        logits_NV=logits_NV,
        lengths=lengths,
        bonuses=[
            _has_bonus(t.policy, t.block.tokens[:n]) for t, n in zip(tasks, lengths, strict=True)
        ],
        counts=counts,
        firsts=[0, *accumulate(counts)][:-1],
        owner_M=[i for i, here in enumerate(places) for _ in here],
        place_M=[j for here in places for j in here],
        token_M=[
            tasks[i].block.tokens[j] if j < lengths[i] else NOTHING
            for i, here in enumerate(places)
            for j in here
        ],
        heads=[0, *accumulate(len(here) for here in places)][:-1],
    )


def _asks_target(task: VerifyTask, length: int) -> bool:
    """Return whether the block came with the drafter's row after it, and pi there is wanted."""
    rows, tokens = task.block.rows, task.block.tokens[:length]
    if length < task.block.length or len(rows) <= length or not size(rows[length]):
        return False
    return wants_target(task.policy) and _has_bonus(task.policy, tokens)
