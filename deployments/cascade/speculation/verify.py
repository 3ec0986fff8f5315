"""What the expert does with its logits: the verdicts on the blocks of many sessions at once.

A task with L drafted tokens owns `rows_needed` consecutive rows of logits: row j is the expert's
law of the token at position + j. An empty block has one row and is plain decoding.

Shapes: `N` rows of logits, `E` committed tokens, `V` vocabulary.
"""

from __future__ import annotations

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
    build_batch,
    live_length,
    rows_needed,
)
from cascade.types import DecodingParams, Origin, TokenLogprob, Verdict

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    from cascade.speculation.acceptance import VerifyOutcome

__all__ = ["VerifyTask", "live_length", "rows_needed", "verify"]


def verify(
    logits_NV: Tensor, tasks: Sequence[VerifyTask], *, vocab_limit: int | None = None
) -> list[Verdict]:
    """Return the verdict on each task's block.

    Args:
        logits_NV: The expert's raw logits, any float type, any device; the rows of the first task,
            then those of the second, and so on.
        tasks: Blocks with their policies, `rows_needed` rows each.
        vocab_limit: Tokens from here on are padding of the vocabulary and impossible.
    """
    counts = [rows_needed(task.policy, task.block.tokens) for task in tasks]
    assert sum(counts) == logits_NV.shape[0], "each task brings the rows it needs"
    logits_NV = logits_NV[:, :vocab_limit]
    firsts = [0, *accumulate(counts)][:-1]
    verdicts: dict[int, Verdict] = {}
    for members in _groups(tasks):
        rows = [firsts[i] + k for i in members for k in range(counts[i])]
        rows_NV = logits_NV if len(members) == len(tasks) else logits_NV[rows]
        bench = build_batch(rows_NV, [tasks[i] for i in members])
        verdicts.update(zip(members, _judge(bench), strict=True))
    return [verdicts[i] for i in range(len(tasks))]


def _groups(tasks: Sequence[VerifyTask]) -> list[list[int]]:
    """Return the tasks that can be judged together: one rule, one procedure."""
    groups: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_kind(task.policy), []).append(i)
    return list(groups.values())


def _kind(policy: DecodingParams) -> Hashable:
    """Return what two policies must share to be judged in one batch."""
    procedure = is_gumbel(policy), is_blockwise(policy), sends_ids_only(policy)
    return policy.rule, policy.bonus, policy.sampling.greedy, procedure


def _judge(bench: VerifyBatch) -> list[Verdict]:
    """Return the verdicts on tasks of one kind."""
    policy = bench.tasks[0].policy
    if is_gumbel(policy):
        outcomes = acceptance.verify_gumbel(bench)
    elif is_blockwise(policy):
        outcomes = acceptance.verify_block(bench)
    else:
        outcomes = acceptance.verify_tokens(bench)
    return _verdicts(bench, outcomes)


def _verdicts(bench: VerifyBatch, outcomes: Sequence[VerifyOutcome]) -> list[Verdict]:
    """Return the outcomes as verdicts, with the log-probabilities of those that report them."""
    tokens = [
        task.block.tokens[: o.accepted] + ((o.emitted,) if o.emitted is not None else ())
        for task, o in zip(bench.tasks, outcomes, strict=True)
    ]
    reported = _logprobs(bench, tokens)
    return [
        Verdict(
            accepted=o.accepted,
            tokens=tokens[i],
            origins=o.origins + (Origin.EXPERT,) * (o.emitted is not None),
            judged=o.judged,
            deferred=o.deferred,
            logprobs=reported[i],
        )
        for i, o in enumerate(outcomes)
    ]


def _logprobs(
    bench: VerifyBatch, tokens: Sequence[tuple[int, ...]]
) -> list[tuple[TokenLogprob, ...]]:
    """Return p0's log-probability of every committed token of the tasks that ask."""
    tops = [task.policy.logprobs for task in bench.tasks]
    picks = [
        (i, first + j, token, top)
        for i, (first, top) in enumerate(zip(bench.firsts, tops, strict=True))
        if top is not None
        for j, token in enumerate(tokens[i])
    ]
    if not picks:
        return [()] * len(tokens)
    rows_E = torch.tensor([row for _, row, _, _ in picks], device=bench.logits_NV.device)
    law = bench.unscaled.rows(rows_E)
    found = logprobs(law, [t for _, _, t, _ in picks], [top for _, _, _, top in picks])
    owned: list[list[TokenLogprob]] = [[] for _ in tokens]
    for (i, _, _, _), entry in zip(picks, found, strict=True):
        owned[i].append(entry)
    return [tuple(entries) for entries in owned]
