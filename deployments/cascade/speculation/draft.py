"""The drafter's side: one drafted token for each of many sessions at once.

q and q0 are the drafter's probabilities with and without sampling parameters.

Shapes: `B` sessions, `K` entries of sparse probabilities, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cascade.rules import Chow, ChowLog
from cascade.sampling import rng
from cascade.sampling.penalties import Context
from cascade.sampling.probs import OneHotProbs, SoftmaxProbs, process, unscaled_probs
from cascade.sampling.rng import Purpose
from cascade.sampling.sampler import Weights, logprobs
from cascade.sampling.sparse_probs import ABSENT, SparseRows, sparsify
from cascade.sampling.tensor_ops import to_cpu, to_list
from cascade.speculation.confidence import TokenConfidence, token_confidences
from cascade.speculation.payload import (
    PayloadSpec,
    ProbsPayload,
    is_blockwise,
    is_gumbel,
    payload_spec,
)
from cascade.speculation.target_distribution import defers
from cascade.types import Block, DecodingParams, DraftStats, RowFormat, SparseProbs, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTask:
    """One token to draft."""

    policy: DecodingParams
    position: int  # committed and drafted tokens before this one
    block_start: int  # position at which the block began
    prompt: Sequence[int] = ()  # read if there are penalties
    answer: Sequence[int] = ()  # committed and drafted tokens, read likewise
    purpose: Purpose = Purpose.DRAFT  # NEXT_TOKEN guesses what the expert will sample
    with_confidence: bool = False  # report how likely the token and its runner-up are


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftToken:
    """A drafted token with what the expert must know of its distribution."""

    token: int
    likelihood: float = 1.0
    unscaled: float | None = None
    draft_stats: DraftStats | None = None
    probs: SparseProbs | None = None
    logprob: TokenLogprob | None = None
    confidence: TokenConfidence | None = None


def draft_step(
    logits_BV: Tensor, tasks: Sequence[DraftTask], *, vocab_limit: int | None = None
) -> list[DraftToken]:
    """Return a drafted token for each row of logits.

    The token is sampled from exactly the distribution that is reported: where sparse, quantised
    probabilities are sent, it is sampled from those.

    Args:
        logits_BV: The drafter's raw logits, any float type, any device.
        tasks: One task a row.
        vocab_limit: Token ids from here on are padding of the vocabulary and impossible.
    """
    assert len(tasks) == logits_BV.shape[0], "one task a row"
    logits_BV = logits_BV[:, :vocab_limit]
    groups: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_group_key(task), []).append(i)
    drafts: dict[int, DraftToken] = {}
    for members in groups.values():
        rows_BV = logits_BV if len(members) == len(tasks) else logits_BV[members]
        drafts.update(zip(members, _draft(rows_BV, [tasks[i] for i in members]), strict=True))
    return [drafts[i] for i in range(len(tasks))]


def block_of(drafts: Sequence[DraftToken], *, length: int | None = None) -> Block:
    """Return the first `length` drafts as a block; one more draft describes the position after."""
    length = len(drafts) if length is None else length
    inside = drafts[:length]
    return Block(
        tokens=tuple(d.token for d in inside),
        likelihoods=tuple(d.likelihood for d in inside),
        unscaled=tuple(d.unscaled for d in inside if d.unscaled is not None),
        draft_stats=tuple(d.draft_stats for d in drafts if d.draft_stats is not None),
        draft_probs=tuple(d.probs for d in drafts if d.probs is not None),
        logprobs=tuple(d.logprob for d in inside if d.logprob is not None),
    )


def drafter_defers(policy: DecodingParams, draft: DraftToken) -> bool:
    """Return whether the rule reads the drafter alone and defers at this token."""
    if not isinstance(policy.rule, Chow | ChowLog):
        return False
    assert draft.draft_stats is not None, "every draft has the statistics that the rule reads"
    return defers(policy.rule, draft.draft_stats)


def _group_key(task: DraftTask) -> Hashable:
    """Return what tasks must share to be drafted in one batch."""
    policy = task.policy
    rule = policy.rule if isinstance(policy.rule, Chow | ChowLog) else None
    form = (policy.rows is RowFormat.FULL, policy.row_entries)
    procedure = policy.sampling.greedy, is_gumbel(policy), is_blockwise(policy)
    samples = not policy.sampling.greedy and not is_gumbel(policy)
    return procedure, payload_spec(policy), form, rule, samples and task.purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Tokens with their likelihoods and the probabilities to send."""

    tokens_B: list[int]
    likelihoods_B: list[float]
    probs: Callable[[int], SparseProbs | None]
    scores_BK: Tensor | None = None  # of which the largest was chosen
    ids_BK: Tensor | None = None  # the tokens of the scores; None: the vocabulary


