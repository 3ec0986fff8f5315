"""Small models, the fast path's loop over them, and the laws the fast path implies."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import torch

from cascade.decoding import acceptance
from cascade.decoding.drafting import Draft, DraftTask, block_of, draft_step
from cascade.decoding.needs import is_blockwise, wants_target
from cascade.decoding.session import Block, Bonus, Gates, Origin, Policy, Row
from cascade.decoding.verification import Task, judge, rows_needed

if TYPE_CHECKING:
    from collections.abc import Sequence
    from fractions import Fraction

    from torch import Tensor

    from cascade.decoding.bench import Bench

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

    def block(
        self, policy: Policy, prompt: Sequence[int], answer: Sequence[int], *, count: int
    ) -> Block:
        """Return a block drafted by the fast path, with the row after it if the bonus needs one."""
        drafts: list[Draft] = []
        tokens = list(answer)
        wanted = count + wants_target(policy) if count else 0
        while len(drafts) < wanted and not (drafts and drafts[-1].token in policy.stop_ids):
            task = DraftTask(
                policy=policy,
                position=len(tokens),
                start=len(answer),
                prompt=prompt,
                answer=list(tokens),
            )
            logits_BV = self.drafter([*prompt, *tokens])[None, :]
            drafts += draft_step(logits_BV, [task])
            tokens.append(drafts[-1].token)
        return block_of(drafts, length=min(count, len(drafts)))

    def rows(self, policy: Policy, before: Sequence[int], block: Block) -> Tensor:
        """Return the expert's rows that judge a block."""
        fed = [*before, *block.tokens][: len(before) + rows_needed(policy, block.tokens) - 1]
        return torch.stack([self.expert(fed[:n]) for n in range(len(before), len(fed) + 1)])

    def decode(
        self, policy: Policy, prompt: Sequence[int], *, draft_tokens: int, max_tokens: int
    ) -> list[tuple[int, Origin]]:
        """Return an answer written by the fast path."""
        text: list[tuple[int, Origin]] = []
        reserved = int(policy.bonus is Bonus.EXPERT)
        while len(text) < max_tokens and not (text and text[-1][0] in policy.stop_ids):
            answer = [token for token, _ in text]
            count = min(draft_tokens, max_tokens - len(text) - reserved)
            block = self.block(policy, prompt, answer, count=count)
            rows_NV = self.rows(policy, [*prompt, *answer], block)
            task = Task(
                policy=policy, position=len(answer), block=block, prompt=prompt, answer=answer
            )
            verdict = judge(rows_NV, [task])[0]
            text += zip(verdict.tokens, verdict.origins, strict=True)
        return text[:max_tokens]


def wire_row(weights: Sequence[Fraction], *, unscaled: bool = False) -> Row:
    """Return a full row; the weights must be exact in float16."""
    weights_V = np.array([float(w) for w in weights], np.float16)
    q0_V = np.array([float(w / sum(weights)) for w in weights], np.float16) if unscaled else None
    return Row(ids=np.empty(0, np.uint32), weights=weights_V, unscaled=q0_V)


def gates_of(row: Sequence[Fraction | float]) -> Gates:
    """Return what rules read of an unscaled row."""
    values = [float(x) for x in row]
    q0_V = torch.tensor(values, dtype=torch.float64)
    entropy = float(torch.special.entr(q0_V).sum())
    return Gates(peak=max(values), favourite=values.index(max(values)), entropy=entropy)


def round_law(bench: Bench, chances: Sequence[float]) -> Floats:
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
    laws = acceptance.emission_weights(bench, wanted) if wanted else torch.empty(0, 1)
    laws = (laws / laws.sum(dim=1, keepdim=True)).tolist()
    for (i, count, _, chance), emission in zip(endings, emissions, strict=True):
        tokens = bench.tasks[i].block.tokens[:count]
        if emission is None:
            out[tokens] += chances[i] * chance
            continue
        for v, x in enumerate(laws[wanted.index(emission)]):
            out[(*tokens, v)] += chances[i] * chance * x
    return out


def _token_endings(bench: Bench) -> list[tuple[int, int, float, float]]:
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


def _block_endings(bench: Bench) -> list[tuple[int, int, float, float]]:
    """Return (task, tokens accepted, factor, probability) of every ending, block verification."""
    standing = acceptance.standing_probabilities(bench)
    endings: list[tuple[int, int, float, float]] = []
    for i, (prefixes, factors) in enumerate(zip(standing.prefixes, standing.factors, strict=True)):
        left = 1.0
        for count in range(len(prefixes), 0, -1):
            endings.append((i, count, factors[count], left * prefixes[count - 1]))
            left *= 1 - prefixes[count - 1]
        endings.append((i, 0, 1.0, left))
    return [ending for ending in endings if ending[3] > 0]
