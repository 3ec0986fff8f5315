"""The drafter's side: one drafted token for each of many sessions at once.

q and q0 are the drafter's probabilities with and without sampling parameters, both over the tokens
that the session's masks allow. q is cut as
`payload.draft_cut` says: it is what tokens are sampled from and what is sent, in every mode.

Shapes: `B` sessions, `K` entries of sparse probabilities, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cascade.rules import Chow, ChowLog
from cascade.sampling import rng
from cascade.sampling.penalties import Context
from cascade.sampling.probs import OneHotProbs, SoftmaxProbs, process, unscaled_probs
from cascade.sampling.rng import Purpose
from cascade.sampling.sampler import Weights, logprobs
from cascade.sampling.sparse_probs import SparseRows, sparsify
from cascade.sampling.tensor_ops import to_cpu, to_list
from cascade.sampling.token_mask import allowed_bits, apply_masks, only_tokens
from cascade.speculation.confidence import TokenConfidence, token_confidences
from cascade.speculation.payload import (
    PayloadSpec,
    draft_cut,
    is_blockwise,
    is_gumbel,
    payload_spec,
)
from cascade.speculation.target_distribution import defers
from cascade.types import Block, DecodingParams, DraftStats, SparseProbs, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence

    from cascade.sampling.token_mask import Bits, TokenMask


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTask:
    """One token to draft."""

    policy: DecodingParams
    position: int  # committed and drafted tokens before this one
    block_start: int  # position at which the block began
    prompt: Sequence[int] = ()  # read if there are penalties
    answer: Sequence[int] = ()  # committed and drafted tokens, read likewise and by masks
    masks: Sequence[TokenMask] = ()  # the session's
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
    forced: bool = False  # the masks allowed no other token
    lost_mass: float = 0.0  # that the drafter gave to tokens that the expert has not


def forced_token(task: DraftTask, *, vocabulary: int) -> int | None:
    """Return the token that the masks of a task leave no choice of, if there is one."""
    bits_1W = _allowed_bits(task, vocabulary)
    return None if bits_1W is None else only_tokens(bits_1W)[0]


def forced_draft(policy: DecodingParams, token: int) -> DraftToken:
    """Return the draft of a token that the masks leave no choice of: q and q0 are one-hots."""
    spec = payload_spec(policy)
    one = np.ones(1, np.float16)
    probs = SparseProbs(
        ids=np.array([token], np.uint32), weights=one, unscaled=one if spec.unscaled_probs else None
    )
    return DraftToken(
        token=token,
        unscaled=1.0 if spec.unscaled else None,
        draft_stats=DraftStats(max_prob=1, argmax=token, entropy=0) if spec.draft_stats else None,
        probs=probs if spec.probs else None,
        forced=True,
    )


def draft_step(
    logits_BV: Tensor, tasks: Sequence[DraftTask], *, vocab_limit: int | None = None
) -> list[DraftToken]:
    """Return a drafted token for each row of logits.

    Args:
        logits_BV: The drafter's raw logits, any float type, any device. Masks are applied in place.
        tasks: One task a row.
        vocab_limit: Token ids from here on are padding of the vocabulary and impossible.
    """
    assert len(tasks) == logits_BV.shape[0], "one task a row"
    logits_BV = logits_BV[:, :vocab_limit]
    bits = [_allowed_bits(task, logits_BV.shape[1]) for task in tasks]
    reports = any(task.masks and task.policy.logprobs is not None for task in tasks)
    raw_BV = logits_BV.clone() if reports else None
    apply_masks(logits_BV, enumerate(bits))
    drafts: dict[int, DraftToken] = {}
    for members in _groups(tasks):
        rows = slice(None) if len(members) == len(tasks) else members
        raw = None if raw_BV is None else raw_BV[rows]
        found = _draft(logits_BV[rows], [tasks[i] for i in members], raw_BV=raw)
        drafts.update(zip(members, found, strict=True))
    for i, bits_1W in enumerate(bits):
        if bits_1W is not None and only_tokens(bits_1W)[0] is not None:
            drafts[i] = replace(drafts[i], forced=True)
    return [drafts[i] for i in range(len(tasks))]


def with_lost_mass(draft: DraftToken, lost_mass: float) -> DraftToken:
    """Return a draft of a drafter some of whose tokens the expert has not.

    Its q is what is left, renormalised. How confident the drafter is must be read before that: what
    is lost counts as one more token, which is never the likeliest.

    Args:
        draft: From the distribution that is left.
        lost_mass: The probability, at temperature 1, of what is not.
    """
    if draft.forced or lost_mass == 0:
        return draft
    kept, stats, confidence = 1 - lost_mass, draft.draft_stats, draft.confidence
    if stats is not None:
        between = -sum(share * math.log(share) for share in (kept, lost_mass) if share > 0)
        stats = replace(
            stats, max_prob=kept * stats.max_prob, entropy=kept * stats.entropy + between
        )
    if confidence is not None:
        confidence = replace(confidence, probability=kept * confidence.probability)
    return replace(draft, draft_stats=stats, confidence=confidence, lost_mass=lost_mass)


def can_draw(task: DraftTask) -> bool:
    """Return whether the token of a task depends on no token before it but through the logits."""
    policy = task.policy
    return not (policy.sampling.counts_tokens or task.masks or policy.phases)


def draw(logits_BV: Tensor, tasks: Sequence[DraftTask]) -> Tensor:
    """Return the tokens `[B]` that `draft_step` drafts, on the device and without a read.

    Args:
        logits_BV: The drafter's raw logits.
        tasks: One task a row, each of which `can_draw`.
    """
    groups = _groups(tasks)
    drawn = [
        _draw(logits_BV[members] if len(groups) > 1 else logits_BV, [tasks[i] for i in members])
        for members in groups
    ]
    if len(groups) == 1:
        return drawn[0]
    order_B = torch.tensor([i for members in groups for i in members], device=logits_BV.device)
    return torch.empty_like(order_B).scatter_(0, order_B, torch.cat(drawn))


def _draw(logits_BV: Tensor, tasks: Sequence[DraftTask]) -> Tensor:
    """Return the tokens of tasks of one group."""
    q = process(logits_BV, [task.policy.sampling for task in tasks], [Context()] * len(tasks))
    if isinstance(q, OneHotProbs):
        return q.best_N
    return _choose(q, tasks).tokens_B1.squeeze(1)


def _allowed_bits(task: DraftTask, vocabulary: int) -> Bits | None:
    return allowed_bits(
        task.masks, task.answer, stop_ids=task.policy.stop_ids, vocabulary=vocabulary
    )


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
        forced=tuple(d.forced for d in inside) if any(d.forced for d in inside) else (),
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
    procedure = policy.sampling.greedy, is_gumbel(policy), is_blockwise(policy)
    samples = not policy.sampling.greedy and not is_gumbel(policy)
    return procedure, payload_spec(policy), draft_cut(policy), samples and task.purpose


def _groups(tasks: Sequence[DraftTask]) -> list[list[int]]:
    """Return the indices of tasks that are drafted in one batch, batch by batch."""
    if len(tasks) == 1:
        return [[0]]
    groups: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_group_key(task), []).append(i)
    return list(groups.values())


class _Choice(NamedTuple):
    """Tokens sampled from q, cut and rounded."""

    rows: SparseRows
    tokens_B1: Tensor
    likelihoods_B1: Tensor
    scores_BK: Tensor | None  # of which the largest was chosen


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Tokens with their likelihoods and the probabilities to send."""

    tokens_B: list[int]
    likelihoods_B: list[float]
    probs: Callable[[int], SparseProbs | None]
    scores_BK: Tensor | None = None  # of which the largest was chosen
    ids_BK: Tensor | None = None  # the tokens of the scores; None: the vocabulary


