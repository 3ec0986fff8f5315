"""Blocks that are judged together, laid out flat: which row of logits judges which drafted token.

p and p0 are the expert's probabilities with and without sampling parameters, q and q0 the
drafter's, and pi the target distribution; all are over the tokens that the session's masks allow.

Shapes: `N` rows of logits, `M` judged positions, `K` tokens of the drafter's support, `V`
vocabulary. A task has a judged position for each drafted token, and one more after the block if
the bonus token follows pi there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor

from cascade.rules import Lossless, PositionRule, TokenRule
from cascade.sampling.penalties import Context
from cascade.sampling.probs import Probs, SoftmaxProbs, process, unscaled_probs
from cascade.sampling.sparse_probs import support_size
from cascade.sampling.tensor_ops import map_rows, row_chunks
from cascade.sampling.token_mask import Bits, allowed_bits, allows, apply_masks, only_tokens
from cascade.speculation.judged_positions import (
    AtTokens,
    JudgedPositions,
    Target,
    reads_p0_entropy,
    reads_p0_max,
)
from cascade.speculation.payload import needs_probs_after_block, sends_ids_only
from cascade.types import Block, Bonus, DecodingParams, DraftStats, SamplingParams, SparseProbs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.sampling.token_mask import TokenMask

_Value = TypeVar("_Value")

# The token id of a judged position after a block, where nothing was drafted.
NO_TOKEN = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyTask:
    """One block to judge at a position; an empty block asks for the next token."""

    policy: DecodingParams
    position: int
    block: Block = field(default_factory=Block)
    prompt: Sequence[int] = ()  # read if there are penalties
    answer: Sequence[int] = ()  # committed tokens, read likewise and by masks
    masks: Sequence[TokenMask] = ()  # the session's
    forced: tuple[int | None, ...] = ()  # by row: the only token that they allow, if there is one
    divergence_left: float | None = None  # of the policy's budget, if it has one


def live_length(policy: DecodingParams, tokens: Sequence[int]) -> int:
    """Return how many drafted tokens are judged: those up to the first stop token."""
    for i, token in enumerate(tokens):
        if token in policy.stop_ids:
            return i + 1
    return len(tokens)


def rows_needed(policy: DecodingParams, tokens: Sequence[int]) -> int:
    """Return how many rows of logits judge these tokens.

    The expert reads the last committed token and the first `rows_needed - 1` drafted ones.
    """
    length = live_length(policy, tokens)
    return max(1, length + _has_bonus(policy, tokens[:length]))


def _has_bonus(policy: DecodingParams, tokens: Sequence[int]) -> bool:
    """Return whether a token follows if all of these are accepted."""
    if not tokens:
        return True
    return policy.bonus is not Bonus.NONE and tokens[-1] not in policy.stop_ids


@dataclass(frozen=True, kw_only=True)
class VerifyBatch:
    """Tasks that share rule and procedure. What is not always read is computed on first use."""

    tasks: Sequence[VerifyTask]
    logits_NV: Tensor
    raw_NV: Tensor | None  # without masks, if log-probabilities are wanted and there are masks
    lengths: list[int]  # drafted tokens of each task, up to a stop token
    has_bonus: list[bool]  # whether a token follows if all are accepted
    row_offsets: list[int]  # rows i to i + 1 are a task's rows of logits
    judged_offsets: list[int]  # likewise its judged positions
    row_M: list[int]  # row of logits of each judged position
    token_M: list[int]  # drafted token, or NO_TOKEN

    @property
    def policy(self) -> DecodingParams:
        """What the tasks share: rule, bonus, coupling, verification, greedy or not."""
        return self.tasks[0].policy

    def judged(self, task: int, index: int) -> int | None:
        """Return the judged position at an index of a task's block, None if there is none."""
        found = self.judged_offsets[task] + index
        return found if found < self.judged_offsets[task + 1] else None

    @cached_property
    def p(self) -> Probs:
        """The expert's processed probabilities, N rows."""
        samplings, contexts = list[SamplingParams](), list[Context]()
        for task, (start, end) in zip(self.tasks, pairwise(self.row_offsets), strict=True):
            samplings += [task.policy.sampling] * (end - start)
            contexts += _contexts(task, end - start)
        return process(self.logits_NV, samplings, contexts)

    @cached_property
    def p0(self) -> SoftmaxProbs:
        """The expert's unscaled probabilities, N rows."""
        samplings = [task.policy.sampling for task in self.tasks]
        return unscaled_probs(self.logits_NV, processed=self.p, samplings_N=samplings)

    @property
    def reported(self) -> SoftmaxProbs:
        """The probabilities that log-probabilities report: unscaled, and without masks."""
        return self.p0 if self.raw_NV is None else unscaled_probs(self.raw_NV)

    @cached_property
    def at_tokens(self) -> AtTokens:
        """What is known of the drafted tokens under the rule, M each."""
        judged = self._judged
        if len(self._chunks) == 1:
            return judged.at_tokens()
        every = range(len(self.token_M))
        found = map_rows(
            lambda chunk: judged.subset(every[chunk]).at_tokens(),
            self._support_shape,
            self.logits_NV.device,
        )
        return AtTokens(*(torch.cat(one) for one in zip(*found, strict=True)))

    def target_at(self, positions: Sequence[int]) -> Target:
        """Return the target distribution at some judged positions."""
        if len(self._chunks) == 1:
            return self._judged.target(self.within_budget).select(positions)
        within_M = self.within_budget
        return self._judged.subset(positions).target(
            None if within_M is None else within_M[torch.tensor(positions, device=within_M.device)]
        )

    @cached_property
    def _judged(self) -> JudgedPositions:
        rule, ids_only = self.policy.rule, sends_ids_only(self.policy)
        count, blocks = len(self.token_M), [task.block for task in self.tasks]
        probs: Sequence[Sequence[SparseProbs | None]] = [block.draft_probs for block in blocks]
        stats: Sequence[Sequence[DraftStats | None]] = [block.draft_stats for block in blocks]
        return JudgedPositions(
            rule=rule,
            rows=self.row_M,
            tokens=self.token_M,
            payload=[None] * count if ids_only else self._per_position(probs, missing=None),
            likelihoods=[1.0] * count if ids_only else self._likelihoods(),
            unscaled=self._per_position([block.unscaled for block in blocks], missing=-math.inf),
            stats=self._per_position(stats, missing=None),
            p=self.p,
            p0=self.p0,
            p0_max_N=self.p0.max_probs() if reads_p0_max(rule) else None,
            p0_entropy_N=self.p0.entropies() if reads_p0_entropy(rule) else None,
        )

    @property
    def _support_shape(self) -> tuple[int, int]:
        return len(self.token_M), support_size(self._judged.payload, self.logits_NV.shape[1])

    @cached_property
    def _chunks(self) -> list[slice]:
        """Slices of judged positions to read together."""
        return row_chunks(self._support_shape, self.logits_NV.device)

    def lossless_ratios(self) -> Tensor:
        """Return p / q at each drafted token, float64 [M], where q is what it was drafted from."""
        p_M = self.at_tokens.p_M.double()
        if not sends_ids_only(self.policy):
            return safe_divide(p_M, self.at_tokens.q_M.double())
        return p_M / torch.tensor(self._likelihoods(), dtype=torch.float64, device=p_M.device)

    def ratios(self) -> Tensor:
        """Return pi / q at each drafted token, float64 [M]; 0 where the support lacks the token."""
        pi_M = self.at_tokens.pi_M
        if self.within_budget is not None:
            pi_M = torch.where(self.within_budget, pi_M, self.at_tokens.p_M)
        return safe_divide(pi_M.double(), self.at_tokens.q_M.double())

    @property
    def deferred(self) -> Tensor | None:
        """Whether each drafted token is deferred, bool [M]; None: the rule does not defer."""
        if not isinstance(self.policy.rule, PositionRule | TokenRule):
            return None
        at = self.at_tokens
        if self.within_budget is None:
            return at.deferred_M
        return at.deferred_M | (~self.within_budget & at.known_M)

    @property
    def divergence(self) -> Tensor:
        """The total variation between the rule's distribution and p, float64 [M]."""
        return self.at_tokens.divergence_M

    @cached_property
    def within_budget(self) -> Tensor | None:
        """Whether the rule holds at each judged position, bool [M]; None if no task has a budget.

        It holds as long as its divergences, from the first of the block on, are within what is left
        of the budget. What it decides at a position is a function of the tokens before it.
        """
        if all(task.divergence_left is None for task in self.tasks) or not self.token_M:
            return None
        device, offsets = self.divergence.device, self.judged_offsets
        lefts = [task.divergence_left for task in self.tasks]
        left_B = torch.tensor([math.inf if one is None else one for one in lefts], device=device)
        start_B = torch.tensor(offsets[:-1], device=device)
        counts = [end - start for start, end in pairwise(offsets)]
        spent_BL = self.divergence[
            (start_B[:, None] + torch.arange(max(counts), device=device)).clamp_max(offsets[-1] - 1)
        ].cumsum(dim=1)
        within_BL = spent_BL <= left_B.double()[:, None]
        count_B = torch.tensor(counts, device=device)
        return within_BL[torch.arange(max(counts), device=device) < count_B[:, None]]

    def knows_q(self) -> list[bool]:
        """Return whether all of q is known at each judged position."""
        return [
            _knows_q(task.block, index)
            for task, (start, end) in zip(self.tasks, pairwise(self.judged_offsets), strict=True)
            for index in range(end - start)
        ]

    def _likelihoods(self) -> list[float]:
        return self._per_position([task.block.likelihoods for task in self.tasks], missing=1.0)

    def _per_position(self, values: Sequence[Sequence[_Value]], *, missing: _Value) -> list[_Value]:
        """Return the values of each task's block, padded to its judged positions."""
        found: list[_Value] = []
        for some, (start, end) in zip(values, pairwise(self.judged_offsets), strict=True):
            found += some[: end - start]
            found += [missing] * (end - len(found))
        return found