def _draft(logits_BV: Tensor, tasks: Sequence[DraftTask]) -> list[DraftToken]:
    """Return the drafts of tasks of one group."""
    policy, spec, count = tasks[0].policy, payload_spec(tasks[0].policy), len(tasks)
    samplings = [task.policy.sampling for task in tasks]
    contexts = [Context(prompt=task.prompt, answer=task.answer) for task in tasks]
    q = process(logits_BV, samplings, contexts)
    q0 = None
    reports = any(task.policy.logprobs is not None for task in tasks)
    if spec.draft_stats or spec.unscaled or spec.unscaled_probs or reports:
        q0 = unscaled_probs(logits_BV, processed=q, samplings_N=samplings)
    stats = _draft_stats(q0, spec=spec) if q0 and spec.draft_stats else [None] * count
    if isinstance(q, SoftmaxProbs):
        sample = _sample(q, q0, tasks, sends_B=_sends_probs(policy, spec, stats))
    else:
        sample = _greedy(q, q0, spec=spec)
    tokens_B = sample.tokens_B
    unscaled_B = _unscaled_at(q0, tokens_B) if spec.unscaled else [None] * count
    logprobs_B = _logprobs(q0, tokens_B, tasks)
    confidences_B: Sequence[TokenConfidence | None] = [None] * count
    if any(task.with_confidence for task in tasks):
        confidences_B = token_confidences(
            logits_BV, tokens_B, scores_BK=sample.scores_BK, ids_BK=sample.ids_BK
        )
    return [
        DraftToken(
            token=tokens_B[i],
            likelihood=sample.likelihoods_B[i],
            unscaled=unscaled_B[i],
            draft_stats=stats[i],
            probs=sample.probs(i),
            logprob=logprobs_B[i],
            confidence=confidences_B[i],
        )
        for i in range(count)
    ]


def _draft_stats(q0: SoftmaxProbs, *, spec: PayloadSpec) -> list[DraftStats]:
    max_probs, argmax = to_list(q0.max_probs()), to_list(q0.argmax())
    entropies = to_list(q0.entropies()) if spec.entropy else [0.0] * len(argmax)
    return [
        DraftStats(max_prob=max_prob, argmax=token, entropy=entropy)
        for max_prob, token, entropy in zip(max_probs, argmax, entropies, strict=True)
    ]


def _sends_probs(
    policy: DecodingParams, spec: PayloadSpec, stats: Sequence[DraftStats | None]
) -> list[bool]:
    """Return for which sessions probabilities are sent."""
    if spec.probs is not ProbsPayload.DEFERRED:
        return [spec.probs is ProbsPayload.ALL] * len(stats)
    assert isinstance(policy.rule, Chow | ChowLog), "only these rules decide before the expert"
    return [defers(policy.rule, one) for one in stats if one is not None]


def _greedy(q: OneHotProbs, q0: SoftmaxProbs | None, *, spec: PayloadSpec) -> _Sample:
    """Return the argmax of each row, with likelihood 1."""
    tokens_B = to_list(q.best_N)
    q0_B = _unscaled_at(q0, tokens_B) if spec.unscaled_probs else None

    def one_hot(i: int) -> SparseProbs:
        return SparseProbs(
            ids=np.array([tokens_B[i]], np.uint32),
            weights=np.ones(1, np.float16),
            unscaled=None if q0_B is None else np.array([q0_B[i]], np.float16),
        )

    return _Sample(
        tokens_B=tokens_B,
        likelihoods_B=[1.0] * len(tokens_B),
        probs=one_hot if spec.probs is ProbsPayload.ALL else lambda _: None,
    )


def _sample(
    q: SoftmaxProbs, q0: SoftmaxProbs | None, tasks: Sequence[DraftTask], *, sends_B: list[bool]
) -> _Sample:
    """Return tokens sampled from the probabilities as sent, or from all of q where none are."""
    if all(sends_B):
        return _sample_sent(q, q0, tasks)
    if not any(sends_B):
        return _sample_dense(q, tasks)
    found: dict[int, tuple[_Sample, int]] = {}
    for sends in (True, False):
        members = [i for i, s in enumerate(sends_B) if s is sends]
        rows_E = torch.tensor(members, device=q.logits_NV.device)
        some_q0, some = q0 and q0.select(rows_E), [tasks[i] for i in members]
        part = _sample(q.select(rows_E), some_q0, some, sends_B=[sends] * len(members))
        found |= {i: (part, k) for k, i in enumerate(members)}
    parts = [found[i] for i in range(len(tasks))]
    return _Sample(
        tokens_B=[part.tokens_B[k] for part, k in parts],
        likelihoods_B=[part.likelihoods_B[k] for part, k in parts],
        probs=lambda i: parts[i][0].probs(parts[i][1]) or ABSENT,
    )


