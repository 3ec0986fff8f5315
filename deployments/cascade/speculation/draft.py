"""What the drafter does with its logits: one token of each of many sessions at once.

Shapes: `B` sessions, `K` entries of a sparse row, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.rules import Chow, ChowLog
from cascade.sampling import rng
from cascade.sampling.penalties import Context
from cascade.sampling.probs import Probs, SoftmaxProbs, is_plain, process, unscaled
from cascade.sampling.rng import Purpose
from cascade.sampling.sampler import Weights, logprobs
from cascade.sampling.sparse_probs import ABSENT, SparseRows, one_hot, sparsify
from cascade.sampling.tensor_ops import to_cpu, to_list
from cascade.speculation.confidence import TokenConfidence, outlooks
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
    """One token to draft: where, under which policy, after which tokens."""

    policy: DecodingParams
    position: int  # committed and drafted tokens before this one
    start: int  # position at which the block began
    prompt: Sequence[int] = ()  # read if the sampling counts tokens
    answer: Sequence[int] = ()  # committed and drafted tokens, likewise
    purpose: Purpose = Purpose.DRAFT  # EMIT guesses what the expert's coin will choose
    weighed: bool = False  # tell how likely the token is to stand, and what else might


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftToken:
    """A drafted token, what the expert needs to know of its row, and what is to be expected."""

    token: int
    likelihood: float = 1.0
    unscaled: float | None = None
    gates: DraftStats | None = None
    row: SparseProbs | None = None
    logprob: TokenLogprob | None = None
    confidence: TokenConfidence | None = None


def draft_step(
    logits_BV: Tensor, tasks: Sequence[DraftTask], *, vocab_limit: int | None = None
) -> list[DraftToken]:
    """Return a drafted token for each row of logits.

    The token follows exactly the law that is reported: where the row is shipped truncated and
    quantised, the token is drawn from the row as shipped.

    Args:
        logits_BV: The drafter's raw logits, any float type, any device.
        tasks: One task a row.
        vocab_limit: Tokens from here on are padding of the vocabulary and impossible.
    """
    assert len(tasks) == logits_BV.shape[0], "one task a row"
    logits_BV = logits_BV[:, :vocab_limit]
    groups: dict[Hashable, list[int]] = {}
    for i, task in enumerate(tasks):
        groups.setdefault(_kind(task), []).append(i)
    drafts: dict[int, DraftToken] = {}
    for members in groups.values():
        rows_BV = logits_BV if len(members) == len(tasks) else logits_BV[members]
        drafts.update(zip(members, _draft(rows_BV, [tasks[i] for i in members]), strict=True))
    return [drafts[i] for i in range(len(tasks))]


def block_of(drafts: Sequence[DraftToken], *, length: int | None = None) -> Block:
    """Return the drafts as a block of `length` tokens; one draft more is the row after it."""
    length = len(drafts) if length is None else length
    inside = drafts[:length]
    return Block(
        tokens=tuple(d.token for d in inside),
        likelihoods=tuple(d.likelihood for d in inside),
        unscaled=tuple(d.unscaled for d in inside if d.unscaled is not None),
        draft_stats=tuple(d.gates for d in drafts if d.gates is not None),
        rows=tuple(d.row for d in drafts if d.row is not None),
        logprobs=tuple(d.logprob for d in inside if d.logprob is not None),
    )


def defers_alone(policy: DecodingParams, draft: DraftToken) -> bool:
    """Return whether the rule reads the drafter alone and gives this token to the expert."""
    if not isinstance(policy.rule, Chow | ChowLog):
        return False
    assert draft.gates is not None, "the rule's gates are part of every draft"
    return defers(policy.rule, draft.gates)


def _kind(task: DraftTask) -> Hashable:
    """Return what two tasks must share to be drafted in one batch."""
    policy = task.policy
    rule = policy.rule if isinstance(policy.rule, Chow | ChowLog) else None
    form = (policy.rows is RowFormat.FULL, policy.row_entries)
    procedure = policy.sampling.greedy, is_gumbel(policy), is_blockwise(policy)
    tossed = not policy.sampling.greedy and not is_gumbel(policy)
    return procedure, payload_spec(policy), form, rule, tossed and task.purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Tokens with their likelihoods, and the row each came from, if it is to be shipped."""

    tokens_B: list[int]
    likelihoods_B: list[float]
    row: Callable[[int], SparseProbs | None]
    scores_BK: Tensor | None = None  # of which the largest was chosen
    ids_BK: Tensor | None = None  # the tokens that have scores; all of the vocabulary if absent


