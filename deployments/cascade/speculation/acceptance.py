"""The three procedures that judge a batch of blocks: token by token, block by block, Gumbel.

Token and block verification accept drafted tokens of q and sample the next token so that what is
committed follows the target distribution pi. The Gumbel coupling shares noise g between the models
and commits argmax(log pi + g).

Only the distribution of the next token is computed over the whole vocabulary, one row for each
token that is emitted.

Shapes: `N` rows of logits, `M` judged positions, `E` emitted tokens or chosen rows, `K` tokens of
the drafter's support, `B` tasks, `C` rows of one chunk, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cascade.rules import Ensemble, Lossless, PositionRule
from cascade.sampling import rng
from cascade.sampling.probs import OneHotProbs, SoftmaxProbs
from cascade.sampling.rng import Purpose
from cascade.sampling.sampler import Weights
from cascade.sampling.tensor_ops import to_list
from cascade.speculation.payload import is_blockwise
from cascade.types import Origin, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.speculation.judged_positions import Target
    from cascade.speculation.verify_batch import VerifyBatch

# Logits and noise of this many tokens at a time stay in cache.
_CHUNK_TOKENS = 1 << 18


def verify_tokens(batch: VerifyBatch) -> list[Verdict]:
    """Return the verdicts of verification token by token.

    A drafted token is accepted with probability min(1, pi / q), and a rejected one is replaced from
    norm((pi - q)+). Where ids alone are sent, q is a one-hot at the drafted token: an acceptable
    token is accepted, any other is accepted if a sample of p equals it, and else replaced by that
    sample.
    """
    accept_M, next_N = _uniforms(batch)
    accepted_M = accept_M < accept_probabilities(batch)
    flags = _read_flags(batch, accepted_M, lambda: accept_M < batch.lossless_ratios())
    return _verdicts(
        batch, _accepted_counts(batch, flags), flags, lambda wanted: _sample(batch, wanted, next_N)
    )


def verify_block(batch: VerifyBatch) -> list[Verdict]:
    """Return the verdicts of block verification: accept the longest prefix i with u_i < h_i."""
    (accept_M, next_N), prefixes = _uniforms(batch), prefix_acceptance(batch)
    uniforms_M = to_list(accept_M)
    accepted = [
        max([0, *(i + 1 for i, h in enumerate(hs) if uniforms_M[start + i] < h)])
        for start, hs in zip(batch.judged_offsets[:-1], prefixes.probabilities, strict=True)
    ]
    every_M = torch.ones_like(accept_M, dtype=torch.bool)
    flags = _read_flags(batch, every_M, lambda: accept_M < batch.lossless_ratios())
    return _verdicts(
        batch,
        accepted,
        flags,
        lambda wanted: _sample(batch, wanted, next_N),
        factors=prefixes.factors,
    )


def verify_gumbel(batch: VerifyBatch) -> list[Verdict]:
    """Return the verdicts under shared noise: a token is accepted iff it is argmax(log pi + g)."""
    expert_N, chosen_N = gumbel_argmax(batch)
    rows_M = torch.tensor(batch.row_M, dtype=torch.int64, device=expert_N.device)
    token_M = torch.tensor(batch.token_M, dtype=torch.int64, device=expert_N.device)
    flags = _read_flags(batch, chosen_N[rows_M] == token_M, lambda: expert_N[rows_M] == token_M)
    chosen = to_list(chosen_N)
    return _verdicts(
        batch, _accepted_counts(batch, flags), flags, lambda wanted: [chosen[e.row] for e in wanted]
    )


def accept_probabilities(batch: VerifyBatch) -> Tensor:
    """Return the probability with which each drafted token is accepted on its own, float64 [M]."""
    return batch.ratios().clamp_max(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixAcceptance:
    """Block verification of each task: for prefixes 1 .. L, and the factors p_0 .. p_L."""

    probabilities: list[list[float]]  # h_i: prefix i is accepted if no longer one is
    factors: list[list[float]]


def prefix_acceptance(batch: VerifyBatch) -> PrefixAcceptance:
    """Return h_i and p_i of arXiv 2403.10444, with pi in place of the target model."""
    ratio_M = batch.ratios()
    factor_B = torch.ones(len(batch.tasks), dtype=torch.float64, device=ratio_M.device)
    factors, prefixes = [factor_B], list[Tensor]()
    for j in range(max(batch.lengths)):
        positions = [min(start + j, len(ratio_M) - 1) for start in batch.judged_offsets[:-1]]
        target = batch.target_at(positions)
        pi_BK, q_BK = target.pi_EK.double(), target.q_EK.double()
        residual_BK = (factor_B[:, None] * pi_BK - q_BK).clamp_min(0)
        outside_B = target.outside_E.double() * target.tail_E.double()
        gain_B = residual_BK.sum(dim=1) + factor_B * outside_B
        # A certain prefix is accepted: 0 / 0 where nothing is gained by stopping at it.
        prefixes.append(torch.where(factor_B < 1, gain_B / (gain_B + 1 - factor_B), 1.0))
        index_B = torch.tensor(positions, device=ratio_M.device)
        factor_B = (factor_B * ratio_M[index_B]).clamp_max(1)
        factors.append(factor_B)
    h, p = to_list(torch.stack([torch.stack([*prefixes, factor_B]).T, torch.stack(factors).T]))
    return PrefixAcceptance(
        probabilities=[[*h[i][1:n], p[i][n]] if n else [] for i, n in enumerate(batch.lengths)],
        factors=[p[i][: n + 1] for i, n in enumerate(batch.lengths)],
    )


def _uniforms(batch: VerifyBatch) -> tuple[Tensor, Tensor]:
    """Return the numbers that accept drafted tokens [M] and that choose next tokens [N], float64.

    They are generated together, and are zeros where none matters.
    """
    like = batch.logits_NV.new_empty(0, dtype=torch.float64)
    if _is_deterministic(batch):
        return like.new_zeros(len(batch.token_M)), like.new_zeros(len(batch.logits_NV))
    seeds, positions, starts = list[int](), list[int](), list[int]()
    for task, (first, end) in zip(batch.tasks, pairwise(batch.row_offsets), strict=True):
        seeds += [task.policy.seed] * (end - first)
        positions += range(task.position, task.position + end - first)
        starts += [task.position] * (end - first)
    accept_N, next_N = rng.uniforms(
        seeds,
        positions,
        Purpose.ACCEPT,
        Purpose.NEXT_TOKEN,
        block_starts_N=starts if is_blockwise(batch.policy) else None,
    )
    accept_M = accept_N[torch.tensor(batch.row_M, dtype=torch.int64)]
    return accept_M.to(like.device), next_N.to(like.device)


def _is_deterministic(batch: VerifyBatch) -> bool:
    """Whether no random number matters: at temperature 0, unless the rule mixes both models."""
    return batch.policy.sampling.greedy and not isinstance(batch.policy.rule, Ensemble)


@dataclass(frozen=True, slots=True)
class _Flags:
    """What is known of each judged position."""

    accepted: list[bool]
    shared: list[bool]  # lossless verification would accept the token too
    divergences: list[float | None]  # None where q is not known and would matter
    spent: list[bool]  # the divergence budget is
    deferred: list[bool] | None = None  # None: a rejection counts as a deferral


def _read_flags(batch: VerifyBatch, accepted_M: Tensor, shared: Callable[[], Tensor]) -> _Flags:
    """Return the flags, read from the device at once; in lossless mode every token is shared."""
    if isinstance(batch.policy.rule, Lossless):
        accepted = to_list(accepted_M)
        return _Flags(accepted, accepted, [0.0] * len(accepted), [False] * len(accepted))
    divergence_M = batch.divergence
    spent_M = torch.zeros_like(accepted_M)
    if batch.within_budget is not None:
        spent_M = ~batch.within_budget
        divergence_M = divergence_M.masked_fill(spent_M, 0.0)
    flags = [divergence_M, accepted_M, shared(), spent_M]
    if batch.deferred is not None:
        flags.append(batch.deferred)
    divergences, *found = to_list(torch.stack([one.double() for one in flags]))
    accepted, shared_, spent, *deferred = [[bool(one) for one in flag] for flag in found]
    follows_p = deferred[0] if isinstance(batch.policy.rule, PositionRule) else spent
    known = [a or b for a, b in zip(batch.knows_q(), follows_p, strict=True)]
    return _Flags(
        accepted,
        shared_,
        [one if is_known else None for one, is_known in zip(divergences, known, strict=True)],
        spent,
        *deferred,
    )


def _accepted_counts(batch: VerifyBatch, flags: _Flags) -> list[int]:
    """Return how many tokens of each task are accepted before the first that is not."""
    starts = zip(batch.judged_offsets, batch.lengths, strict=False)
    return [sum(takewhile(bool, flags.accepted[start : start + n])) for start, n in starts]


@dataclass(frozen=True, slots=True, kw_only=True)
class NextToken:
    """One token to sample: from p, from pi, or from norm((factor pi - q)+)."""

    row: int  # of logits
    judged: int | None = None  # the judged position whose pi it follows; None: it follows p
    factor: float = 1.0
    residual: bool = False


def next_token(
    batch: VerifyBatch, task: int, accepted: int, *, factor: float = 1.0
) -> NextToken | None:
    """Return what follows the accepted tokens: a recovered token, a bonus token or nothing.

    Args:
        batch: The tasks.
        task: Index of the task.
        accepted: Number of drafted tokens accepted.
        factor: Of pi in the residual, 0 to 1; less than 1 in block verification only.
    """
    rejected = accepted < batch.lengths[task]
    if not rejected and not batch.has_bonus[task]:
        return None
    return NextToken(
        row=batch.row_offsets[task] + accepted,
        judged=batch.judged(task, accepted),
        factor=factor if rejected else 1.0,
        residual=rejected,
    )


def _verdicts(
    batch: VerifyBatch,
    accepted: Sequence[int],
    flags: _Flags,
    draw: Callable[[Sequence[NextToken]], list[int]],
    *,
    factors: Sequence[Sequence[float]] | None = None,
) -> list[Verdict]:
    """Return the verdict on each task, without log-probabilities."""
    wanted = [
        next_token(batch, i, count, factor=factors[i][count] if factors else 1.0)
        for i, count in enumerate(accepted)
    ]
    drawn = iter(draw([one for one in wanted if one is not None]))
    verdicts = list[Verdict]()
    for i, (count, start) in enumerate(zip(accepted, batch.judged_offsets, strict=False)):
        last = () if wanted[i] is None else (next(drawn),)
        judged = min(count + 1, batch.lengths[i])
        deferred = flags.deferred
        verdicts.append(
            Verdict(
                accepted=count,
                tokens=batch.tasks[i].block.tokens[:count] + last,
                origins=(
                    *(Origin.DRAFTER if s else Origin.KEPT for s in flags.shared[start:][:count]),
                    *(Origin.EXPERT for _ in last),
                ),
                judged=judged,
                deferred=int(count < batch.lengths[i])
                if deferred is None
                else sum(deferred[start : start + judged]),
                **_divergence(batch, i, flags, committed=count + len(last)),
            )
        )
    return verdicts


def _divergence(batch: VerifyBatch, task: int, flags: _Flags, *, committed: int) -> dict[str, Any]:
    """Return the divergence of a task's tokens, and what is left of its budget after them.

    What follows a block is not judged where it follows p.
    """
    start, end = batch.judged_offsets[task : task + 2]
    found = flags.divergences[start:end][:committed]
    found += [0.0] * (committed - len(found))
    left = batch.tasks[task].divergence_left
    if left is not None:
        spent = any(flags.spent[start:end][:committed])
        left = 0.0 if spent else max(0.0, left - sum(one or 0.0 for one in found))
    return {"divergences": tuple(found), "divergence_left": left}


def _sample(batch: VerifyBatch, wanted: Sequence[NextToken], uniforms_N: Tensor) -> list[int]:
    """Return the next tokens."""
    if not wanted:
        return []
    rows_E = torch.tensor([e.row for e in wanted], device=batch.logits_NV.device)
    if _is_deterministic(batch):
        return to_list(_argmax(batch, wanted, rows_E))
    return to_list(next_token_weights(batch, wanted).inverse_cdf(uniforms_N[rows_E]))


def _argmax(batch: VerifyBatch, wanted: Sequence[NextToken], rows_E: Tensor) -> Tensor:
    """Return the next tokens at temperature 0: p's argmax, or the drafter's where pi keeps it."""
    assert isinstance(batch.p, OneHotProbs), "temperature 0 gives one-hots"
    device, token_E = rows_E.device, batch.p.best_N[rows_E]
    kept = [k for k, e in enumerate(wanted) if e.judged is not None and not e.residual]
    if kept:
        target = batch.target_at([wanted[k].judged or 0 for k in kept])
        drafted_J = best_J = target.pi_EK.argmax(dim=1)
        if target.ids_EK is not None:
            drafted_J = target.ids_EK.gather(1, best_J[:, None]).squeeze(1)
        kept_J = torch.tensor(kept, device=device)
        keeps_J = target.tail_E < 1
        token_E[kept_J] = torch.where(keeps_J, drafted_J, token_E[kept_J])
    return token_E


def next_token_weights(batch: VerifyBatch, wanted: Sequence[NextToken]) -> Weights:
    """Return the distributions of the next tokens, unnormalised, E rows over the vocabulary.

    A residual that rounding left empty is replaced by pi.
    """
    if all(e.judged is None for e in wanted):
        return Weights(weights_NK=batch.p.dense([e.row for e in wanted]))
    found = Weights(weights_NK=_dense_weights(batch, wanted))
    empty_E = found.totals <= 0
    if not to_list(empty_E.any()):
        return found
    whole = [replace(e, factor=1.0, residual=False) for e in wanted]
    whole_EV = _dense_weights(batch, whole)
    return Weights(weights_NK=torch.where(empty_E[:, None], whole_EV, found.weights_NK))


def _dense_weights(batch: VerifyBatch, wanted: Sequence[NextToken]) -> Tensor:
    """Return (factor pi - q)+ for residuals, else pi at judged positions, else p."""
    target = batch.target_at([e.judged or 0 for e in wanted])
    device = batch.logits_NV.device
    factor_E = target.q_EK.new_tensor([e.factor for e in wanted])
    minus_E = target.q_EK.new_tensor([float(e.residual) for e in wanted])
    on_EK = factor_E[:, None] * target.pi_EK - minus_E[:, None] * target.q_EK
    on_EK.clamp_min_(0)
    all_judged = all(e.judged is not None for e in wanted)
    if target.ids_EK is None and all_judged:
        return on_EK
    weights_EV = batch.p.dense([e.row for e in wanted])
    is_judged_E = torch.tensor([e.judged is not None for e in wanted], device=device)
    if not (isinstance(batch.policy.rule, Lossless) and all(e.factor == 1 for e in wanted)):
        weights_EV.mul_(torch.where(is_judged_E, factor_E * target.tail_E, 1.0)[:, None])
    return _overwrite(weights_EV, target, on_EK, None if all_judged else is_judged_E)


def _overwrite(
    weights_EV: Tensor, target: Target, values_EK: Tensor, rows_E: Tensor | None = None
) -> Tensor:
    """Return the weights with the values of the support written over them.

    Padding repeats a valid entry of its row, or the weight that is there if none is valid, so that
    no device value need be read to find the valid ones.

    Args:
        weights_EV: Overwritten.
        target: Whose support it is.
        values_EK: Of its tokens.
        rows_E: Which rows are overwritten, bool; None: all.
    """
    ids_EK, valid_EK = target.ids_EK, target.valid_EK
    if ids_EK is None:
        return values_EK if rows_E is None else torch.where(rows_E[:, None], values_EK, weights_EV)
    if rows_E is None and valid_EK is None:
        return weights_EV.scatter_(1, ids_EK, values_EK)
    if valid_EK is None:
        valid_EK = torch.ones_like(ids_EK, dtype=torch.bool)
    if rows_E is not None:
        valid_EK = valid_EK & rows_E[:, None]
    some_E1 = valid_EK.to(torch.int8).argmax(dim=1, keepdim=True)
    ids_EK = torch.where(valid_EK, ids_EK, ids_EK.gather(1, some_E1))
    values_EK = torch.where(valid_EK, values_EK, values_EK.gather(1, some_E1))
    any_E1 = valid_EK.any(dim=1, keepdim=True)
    return weights_EV.scatter_(
        1, ids_EK, torch.where(any_E1, values_EK, weights_EV.gather(1, ids_EK))
    )


def gumbel_argmax(batch: VerifyBatch) -> tuple[Tensor, Tensor]:
    """Return argmax(log p + g) and argmax(log pi + g) of every row of logits, int64 [N] each.

    At rows that are not judged, pi is p.
    """
    count, vocab = batch.logits_NV.shape
    step = max(1, _CHUNK_TOKENS // vocab)
    found = [
        _gumbel_chunk(batch, first, min(first + step, count)) for first in range(0, count, step)
    ]
    return torch.cat([expert for expert, _ in found]), torch.cat([chosen for _, chosen in found])


def _gumbel_chunk(batch: VerifyBatch, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Return what `gumbel_argmax` does, of the rows of logits from `first` to `end`."""
    assert isinstance(batch.p, SoftmaxProbs), "temperature 0 has no noise"
    device, vocab = batch.logits_NV.device, batch.logits_NV.shape[1]
    log_CV = batch.p.select(torch.arange(first, end, device=device)).log_dense()
    counters = [
        (task.policy.seed, task.position + j)
        for task, (start, stop) in zip(batch.tasks, pairwise(batch.row_offsets), strict=True)
        for j in range(stop - start)
    ][first:end]
    seeds, positions = [seed for seed, _ in counters], [position for _, position in counters]
    noise_CV = rng.gumbel_noise(seeds, positions, vocab, device).to(log_CV.dtype)
    expert_C = log_CV.add_(noise_CV).argmax(dim=1)
    judged = [(m, row) for m, row in enumerate(batch.row_M) if first <= row < end]
    if isinstance(batch.policy.rule, Lossless) or not judged:
        return expert_C, expert_C
    row_E = torch.tensor([row for _, row in judged], device=device)
    target = batch.target_at([m for m, _ in judged])
    pi_EV = target.pi_EK
    if target.ids_EK is not None:
        weights_EV = batch.p.select(row_E).dense() * target.tail_E[:, None]
        pi_EV = _overwrite(weights_EV, target, pi_EV)
    chosen_E = pi_EV.log().add_(noise_CV[row_E - first]).argmax(dim=1)
    return expert_C, expert_C.index_copy(0, row_E - first, chosen_E)
