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
from cascade.sampling.probs import Law, Soft, is_plain, process, unscaled
from cascade.sampling.rng import Purpose
from cascade.sampling.sampler import Weights, logprobs
from cascade.sampling.sparse_probs import ABSENT, Sparse, one_hot, sparsify
from cascade.sampling.tensor_ops import bring, fetch
from cascade.speculation.confidence import Outlook, outlooks
from cascade.speculation.payload import Needs, Rows, is_blockwise, is_gumbel, needs
from cascade.speculation.target_distribution import defers
from cascade.types import Block, Gates, Policy, Row, RowFormat, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftTask:
    """One token to draft: where, under which policy, after which tokens."""

    policy: Policy
    position: int  # committed and drafted tokens before this one
    start: int  # position at which the block began
    prompt: Sequence[int] = ()  # read if the sampling counts tokens
    answer: Sequence[int] = ()  # committed and drafted tokens, likewise
    purpose: Purpose = Purpose.DRAFT  # EMIT guesses what the expert's coin will choose
    weighed: bool = False  # tell how likely the token is to stand, and what else might


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A drafted token, what the expert needs to know of its row, and what is to be expected."""

    token: int
    likelihood: float = 1.0
    unscaled: float | None = None
    gates: Gates | None = None
    row: Row | None = None
    logprob: TokenLogprob | None = None
    outlook: Outlook | None = None


def draft_step(
    logits_BV: Tensor, tasks: Sequence[DraftTask], *, vocab_limit: int | None = None
) -> list[Draft]:
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
    drafts: dict[int, Draft] = {}
    for members in groups.values():
        rows_BV = logits_BV if len(members) == len(tasks) else logits_BV[members]
        drafts.update(zip(members, _draft(rows_BV, [tasks[i] for i in members]), strict=True))
    return [drafts[i] for i in range(len(tasks))]


def block_of(drafts: Sequence[Draft], *, length: int | None = None) -> Block:
    """Return the drafts as a block of `length` tokens; one draft more is the row after it."""
    length = len(drafts) if length is None else length
    inside = drafts[:length]
    return Block(
        tokens=tuple(d.token for d in inside),
        likelihoods=tuple(d.likelihood for d in inside),
        unscaled=tuple(d.unscaled for d in inside if d.unscaled is not None),
        gates=tuple(d.gates for d in drafts if d.gates is not None),
        rows=tuple(d.row for d in drafts if d.row is not None),
        logprobs=tuple(d.logprob for d in inside if d.logprob is not None),
    )


def defers_alone(policy: Policy, draft: Draft) -> bool:
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
    return procedure, needs(policy), form, rule, tossed and task.purpose


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sample:
    """Tokens with their likelihoods, and the row each came from, if it is to be shipped."""

    tokens_B: list[int]
    likelihoods_B: list[float]
    row: Callable[[int], Row | None]
    scores_BK: Tensor | None = None  # of which the largest was chosen
    ids_BK: Tensor | None = None  # the tokens that have scores; all of the vocabulary if absent


def _draft(logits_BV: Tensor, tasks: Sequence[DraftTask]) -> list[Draft]:
    """Return the drafts of sessions of one kind."""
    policy, need = tasks[0].policy, needs(tasks[0].policy)
    law = process(logits_BV, [t.policy.sampling for t in tasks], [_context(t) for t in tasks])
    raw = _unscaled_if(logits_BV, law, tasks, need=need)
    gates = _gates(raw, need=need) if raw and need.gates else [None] * len(tasks)
    if isinstance(law, Soft):
        sample = _sample(law, raw, tasks, shipped_B=_shipped(policy, need, gates))
    else:
        sample = _greedy(fetch(law.best_N), raw, need=need)
    unscaled_B = _unscaled_at(raw, sample.tokens_B) if need.unscaled else [None] * len(tasks)
    logprobs_B = _logprobs(raw, sample.tokens_B, tasks)
    outlook_B = _outlooks(logits_BV, sample, tasks)
    return [
        Draft(
            token=sample.tokens_B[i],
            likelihood=sample.likelihoods_B[i],
            unscaled=unscaled_B[i],
            gates=gates[i],
            row=sample.row(i),
            logprob=logprobs_B[i],
            outlook=outlook_B[i],
        )
        for i in range(len(tasks))
    ]


def _outlooks(
    logits_BV: Tensor, sample: _Sample, tasks: Sequence[DraftTask]
) -> Sequence[Outlook | None]:
    """Return what is to be expected of each token, if any is to be weighed."""
    if not any(task.weighed for task in tasks):
        return [None] * len(tasks)
    return outlooks(logits_BV, sample.tokens_B, scores_BK=sample.scores_BK, ids_BK=sample.ids_BK)


def _context(task: DraftTask) -> Context:
    """Return what penalties count."""
    return Context(prompt=task.prompt, answer=task.answer)


def _unscaled_if(
    logits_BV: Tensor, law: Law, tasks: Sequence[DraftTask], *, need: Needs
) -> Soft | None:
    """Return the unscaled rows if anything reads them; a plain law is its own."""
    asked = any(t.policy.logprobs is not None for t in tasks)
    if not (need.gates or need.unscaled or need.row_unscaled or asked):
        return None
    if isinstance(law, Soft) and all(is_plain(t.policy.sampling) for t in tasks):
        return law
    return unscaled(logits_BV)


def _gates(raw: Soft, *, need: Needs) -> list[Gates | None]:
    """Return the gates of each row."""
    peaks, favourites = fetch(raw.peaks()), fetch(raw.favourites())
    entropies = fetch(raw.entropies()) if need.entropy else [0.0] * len(peaks)
    return [
        Gates(peak=peak, favourite=favourite, entropy=entropy)
        for peak, favourite, entropy in zip(peaks, favourites, entropies, strict=True)
    ]


def _shipped(policy: Policy, need: Needs, gates: Sequence[Gates | None]) -> list[bool]:
    """Return which sessions' rows are shipped."""
    if need.rows is not Rows.DEFERRED:
        return [need.rows is Rows.ALL] * len(gates)
    assert isinstance(policy.rule, Chow | ChowLog), "only these rules decide before the expert"
    return [defers(policy.rule, g) for g in gates if g is not None]