def _draft(logits_BV: Tensor, tasks: Sequence[DraftTask]) -> list[DraftToken]:
    """Return the drafts of sessions of one kind."""
    policy, need = tasks[0].policy, payload_spec(tasks[0].policy)
    law = process(logits_BV, [t.policy.sampling for t in tasks], [_context(t) for t in tasks])
    raw = _unscaled_if(logits_BV, law, tasks, need=need)
    gates = _gates(raw, need=need) if raw and need.draft_stats else [None] * len(tasks)
    if isinstance(law, SoftmaxProbs):
        sample = _sample(law, raw, tasks, shipped_B=_shipped(policy, need, gates))
    else:
        sample = _greedy(to_list(law.best_N), raw, need=need)
    unscaled_B = _unscaled_at(raw, sample.tokens_B) if need.unscaled else [None] * len(tasks)
    logprobs_B = _logprobs(raw, sample.tokens_B, tasks)
    outlook_B = _outlooks(logits_BV, sample, tasks)
    return [
        DraftToken(
            token=sample.tokens_B[i],
            likelihood=sample.likelihoods_B[i],
            unscaled=unscaled_B[i],
            gates=gates[i],
            row=sample.row(i),
            logprob=logprobs_B[i],
            confidence=outlook_B[i],
        )
        for i in range(len(tasks))
    ]


def _outlooks(
    logits_BV: Tensor, sample: _Sample, tasks: Sequence[DraftTask]
) -> Sequence[TokenConfidence | None]:
    """Return what is to be expected of each token, if any is to be weighed."""
    if not any(task.weighed for task in tasks):
        return [None] * len(tasks)
    return outlooks(logits_BV, sample.tokens_B, scores_BK=sample.scores_BK, ids_BK=sample.ids_BK)


def _context(task: DraftTask) -> Context:
    """Return what penalties count."""
    return Context(prompt=task.prompt, answer=task.answer)


def _unscaled_if(
    logits_BV: Tensor, law: Probs, tasks: Sequence[DraftTask], *, need: PayloadSpec
) -> SoftmaxProbs | None:
    """Return the unscaled rows if anything reads them; a plain law is its own."""
    asked = any(t.policy.logprobs is not None for t in tasks)
    if not (need.draft_stats or need.unscaled or need.row_unscaled or asked):
        return None
    if isinstance(law, SoftmaxProbs) and all(is_plain(t.policy.sampling) for t in tasks):
        return law
    return unscaled(logits_BV)


def _gates(raw: SoftmaxProbs, *, need: PayloadSpec) -> list[DraftStats | None]:
    """Return the gates of each row."""
    peaks, favourites = to_list(raw.peaks()), to_list(raw.favourites())
    entropies = to_list(raw.entropies()) if need.entropy else [0.0] * len(peaks)
    return [
        DraftStats(peak=peak, favourite=favourite, entropy=entropy)
        for peak, favourite, entropy in zip(peaks, favourites, entropies, strict=True)
    ]


def _shipped(
    policy: DecodingParams, need: PayloadSpec, gates: Sequence[DraftStats | None]
) -> list[bool]:
    """Return which sessions' rows are shipped."""
    if need.rows is not ProbsPayload.DEFERRED:
        return [need.rows is ProbsPayload.ALL] * len(gates)
    assert isinstance(policy.rule, Chow | ChowLog), "only these rules decide before the expert"
    return [defers(policy.rule, g) for g in gates if g is not None]


def _greedy(tokens_B: list[int], raw: SoftmaxProbs | None, *, need: PayloadSpec) -> _Sample:
    """Return the favourites, each certain."""
    q0_B = _unscaled_at(raw, tokens_B) if need.row_unscaled else [None] * len(tokens_B)
    return _Sample(
        tokens_B=tokens_B,
        likelihoods_B=[1.0] * len(tokens_B),
        row=lambda i: (
            one_hot(tokens_B[i], unscaled=q0_B[i]) if need.rows is ProbsPayload.ALL else None
        ),
    )


def _sample(
    law: SoftmaxProbs,
    raw: SoftmaxProbs | None,
    tasks: Sequence[DraftTask],
    *,
    shipped_B: list[bool],
) -> _Sample:
    """Return tokens drawn from the rows as shipped, and from the whole row where none is."""
    if all(shipped_B):
        return _sample_shipped(law, raw, tasks)
    if not any(shipped_B):
        return _sample_whole(law, tasks)
    parts: dict[bool, _Sample] = {}
    places: dict[int, tuple[_Sample, int]] = {}
    for shipped in (True, False):
        members = [i for i, s in enumerate(shipped_B) if s is shipped]
        chosen_E = torch.tensor(members, device=law.logits_NV.device)
        chosen = [tasks[i] for i in members]
        some_raw = None if raw is None else raw.rows(chosen_E)
        parts[shipped] = _sample(
            law.rows(chosen_E), some_raw, chosen, shipped_B=[shipped] * len(members)
        )
        places |= {i: (parts[shipped], k) for k, i in enumerate(members)}
    found = [places[i] for i in range(len(tasks))]
    return _Sample(
        tokens_B=[part.tokens_B[k] for part, k in found],
        likelihoods_B=[part.likelihoods_B[k] for part, k in found],
        row=lambda i: found[i][0].row(found[i][1]) or ABSENT,
    )


