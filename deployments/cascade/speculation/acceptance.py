"""Who wins under shared noise: argmax(log p + g), and argmax(log pi + g).

Shapes: `N` rows of logits, `C` rows of one chunk, `V` vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.rules import Ensemble, Lossless
from cascade.sampling import rng
from cascade.sampling.rng import Purpose
from cascade.sampling.tensor_ops import to_list
from cascade.speculation.payload import is_blockwise
from cascade.speculation.residual import NextToken, dense_target, next_token_weights
from cascade.speculation.verify_batch import quotient
from cascade.types import Origin

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.speculation.verify_batch import VerifyBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifyOutcome:
    """What became of one block."""

    accepted: int
    origins: tuple[Origin, ...]  # of the accepted tokens
    judged: int
    deferred: int
    emitted: int | None  # correction or bonus


def verify_tokens(bench: VerifyBatch) -> list[VerifyOutcome]:
    """Return the outcome of verification token by token.

    A draft stands with probability min(1, pi / q), and norm((pi - q)+) follows a refusal. In the
    form without rows q is a one-hot at the draft: an acceptable token stands, any other stands if a
    fresh sample of p would have been it, and else gives way to that sample.
    """
    tossed = _toss(bench)
    stands_M = tossed.accept_M < accept_probabilities(bench)
    marks = _marks(bench, stands_M, lambda: _shared(bench, tossed.accept_M))
    accepted = [
        _leading(marks.stands[h : h + n]) for h, n in zip(bench.heads, bench.lengths, strict=True)
    ]
    emissions = [following(bench, i, count) for i, count in enumerate(accepted)]
    return _outcomes(bench, accepted, marks, _emit(bench, emissions, tossed))


def verify_block(bench: VerifyBatch) -> list[VerifyOutcome]:
    """Return the outcome of block verification: the longest prefix i with coin_i < h_i stands."""
    tossed, standing = _toss(bench), prefix_acceptance(bench)
    coins_M = to_list(tossed.accept_M)
    accepted = [
        max([0, *(i + 1 for i, h in enumerate(hs) if coins_M[head + i] < h)])
        for head, hs in zip(bench.heads, standing.prefixes, strict=True)
    ]
    every_M = torch.ones_like(tossed.accept_M, dtype=torch.bool)
    marks = _marks(bench, every_M, lambda: _shared(bench, tossed.accept_M))
    emissions = [
        following(bench, i, count, factor=standing.factors[i][count])
        for i, count in enumerate(accepted)
    ]
    return _outcomes(bench, accepted, marks, _emit(bench, emissions, tossed))


def verify_gumbel(bench: VerifyBatch) -> list[VerifyOutcome]:
    """Return the outcome under shared noise: a draft stands iff it is argmax(log pi + g)."""
    expert_N, chosen_N = gumbel_argmax(bench)
    rows_M = torch.tensor(bench.rows, dtype=torch.int64, device=expert_N.device)
    token_M = torch.tensor(bench.token_M, dtype=torch.int64, device=expert_N.device)
    stands_M = chosen_N[rows_M] == token_M
    marks = _marks(bench, stands_M, lambda: expert_N[rows_M] == token_M)
    accepted = [
        _leading(marks.stands[h : h + n]) for h, n in zip(bench.heads, bench.lengths, strict=True)
    ]
    chosen = to_list(chosen_N)
    emissions = [following(bench, i, count) for i, count in enumerate(accepted)]
    return _outcomes(bench, accepted, marks, {e.owner: chosen[e.row] for e in emissions if e})


def accept_probabilities(bench: VerifyBatch) -> Tensor:
    """Return the probability with which each drafted token stands on its own, float64 [M]."""
    return _ratios(bench).clamp_max(1.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixAcceptance:
    """Block verification of each task: for prefixes 1 .. L, and the factors p_0 .. p_L."""

    prefixes: list[list[float]]  # h_i: the chance that prefix i stands if no longer one does
    factors: list[list[float]]


def prefix_acceptance(bench: VerifyBatch) -> PrefixAcceptance:
    """Return h_i and p_i of arXiv 2403.10444, for any target."""
    ratio_M, tail_M = _ratios(bench), bench.target.tail_N.double()
    q_MK, pi_MK = bench.evidence.q_NK.double(), bench.target.on_NK.double()
    outside_M = bench.evidence.outside().double() * tail_M
    head_B = torch.tensor(bench.heads, device=ratio_M.device)
    factor_B = torch.ones(len(bench.tasks), dtype=torch.float64, device=ratio_M.device)
    factors, prefixes = [factor_B], list[Tensor]()
    for j in range(max(bench.lengths)):
        row_B = (head_B + j).clamp_max(len(ratio_M) - 1)
        over_BK = (factor_B[:, None] * pi_MK[row_B] - q_MK[row_B]).clamp_min(0)
        gain_B = over_BK.sum(dim=1) + factor_B * outside_M[row_B]
        # A certain prefix stands: 0 / 0 where nothing is gained by stopping at it.
        prefixes.append(torch.where(factor_B < 1, gain_B / (gain_B + 1 - factor_B), 1.0))
        factor_B = (factor_B * ratio_M[row_B]).clamp_max(1)
        factors.append(factor_B)
    h, p = to_list(torch.stack([torch.stack([*prefixes, factor_B]).T, torch.stack(factors).T]))
    return PrefixAcceptance(
        prefixes=[[*h[i][1:n], p[i][n]] if n else [] for i, n in enumerate(bench.lengths)],
        factors=[p[i][: n + 1] for i, n in enumerate(bench.lengths)],
    )


def _ratios(bench: VerifyBatch) -> Tensor:
    """Return pi / q at each drafted token, float64 [M]; 0 where the row lacks its own token."""
    pi_M, q_M = bench.on_token(bench.target.on_NK), bench.on_token(bench.evidence.q_NK)
    return quotient(pi_M.double(), q_M.double())


def _shared(bench: VerifyBatch, coins_M: Tensor) -> Tensor:
    """Return which drafted tokens lossless verification with the same coins would let stand."""
    return coins_M < bench.lossless_ratios()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Tossed:
    """The coins of judged rows, and of what may be emitted at each row of logits; float64."""

    accept_M: Tensor
    emit_N: Tensor


def _toss(bench: VerifyBatch) -> _Tossed:
    """Return all coins at once, on the device of the logits; zeros where none matters."""
    like = bench.logits_NV.new_empty(0, dtype=torch.float64)
    if _is_certain(bench):
        rows = bench.logits_NV.shape[0]
        return _Tossed(accept_M=like.new_zeros(len(bench.owner_M)), emit_N=like.new_zeros(rows))
    seeds, positions, starts = list[int](), list[int](), list[int]()
    for task, count in zip(bench.tasks, bench.counts, strict=True):
        seeds += [task.policy.seed] * count
        positions += range(task.position, task.position + count)
        starts += [task.position] * count
    accept_N, emit_N = rng.uniforms(
        seeds,
        positions,
        Purpose.ACCEPT,
        Purpose.EMIT,
        starts_N=starts if is_blockwise(bench.policy) else None,
    )
    accept_M = accept_N[torch.tensor(bench.rows, dtype=torch.int64)]
    return _Tossed(accept_M=accept_M.to(like.device), emit_N=emit_N.to(like.device))


def _is_certain(bench: VerifyBatch) -> bool:
    """Whether no coin matters: one-hots, unless the rule mixes them."""
    return bench.policy.sampling.greedy and not isinstance(bench.policy.rule, Ensemble)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Marks:
    """What is known of each judged row."""

    stands: list[bool]
    shared: list[bool]
    deferred: list[bool] | None  # None: a refusal is what deferring is


def _marks(bench: VerifyBatch, stands_M: Tensor, shared: Callable[[], Tensor]) -> _Marks:
    """Return the marks, brought from the device in one piece; all are `shared` where pi is p."""
    if isinstance(bench.policy.rule, Lossless):
        stands = to_list(stands_M)
        return _Marks(stands=stands, shared=stands, deferred=None)
    deferred_MK = bench.target.deferred_NK
    if deferred_MK is None:
        stands, drawn = to_list(torch.stack([stands_M, shared()]))
        return _Marks(stands=stands, shared=drawn, deferred=None)
    deferred_M = bench.on_token(deferred_MK.expand(bench.support.ids_NK.shape).double()) > 0
    stands, drawn, deferred = to_list(torch.stack([stands_M, shared(), deferred_M]))
    return _Marks(stands=stands, shared=drawn, deferred=deferred)


def _leading(flags: Sequence[bool]) -> int:
    """Return how many flags are set before the first that is not."""
    return next((i for i, flag in enumerate(flags) if not flag), len(flags))


def following(
    bench: VerifyBatch, owner: int, accepted: int, *, factor: float = 1.0
) -> NextToken | None:
    """Return what is emitted after the accepted tokens: a correction, a bonus or nothing."""
    refused = accepted < bench.lengths[owner]
    if not refused and not bench.bonuses[owner]:
        return None
    return NextToken(
        owner=owner,
        row=bench.firsts[owner] + accepted,
        judged=bench.judged(owner, accepted),
        factor=factor if refused else 1.0,
        residual=refused,
    )


def _emit(
    bench: VerifyBatch, emissions: Sequence[NextToken | None], tossed: _Tossed
) -> dict[int, int]:
    """Return the token that each owner's emission draws."""
    wanted = [e for e in emissions if e is not None]
    if not wanted:
        return {}
    if _is_certain(bench):
        return _emit_certain(bench, wanted)
    rows_E = torch.tensor([e.row for e in wanted], device=bench.logits_NV.device)
    tokens = to_list(next_token_weights(bench, wanted).inverse_cdf(tossed.emit_N[rows_E]))
    return dict(zip((e.owner for e in wanted), tokens, strict=True))


