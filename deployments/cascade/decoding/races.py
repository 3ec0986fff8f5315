"""Who wins under shared noise: argmax(log p + g), and argmax(log pi + g).

Shapes: `N` rows of logits, `C` rows of one chunk, `V` vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.decoding import coins
from cascade.decoding.emission import spread
from cascade.decoding.rules import Lossless

if TYPE_CHECKING:
    from cascade.decoding.bench import Bench

# Logits and noise of this many tokens at a time stay in cache.
_CHUNK_TOKENS = 1 << 18


def races(bench: Bench) -> tuple[Tensor, Tensor]:
    """Return the winners under p and under pi of every row of logits, int64 [N] each.

    Where no target is asked for, pi is p.
    """
    count, vocab = bench.logits_NV.shape
    rows = max(1, _CHUNK_TOKENS // vocab)
    chunks = [_chunk(bench, first, min(first + rows, count)) for first in range(0, count, rows)]
    return torch.cat([expert for expert, _ in chunks]), torch.cat([chosen for _, chosen in chunks])


def _chunk(bench: Bench, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Return the winners of the rows of logits from `first` to `end`."""
    device, vocab = bench.logits_NV.device, bench.logits_NV.shape[1]
    log_CV = bench.law.rows(torch.arange(first, end, device=device)).log_dense()
    pairs = _counters(bench)[first:end]
    seeds, positions = [seed for seed, _ in pairs], [position for _, position in pairs]
    noise_CV = coins.noise(seeds, positions, vocab, device).to(log_CV.dtype)
    expert_C = log_CV.add_(noise_CV).argmax(dim=1)
    judged = [(m, row) for m, row in enumerate(bench.rows) if first <= row < end]
    if isinstance(bench.policy.rule, Lossless) or not judged:
        return expert_C, expert_C
    index_E = torch.tensor([m for m, _ in judged], device=device)
    row_E = torch.tensor([row for _, row in judged], device=device)
    log_EV = spread(bench, bench.law.rows(row_E), index_E).log_()
    winners_E = log_EV.add_(noise_CV[row_E - first]).argmax(dim=1)
    return expert_C, expert_C.index_copy(0, row_E - first, winners_E)


def _counters(bench: Bench) -> list[tuple[int, int]]:
    """Return seed and position of each row of logits."""
    ends = [*bench.firsts[1:], bench.logits_NV.shape[0]]
    return [
        (task.policy.seed, task.position + j)
        for task, first, end in zip(bench.tasks, bench.firsts, ends, strict=True)
        for j in range(end - first)
    ]