def _draft(
    logits_BV: Tensor, tasks: Sequence[DraftTask], *, raw_BV: Tensor | None
) -> list[DraftToken]:
    """Return the drafts of tasks of one group.

    Args:
        logits_BV: Logits with the masks of the tasks.
        tasks: One task a row.
        raw_BV: Without the masks, if log-probabilities are wanted and there are masks.
    """
    spec, count = payload_spec(tasks[0].policy), len(tasks)
    samplings = [task.policy.sampling for task in tasks]
    contexts = [Context(prompt=task.prompt, answer=task.answer) for task in tasks]
    q = process(logits_BV, samplings, contexts)
    q0 = None
    reports = any(task.policy.logprobs is not None for task in tasks)
    if spec.draft_stats or spec.unscaled or spec.unscaled_probs or reports:
        q0 = unscaled_probs(logits_BV, processed=q, samplings_N=samplings)
    stats = _draft_stats(q0, spec=spec) if q0 and spec.draft_stats else [None] * count
    if isinstance(q, SoftmaxProbs):
        sample = _sample(q, q0, tasks, spec=spec)
    else:
        sample = _greedy(q, q0, spec=spec)
    tokens_B = sample.tokens_B
    unscaled_B = _unscaled_at(q0, tokens_B) if spec.unscaled else [None] * count
    reported = q0 if raw_BV is None or not reports else unscaled_probs(raw_BV)
    logprobs_B = _logprobs(reported, tokens_B, tasks)
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
        probs=one_hot if spec.probs else lambda _: None,
    )