def _sample_dense(q: SoftmaxProbs, tasks: Sequence[DraftTask]) -> _Sample:
    """Return tokens sampled from all of q, whose probabilities are not sent."""
    scores_BV: Tensor | None = None
    if is_gumbel(tasks[0].policy):
        seeds_B, positions_B = [t.policy.seed for t in tasks], [t.position for t in tasks]
        log_BV = q.log_dense()
        scores_BV = log_BV + rng.gumbel_noise(seeds_B, positions_B, log_BV.shape[1], log_BV.device)
        token_B1 = scores_BV.argmax(dim=1, keepdim=True)
        likelihood_B1 = log_BV.gather(1, token_B1).exp()
    else:
        q_BV = q.dense()
        token_B1 = Weights(weights_NK=q_BV).inverse_cdf(_draft_uniforms(tasks))[:, None]
        likelihood_B1 = q_BV.gather(1, token_B1)
    absent = ABSENT if payload_spec(tasks[0].policy).probs is ProbsPayload.DEFERRED else None
    return _Sample(
        tokens_B=to_list(token_B1.squeeze(1)),
        likelihoods_B=to_list(likelihood_B1.squeeze(1)),
        probs=lambda _: absent,
        scores_BK=scores_BV,
    )


def _sample_sent(q: SoftmaxProbs, q0: SoftmaxProbs | None, tasks: Sequence[DraftTask]) -> _Sample:
    """Return tokens sampled from the sparse, quantised probabilities that are sent."""
    policy = tasks[0].policy
    q_BV = q.dense()
    full = policy.rows is RowFormat.FULL
    sparse = sparsify(q_BV, q_BV.shape[1] if full else policy.row_entries)
    q_BK = sparse.probs(q_BV.dtype)
    scores_BK: Tensor | None = None
    if is_gumbel(policy):
        seeds_B, positions_B = [t.policy.seed for t in tasks], [t.position for t in tasks]
        scores_BK = q_BK.log() + rng.gumbel_noise_at(seeds_B, positions_B, sparse.ids_NK)
        index_B1 = scores_BK.argmax(dim=1, keepdim=True)
    else:
        index_B1 = Weights(weights_NK=q_BK).inverse_cdf(_draft_uniforms(tasks))[:, None]
    q0_BK = to_cpu(q0.at(sparse.ids_NK)) if q0 and payload_spec(policy).unscaled_probs else None
    local = SparseRows(ids_NK=to_cpu(sparse.ids_NK), weights_NK=to_cpu(sparse.weights_NK))
    return _Sample(
        tokens_B=to_list(sparse.ids_NK.gather(1, index_B1).squeeze(1)),
        likelihoods_B=to_list(q_BK.gather(1, index_B1).squeeze(1)),
        probs=lambda i: local.row(i, full=full, unscaled_K=None if q0_BK is None else q0_BK[i]),
        scores_BK=scores_BK,
        ids_BK=None if scores_BK is None else sparse.ids_NK,
    )


def _draft_uniforms(tasks: Sequence[DraftTask]) -> Tensor:
    """Return the random number that decides each drafted token."""
    return rng.uniforms(
        [t.policy.seed for t in tasks],
        [t.position for t in tasks],
        tasks[0].purpose,
        block_starts_N=[t.block_start for t in tasks] if is_blockwise(tasks[0].policy) else None,
    )


def _unscaled_at(q0: SoftmaxProbs | None, tokens_B: Sequence[int]) -> list[float]:
    """Return q0 of the drafted tokens."""
    assert q0 is not None, "the rule reads q0"
    ids_B1 = torch.tensor(tokens_B, device=q0.logits_NV.device)[:, None]
    return to_list(q0.at(ids_B1).squeeze(1))


def _logprobs(
    q0: SoftmaxProbs | None, tokens_B: Sequence[int], tasks: Sequence[DraftTask]
) -> list[TokenLogprob | None]:
    """Return the log-probabilities of the sessions that ask for them."""
    tops = [task.policy.logprobs for task in tasks]
    if q0 is None or all(top is None for top in tops):
        return [None] * len(tasks)
    found = logprobs(q0, tokens_B, [top or 0 for top in tops])
    return [f if top is not None else None for f, top in zip(found, tops, strict=True)]