def safe_divide(above_M: Tensor, below_M: Tensor) -> Tensor:
    """Return above / below, and 0 where below is 0."""
    return torch.where(below_M > 0, above_M / torch.where(below_M > 0, below_M, 1.0), 0.0)


def _knows_q(block: Block, index: int) -> bool:
    """Return whether all of q is known at a token of a block: as sent, or a draft is certain."""
    if index < len(block.draft_probs) and len(block.draft_probs[index].weights):
        return True
    return index >= len(block.likelihoods) or block.likelihoods[index] >= 1


def budgeted(task: VerifyTask) -> VerifyTask:
    """Return a task whose divergences can be compared with its budget, if it has one.

    Its block ends before a token of which the drafter has not said enough, as one that does not
    know of budgets would not.
    """
    if task.divergence_left is None or isinstance(task.policy.rule, Lossless):
        return task
    unknown = (i for i in range(task.block.length) if not _knows_q(task.block, i))
    return replace(task, block=task.block.prefix(next(unknown, task.block.length)))


def _contexts(task: VerifyTask, count: int) -> list[Context]:
    """Return what penalties count before each position of the block."""
    if not task.policy.sampling.counts_tokens:
        return [Context()] * count
    drafted = task.block.tokens
    return [
        Context(prompt=task.prompt, answer=task.answer, drafted=drafted[:i]) for i in range(count)
    ]


