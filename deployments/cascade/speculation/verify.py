"""The expert's side: verdicts on the blocks of many sessions at once.

A task with L drafted tokens has `rows_needed` consecutive rows of logits; row j is the expert's
distribution of the token at position + j. An empty block has one row and is plain decoding.

Shapes: `N` rows of logits, `E` committed tokens, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.sampling.sampler import logprobs
from cascade.speculation import acceptance
from cascade.speculation.payload import is_blockwise, is_gumbel, sends_ids_only
from cascade.speculation.verify_batch import (
    VerifyBatch,
    VerifyTask,
    budgeted,
    build_batch,
    live_length,
    mask_blocks,
    rows_needed,
)
from cascade.types import Origin

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from cascade.types import DecodingParams, TokenLogprob, Verdict

__all__ = ["VerifyTask", "live_length", "rows_needed", "verify"]


def verify(
    logits_NV: Tensor, tasks: Sequence[VerifyTask], *, vocab_limit: int | None = None
) -> list[Verdict]:
    """Return the verdict on each task's block.

    Args:
        logits_NV: The expert's raw logits, any float type, any device; the rows of the first task,
            then those of the second, and so on. Masks are applied in place.
        tasks: Blocks with their parameters, `rows_needed` rows each.
        vocab_limit: Token ids from here on are padding of the vocabulary and impossible.
    """
    counts = [rows_needed(task.policy, task.block.tokens) for task in tasks]
    assert sum(counts) == logits_NV.shape[0], "each task has `rows_needed` rows of logits"
    logits_NV = logits_NV[:, :vocab_limit]
    firsts = [0, *accumulate(counts)]
    raw_NV, tasks = mask_blocks(logits_NV, tasks)
    tasks = [budgeted(task) for task in tasks]
    counts = [rows_needed(task.policy, task.block.tokens) for task in tasks]
    groups: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_group_key(task.policy), []).append(i)
    verdicts: dict[int, Verdict] = {}
    for members in groups.values():
        rows = [firsts[i] + j for i in members for j in range(counts[i])]
        chosen = slice(None) if len(rows) == len(logits_NV) else rows
        raw = None if raw_NV is None else raw_NV[chosen]
        batch = build_batch(logits_NV[chosen], [tasks[i] for i in members], raw_NV=raw)
        verdicts.update(zip(members, _with_logprobs(batch, _judge(batch)), strict=True))
    return [_with_forced(verdicts[i], task) for i, task in enumerate(tasks)]


def _with_forced(verdict: Verdict, task: VerifyTask) -> Verdict:
    """Return the verdict with the tokens marked that the masks left no choice of."""
    if not any(only is not None for only in task.forced):
        return verdict
    pairs = zip(verdict.tokens, task.forced, verdict.origins, strict=False)
    origins = (Origin.FORCED if token == only else origin for token, only, origin in pairs)
    return replace(verdict, origins=tuple(origins))


def _group_key(policy: DecodingParams) -> Hashable:
    """Return what tasks must share to be judged in one batch."""
    procedure = is_gumbel(policy), is_blockwise(policy), sends_ids_only(policy)
    return policy.rule, policy.bonus, policy.sampling.greedy, procedure


def _judge(batch: VerifyBatch) -> list[Verdict]:
    if is_gumbel(batch.policy):
        return acceptance.verify_gumbel(batch)
    if is_blockwise(batch.policy):
        return acceptance.verify_block(batch)
    return acceptance.verify_tokens(batch)


def _with_logprobs(batch: VerifyBatch, verdicts: list[Verdict]) -> list[Verdict]:
    """Return the verdicts with the log-probability of each token, for the tasks that ask."""
    picks = [
        (i, batch.row_offsets[i] + j, token, task.policy.logprobs)
        for i, (task, verdict) in enumerate(zip(batch.tasks, verdicts, strict=True))
        if task.policy.logprobs is not None
        for j, token in enumerate(verdict.tokens)
    ]
    if not picks:
        return verdicts
    rows_E = torch.tensor([row for _, row, _, _ in picks], device=batch.logits_NV.device)
    found = logprobs(
        batch.reported.select(rows_E), [t for _, _, t, _ in picks], [top for _, _, _, top in picks]
    )
    of_task: list[list[TokenLogprob]] = [[] for _ in verdicts]
    for (i, _, _, _), entry in zip(picks, found, strict=True):
        of_task[i].append(entry)
    return [
        replace(verdict, logprobs=tuple(entries))
        for verdict, entries in zip(verdicts, of_task, strict=True)
    ]
