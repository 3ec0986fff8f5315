"""Small models, the fast path's loop over them, and the laws the fast path implies."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from cascade.speculation import acceptance
from cascade.speculation.draft import DraftTask, DraftToken, block_of, draft_step
from cascade.speculation.draft_length import expert_slots
from cascade.speculation.payload import is_blockwise, wants_target
from cascade.speculation.residual import next_token_weights
from cascade.speculation.verify import VerifyTask, rows_needed, verify
from cascade.types import Block, DecodingParams, DraftStats, Origin, SparseProbs

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from torch import Tensor

    from cascade.speculation.verify_batch import VerifyBatch

Floats: TypeAlias = dict[tuple[int, ...], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bigrams:
    """A pair of models that look one token back: logits [V, V] each."""

    drafter_VV: Tensor
    expert_VV: Tensor

    @classmethod
    def random(cls, *, vocab: int = 12, seed: int = 0, apart: float = 0.9) -> Bigrams:
        generator = torch.Generator().manual_seed(seed)
        drafter_VV = 1.5 * torch.randn(vocab, vocab, generator=generator)
        noise_VV = torch.randn(vocab, vocab, generator=generator)
        return cls(drafter_VV=drafter_VV, expert_VV=drafter_VV + apart * noise_VV)

    def drafter(self, tokens: Sequence[int]) -> Tensor:
        return self.drafter_VV[tokens[-1]]

    def expert(self, tokens: Sequence[int]) -> Tensor:
        return self.expert_VV[tokens[-1]]

    def blocks(self, writings: Sequence[Writing], *, counts: Sequence[int]) -> list[Block]:
        """Return blocks drafted by the fast path, each with the row after it if the bonus asks."""
        drafts: list[list[DraftToken]] = [[] for _ in writings]
        wanted = [
            n + wants_target(w.policy) if n else 0 for w, n in zip(writings, counts, strict=True)
        ]
        while True:
            open_ = [
                i
                for i, w in enumerate(writings)
                if len(drafts[i]) < wanted[i]
                and not (drafts[i] and drafts[i][-1].token in w.policy.stop_ids)
            ]
            if not open_:
                break
            tasks = [writings[i].draft_task(drafts[i]) for i in open_]
            texts = [
                [*writings[i].prompt, *task.answer] for i, task in zip(open_, tasks, strict=True)
            ]
            logits_BV = torch.stack([self.drafter(text) for text in texts])
            for i, draft in zip(open_, draft_step(logits_BV, tasks), strict=True):
                drafts[i].append(draft)
        return [
            block_of(ds, length=min(count, len(ds)))
            for ds, count in zip(drafts, counts, strict=True)
        ]

    def rows(self, policy: DecodingParams, before: Sequence[int], tokens: Sequence[int]) -> Tensor:
        """Return the expert's rows that judge drafted tokens."""
        fed = [*before, *tokens][: len(before) + rows_needed(policy, tokens) - 1]
        return torch.stack([self.expert(fed[:n]) for n in range(len(before), len(fed) + 1)])

    def decode(
        self,
        policies: Sequence[DecodingParams],
        prompts: Sequence[Sequence[int]],
        *,
        draft_tokens: Sequence[int],
        max_tokens: int,
    ) -> list[list[tuple[int, Origin]]]:
        """Return answers written by the fast path, all sessions in the same batches."""
        writings = [
            Writing(policy=policy, prompt=tuple(prompt))
            for policy, prompt in zip(policies, prompts, strict=True)
        ]
        while open_ := [i for i, w in enumerate(writings) if not w.done(max_tokens)]:
            here = [writings[i] for i in open_]
            counts = [
                w.count(draft_tokens[i], max_tokens) for i, w in zip(open_, here, strict=True)
            ]
            blocks = self.blocks(here, counts=counts)
            tasks = [w.task(block) for w, block in zip(here, blocks, strict=True)]
            rows = [
                self.rows(w.policy, [*w.prompt, *w.answer], block.tokens)
                for w, block in zip(here, blocks, strict=True)
            ]
            for writing, verdict in zip(here, verify(torch.cat(rows), tasks), strict=True):
                writing.text += zip(verdict.tokens, verdict.origins, strict=True)
        return [w.text[:max_tokens] for w in writings]