def _sample_whole(law: SoftmaxProbs, tasks: Sequence[DraftTask]) -> _Sample:
    """Return tokens drawn from the whole processed row; likelihoods with them."""
    scores_BV: Tensor | None = None
    if is_gumbel(tasks[0].policy):
        seeds_B, positions_B = [t.policy.seed for t in tasks], [t.position for t in tasks]
        log_BV = law.log_dense()
        noise_BV = rng.noise(seeds_B, positions_B, log_BV.shape[1], log_BV.device)
        scores_BV = log_BV + noise_BV
        token_B = scores_BV.argmax(dim=1)
        likelihood_B = log_BV.gather(1, token_B[:, None]).exp()
    else:
        q_BV = law.dense()
        token_B = Weights(weights_NK=q_BV).inverse_cdf(_draft_coins(tasks))
        likelihood_B = q_BV.gather(1, token_B[:, None])
    absent = ABSENT if payload_spec(tasks[0].policy).rows is ProbsPayload.DEFERRED else None
    return _Sample(
        tokens_B=to_list(token_B),
        likelihoods_B=to_list(likelihood_B.squeeze(1)),
        row=lambda _: absent,
        scores_BK=scores_BV,
    )


def _sample_shipped(
    law: SoftmaxProbs, raw: SoftmaxProbs | None, tasks: Sequence[DraftTask]
) -> _Sample:
    """Return tokens drawn from rows truncated and quantised as the wire carries them."""
    policy = tasks[0].policy
    q_BV = law.dense()
    full = policy.rows is RowFormat.FULL
    sparse = sparsify(q_BV, q_BV.shape[1] if full else policy.row_entries)
    q_BK = sparse.probs(q_BV.dtype)
    scores_BK: Tensor | None = None
    if is_gumbel(policy):
        seeds_B, positions_B = [t.policy.seed for t in tasks], [t.position for t in tasks]
        scores_BK = q_BK.log() + rng.noise_at(seeds_B, positions_B, sparse.ids_NK)
        index_B = scores_BK.argmax(dim=1)
    else:
        index_B = Weights(weights_NK=q_BK).inverse_cdf(_draft_coins(tasks))
    q0_BK = to_cpu(raw.at(sparse.ids_NK)) if raw and payload_spec(policy).row_unscaled else None
    local = SparseRows(ids_NK=to_cpu(sparse.ids_NK), weights_NK=to_cpu(sparse.weights_NK))
    return _Sample(
        tokens_B=to_list(sparse.ids_NK.gather(1, index_B[:, None]).squeeze(1)),
        likelihoods_B=to_list(q_BK.gather(1, index_B[:, None]).squeeze(1)),
        row=lambda i: local.row(i, full=full, unscaled_K=None if q0_BK is None else q0_BK[i]),
        scores_BK=scores_BK,
        ids_BK=None if scores_BK is None else sparse.ids_NK,
    )


def _draft_coins(tasks: Sequence[DraftTask]) -> Tensor:
    """Return the coin that decides each drafted token; sessions of one kind agree on blocks."""
    return rng.uniforms(
        [t.policy.seed for t in tasks],
        [t.position for t in tasks],
        tasks[0].purpose,
        starts_N=[t.start for t in tasks] if is_blockwise(tasks[0].policy) else None,
    )


def _unscaled_at(raw: SoftmaxProbs | None, tokens_B: Sequence[int]) -> list[float | None]:
    """Return q0 of the drafted tokens."""
    assert raw is not None, "the policy reads q0"
    ids_B1 = torch.tensor(tokens_B, device=raw.logits_NV.device)[:, None]
    return to_list(raw.at(ids_B1).squeeze(1))


def _logprobs(
    raw: SoftmaxProbs | None, tokens_B: Sequence[int], tasks: Sequence[DraftTask]
) -> list[TokenLogprob | None]:
    """Return the log-probabilities of those sessions that ask for them."""
    asked = [t.policy.logprobs for t in tasks]
    if raw is None or all(top is None for top in asked):
        return [None] * len(tasks)
    found = logprobs(raw, tokens_B, [top or 0 for top in asked])
    return [f if top is not None else None for f, top in zip(found, asked, strict=True)]