def _emit_certain(bench: VerifyBatch, emissions: Sequence[NextToken]) -> dict[int, int]:
    """Return the favourites of one-hot laws: p's, or the drafter's where pi keeps it."""
    device = bench.logits_NV.device
    row_E = torch.tensor([e.row for e in emissions], device=device)
    token_E = bench.law.favourites()[row_E]
    kept = [k for k, e in enumerate(emissions) if e.judged is not None and not e.residual]
    if kept:
        judged_J = torch.tensor([emissions[k].judged for k in kept], device=device)
        best_J1 = bench.target.on_NK[judged_J].argmax(dim=1, keepdim=True)
        drafted_J = bench.support.ids_NK[judged_J].gather(1, best_J1).squeeze(1)
        place_J = torch.tensor(kept, device=device)
        keeps_J = bench.target.tail_N[judged_J] < 1
        token_E[place_J] = torch.where(keeps_J, drafted_J, token_E[place_J])
    return dict(zip((e.owner for e in emissions), to_list(token_E), strict=True))


def _outcomes(
    bench: VerifyBatch, accepted: Sequence[int], marks: _Marks, emitted: dict[int, int]
) -> list[VerifyOutcome]:
    """Return the outcome of each task."""
    return [
        VerifyOutcome(
            accepted=count,
            origins=tuple(
                Origin.DRAFTER if shared else Origin.KEPT
                for shared in marks.shared[bench.heads[i] : bench.heads[i] + count]
            ),
            judged=(judged := min(count + 1, bench.lengths[i])),
            deferred=_deferred(marks, bench.heads[i], judged, refused=count < bench.lengths[i]),
            emitted=emitted.get(i),
        )
        for i, count in enumerate(accepted)
    ]