@dataclass(slots=True, kw_only=True)
class Writing:
    """One answer in the making."""

    policy: DecodingParams
    prompt: tuple[int, ...]
    text: list[tuple[int, Origin]] = field(default_factory=list[tuple[int, Origin]])

    @property
    def answer(self) -> list[int]:
        return [token for token, _ in self.text]

    def done(self, max_tokens: int) -> bool:
        return len(self.text) >= max_tokens or (
            bool(self.text) and self.text[-1][0] in self.policy.stop_ids
        )

    def count(self, wanted: int, max_tokens: int) -> int:
        return min(wanted, max_tokens - len(self.text) - expert_slots(self.policy))

    def draft_task(self, drafts: Sequence[DraftToken]) -> DraftTask:
        answer = [*self.answer, *(draft.token for draft in drafts)]
        start = len(self.text)
        return DraftTask(
            policy=self.policy,
            position=len(answer),
            start=start,
            prompt=self.prompt,
            answer=answer,
        )

    def task(self, block: Block) -> VerifyTask:
        return VerifyTask(
            policy=self.policy,
            position=len(self.text),
            block=block,
            prompt=self.prompt,
            answer=self.answer,
        )


def wire_row(weights: Sequence[Fraction], *, unscaled: bool = False) -> SparseProbs:
    """Return a full row; the weights must be exact in float16."""
    weights_V = np.array([float(w) for w in weights], np.float16)
    q0_V = np.array([float(w / sum(weights)) for w in weights], np.float16) if unscaled else None
    return SparseProbs(ids=np.empty(0, np.uint32), weights=weights_V, unscaled=q0_V)


def gates_of(row: Sequence[Fraction | float]) -> DraftStats:
    """Return what rules read of an unscaled row."""
    values = [float(x) for x in row]
    q0_V = torch.tensor(values, dtype=torch.float64)
    entropy = float(torch.special.entr(q0_V).sum())
    return DraftStats(peak=max(values), favourite=values.index(max(values)), entropy=entropy)


def round_law(bench: VerifyBatch, chances: Sequence[float]) -> Floats:
    """Return the law of what a round commits, from the probabilities that the fast path computes.

    Args:
        bench: One task for each block that can be drafted.
        chances: The probability with which each is drafted.
    """
    out: defaultdict[tuple[int, ...], float] = defaultdict(float)
    endings = _block_endings(bench) if is_blockwise(bench.policy) else _token_endings(bench)
    emissions = [
        acceptance.following(bench, i, count, factor=factor) for i, count, factor, _ in endings
    ]
    wanted = [e for e in emissions if e is not None]
    laws = next_token_weights(bench, wanted).weights_NK if wanted else torch.empty(0, 1)
    laws = (laws / laws.sum(dim=1, keepdim=True)).tolist()
    for (i, count, _, chance), emission in zip(endings, emissions, strict=True):
        tokens = bench.tasks[i].block.tokens[:count]
        if emission is None:
            out[tokens] += chances[i] * chance
            continue
        for v, x in enumerate(laws[wanted.index(emission)]):
            out[(*tokens, v)] += chances[i] * chance * x
    return out


def _token_endings(bench: VerifyBatch) -> list[tuple[int, int, float, float]]:
    """Return (task, tokens accepted, factor, probability) of every ending, token by token."""
    accept = acceptance.accept_probabilities(bench).tolist()
    endings: list[tuple[int, int, float, float]] = []
    for i, (head, length) in enumerate(zip(bench.heads, bench.lengths, strict=True)):
        alive = 1.0
        for j in range(length):
            endings.append((i, j, 1.0, alive * (1 - accept[head + j])))
            alive *= accept[head + j]
        endings.append((i, length, 1.0, alive))
    return [ending for ending in endings if ending[3] > 0]


def _block_endings(bench: VerifyBatch) -> list[tuple[int, int, float, float]]:
    """Return (task, tokens accepted, factor, probability) of every ending, block verification."""
    standing = acceptance.prefix_acceptance(bench)
    endings: list[tuple[int, int, float, float]] = []
    for i, (prefixes, factors) in enumerate(zip(standing.prefixes, standing.factors, strict=True)):
        left = 1.0
        for count in range(len(prefixes), 0, -1):
            endings.append((i, count, factors[count], left * prefixes[count - 1]))
            left *= 1 - prefixes[count - 1]
        endings.append((i, 0, 1.0, left))
    return [ending for ending in endings if ending[3] > 0]