def _greedy(tokens_B: list[int], raw: Soft | None, *, need: Needs) -> _Sample:
    """Return the favourites, each certain."""
    q0_B = _unscaled_at(raw, tokens_B) if need.row_unscaled else [None] * len(tokens_B)
    return _Sample(
        tokens_B=tokens_B,
        likelihoods_B=[1.0] * len(tokens_B),
        row=lambda i: one_hot(tokens_B[i], unscaled=q0_B[i]) if need.rows is Rows.ALL else None,
    )


def _sample(
    law: Soft, raw: Soft | None, tasks: Sequence[DraftTask], *, shipped_B: list[bool]
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


def _sample_whole(law: Soft, tasks: Sequence[DraftTask]) -> _Sample:
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
        token_B = Weights(weights_NK=q_BV).invert(_draft_coins(tasks))
        likelihood_B = q_BV.gather(1, token_B[:, None])
    absent = ABSENT if needs(tasks[0].policy).rows is Rows.DEFERRED else None
    return _Sample(
        tokens_B=fetch(token_B),
        likelihoods_B=fetch(likelihood_B.squeeze(1)),
        row=lambda _: absent,
        scores_BK=scores_BV,
    )


def _sample_shipped(law: Soft, raw: Soft | None, tasks: Sequence[DraftTask]) -> _Sample:
    """Return tokens drawn from rows truncated and quantised as the wire carries them."""
    policy = tasks[0].policy
    q_BV = law.dense()
    full = policy.rows is RowFormat.FULL
    sparse = sparsify(q_BV, q_BV.shape[1] if full else policy.row_entries)
    q_BK = sparse.law(q_BV.dtype)
    scores_BK: Tensor | None = None
    if is_gumbel(policy):
        seeds_B, positions_B = [t.policy.seed for t in tasks], [t.position for t in tasks]
        scores_BK = q_BK.log() + rng.noise_at(seeds_B, positions_B, sparse.ids_NK)
        index_B = scores_BK.argmax(dim=1)
    else:
        index_B = Weights(weights_NK=q_BK).invert(_draft_coins(tasks))
    q0_BK = bring(raw.at(sparse.ids_NK)) if raw and needs(policy).row_unscaled else None
    local = Sparse(ids_NK=bring(sparse.ids_NK), weights_NK=bring(sparse.weights_NK))
    return _Sample(
        tokens_B=fetch(sparse.ids_NK.gather(1, index_B[:, None]).squeeze(1)),
        likelihoods_B=fetch(q_BK.gather(1, index_B[:, None]).squeeze(1)),
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


def _unscaled_at(raw: Soft | None, tokens_B: Sequence[int]) -> list[float | None]:
    """Return q0 of the drafted tokens."""
    assert raw is not None, "the policy reads q0"
    ids_B1 = torch.tensor(tokens_B, device=raw.logits_NV.device)[:, None]
    return fetch(raw.at(ids_B1).squeeze(1))


def _logprobs(
    raw: Soft | None, tokens_B: Sequence[int], tasks: Sequence[DraftTask]
) -> list[TokenLogprob | None]:
    """Return the log-probabilities of those sessions that ask for them."""
    asked = [t.policy.logprobs for t in tasks]
    if raw is None or all(top is None for top in asked):
        return [None] * len(tasks)
    found = logprobs(raw, tokens_B, [top or 0 for top in asked])
    return [f if top is not None else None for f, top in zip(found, asked, strict=True)]