def _deferred(marks: _Marks, head: int, judged: int, *, refused: bool) -> int:
    """Return how many of the judged tokens the rule gave to the expert."""
    if marks.deferred is None:
        return int(refused)
    return sum(marks.deferred[head : head + judged])


# Logits and noise of this many tokens at a time stay in cache.
_CHUNK_TOKENS = 1 << 18


def gumbel_argmax(bench: VerifyBatch) -> tuple[Tensor, Tensor]:
    """Return the winners under p and under pi of every row of logits, int64 [N] each.

    Where no target is asked for, pi is p.
    """
    count, vocab = bench.logits_NV.shape
    rows = max(1, _CHUNK_TOKENS // vocab)
    chunks = [_chunk(bench, first, min(first + rows, count)) for first in range(0, count, rows)]
    return torch.cat([expert for expert, _ in chunks]), torch.cat([chosen for _, chosen in chunks])


def _chunk(bench: VerifyBatch, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Return the winners of the rows of logits from `first` to `end`."""
    device, vocab = bench.logits_NV.device, bench.logits_NV.shape[1]
    log_CV = bench.law.rows(torch.arange(first, end, device=device)).log_dense()
    pairs = _counters(bench)[first:end]
    seeds, positions = [seed for seed, _ in pairs], [position for _, position in pairs]
    noise_CV = rng.noise(seeds, positions, vocab, device).to(log_CV.dtype)
    expert_C = log_CV.add_(noise_CV).argmax(dim=1)
    judged = [(m, row) for m, row in enumerate(bench.rows) if first <= row < end]
    if isinstance(bench.policy.rule, Lossless) or not judged:
        return expert_C, expert_C
    index_E = torch.tensor([m for m, _ in judged], device=device)
    row_E = torch.tensor([row for _, row in judged], device=device)
    log_EV = dense_target(bench, bench.law.rows(row_E), index_E).log_()
    winners_E = log_EV.add_(noise_CV[row_E - first]).argmax(dim=1)
    return expert_C, expert_C.index_copy(0, row_E - first, winners_E)


def _counters(bench: VerifyBatch) -> list[tuple[int, int]]:
    """Return seed and position of each row of logits."""
    ends = [*bench.firsts[1:], bench.logits_NV.shape[0]]
    return [
        (task.policy.seed, task.position + j)
        for task, first, end in zip(bench.tasks, bench.firsts, ends, strict=True)
        for j in range(end - first)
    ]