def _sample(
    q: SoftmaxProbs, q0: SoftmaxProbs | None, tasks: Sequence[DraftTask], *, spec: PayloadSpec
) -> _Sample:
    """Return tokens sampled from q, cut and rounded."""
    rows, token_B1, likelihood_B1, scores_BK = _choose(q, tasks)
    return _Sample(
        tokens_B=to_list(token_B1.squeeze(1)),
        likelihoods_B=to_list(likelihood_B1.squeeze(1)),
        probs=_rows_to_send(rows, q0, spec=spec) if spec.probs else lambda _: None,
        scores_BK=scores_BK,
        ids_BK=None if scores_BK is None else rows.ids_NK,
    )


def _choose(q: SoftmaxProbs, tasks: Sequence[DraftTask]) -> _Choice:
    """Return sampled tokens, still on the device."""
    policy, cut = tasks[0].policy, draft_cut(tasks[0].policy)
    ids_BK, q_BK = q.likeliest(cut.entries)
    rows = sparsify(q_BK, cut, ids_NK=ids_BK, vocab=q.logits_NV.shape[1])
    ids_BK, weights = rows.ids_NK, Weights(weights_NK=rows.weights_NK.to(q_BK.dtype))
    weights_BK = weights.weights_NK
    scores_BK: Tensor | None = None
    if is_gumbel(policy):
        seeds_B, positions_B = [t.policy.seed for t in tasks], [t.position for t in tasks]
        if ids_BK is None:
            noise_BK = rng.gumbel_noise(seeds_B, positions_B, q_BK.shape[1], q_BK.device)
        else:
            noise_BK = rng.gumbel_noise_at(seeds_B, positions_B, ids_BK)
        scores_BK = weights_BK.log() + noise_BK
        index_B1 = scores_BK.argmax(dim=1, keepdim=True)
    else:
        index_B1 = weights.inverse_cdf(_draft_uniforms(tasks))[:, None]
    token_B1 = index_B1 if ids_BK is None else ids_BK.gather(1, index_B1)
    likelihood_B1 = weights_BK.gather(1, index_B1) / weights.totals[:, None]
    return _Choice(rows, token_B1, likelihood_B1, scores_BK)


def _rows_to_send(
    rows: SparseRows, q0: SoftmaxProbs | None, *, spec: PayloadSpec
) -> Callable[[int], SparseProbs]:
    """Return the function that makes the message of a session's distribution."""
    ids_BK, q0_BK = rows.ids_NK, None
    if q0 is not None and spec.unscaled_probs:
        q0_BK = to_cpu(q0.dense() if ids_BK is None else q0.at(ids_BK))
    local = SparseRows(
        ids_NK=None if ids_BK is None else to_cpu(ids_BK), weights_NK=to_cpu(rows.weights_NK)
    )
    return lambda i: local.row(i, unscaled_K=None if q0_BK is None else q0_BK[i])


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