def mask_blocks(
    logits_NV: Tensor, tasks: Sequence[VerifyTask]
) -> tuple[Tensor | None, list[VerifyTask]]:
    """Apply the masks of the tasks to their logits, in place.

    A block ends before a token that its masks forbid. Drafters draw none; a prediction of the
    client may hold one, which a rule that keeps drafts would keep. The lossless rule rejects it.

    Args:
        logits_NV: Raw logits, `rows_needed` rows for each task.
        tasks: The tasks in the order of their rows.

    Returns:
        A copy of the raw logits, if masked tasks report log-probabilities, and the tasks as they
        are judged.
    """
    first, bits, judged = 0, list[tuple[int, Bits | None]](), list[VerifyTask]()
    for task in tasks:
        tokens = task.block.tokens
        count = rows_needed(task.policy, tokens)
        bits_RW = allowed_bits(
            task.masks,
            task.answer,
            tokens[: count - 1],
            stop_ids=task.policy.stop_ids,
            vocabulary=logits_NV.shape[1],
        )
        bits.append((first, bits_RW))
        first += count
        if bits_RW is not None:
            task = replace(task, forced=tuple(only_tokens(bits_RW)))  # noqa: PLW2901 - narrowed here
        if bits_RW is not None and not isinstance(task.policy.rule, Lossless):
            allowed = allows(bits_RW, tokens[: live_length(task.policy, tokens)])
            if not all(allowed):
                task = replace(task, block=task.block.prefix(allowed.index(False)))  # noqa: PLW2901 - as above
        judged.append(task)
    reports = any(task.masks and task.policy.logprobs is not None for task in tasks)
    raw_NV = logits_NV.clone() if reports else None
    apply_masks(logits_NV, bits)
    return raw_NV, judged


def build_batch(
    logits_NV: Tensor, tasks: Sequence[VerifyTask], *, raw_NV: Tensor | None = None
) -> VerifyBatch:
    """Return a batch of tasks that share rule and procedure; their rows of logits are in order.

    Args:
        logits_NV: Logits with the masks of the tasks.
        tasks: The tasks.
        raw_NV: Without the masks, if log-probabilities are wanted and there are masks.
    """
    lengths = [live_length(t.policy, t.block.tokens) for t in tasks]
    counts = [rows_needed(t.policy, t.block.tokens) for t in tasks]
    judged = [n + _judges_bonus(t, n) for t, n in zip(tasks, lengths, strict=True)]
    row_offsets = [0, *accumulate(counts)]
    return VerifyBatch(
        tasks=tasks,
        logits_NV=logits_NV,
        raw_NV=raw_NV,
        lengths=lengths,
        has_bonus=[
            _has_bonus(t.policy, t.block.tokens[:n]) for t, n in zip(tasks, lengths, strict=True)
        ],
        row_offsets=row_offsets,
        judged_offsets=[0, *accumulate(judged)],
        row_M=[row_offsets[i] + j for i, count in enumerate(judged) for j in range(count)],
        token_M=[
            token
            for task, n, count in zip(tasks, lengths, judged, strict=True)
            for token in (*task.block.tokens[:n], *[NO_TOKEN] * (count - n))
        ],
    )


def _judges_bonus(task: VerifyTask, length: int) -> bool:
    """Return whether the bonus follows pi, and the drafter's probabilities for it were sent."""
    block = task.block
    if length < block.length or len(block.draft_probs) <= length:
        return False
    is_wanted = needs_probs_after_block(task.policy) and _has_bonus(task.policy, block.tokens)
    return is_wanted and len(block.draft_probs[length].weights) > 0
