"""Attention over each session's extent of the pool, by torch's `varlen_attn`: the seam for GPUs.

CUDA runs torch's kernel. A CPU computes the same from the same arguments, one session after the
other: no serving path takes that way, but what the others compute is compared with it. The kernel
knows no sinks, but returns what their share of the softmax follows from.

Shapes: `T` tokens of the pass, `H` query heads, `J` key heads, `D` head size, `N` sessions, `K`
keys of all of them, `R` slots of the pool.
"""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.attention import varlen

from cascade.engine.batch import IN_PLACE

if TYPE_CHECKING:
    from torch import Tensor

    from cascade.engine.attention import AttentionParams
    from cascade.engine.batch import Extents

_LARGEST_HEAD = 256
_ARGUMENTS = inspect.signature(varlen.varlen_attn).parameters
_WITH_LSE = varlen.AuxRequest(lse=True)


class Batch(Protocol):
    """The tokens of a pass."""

    @cached_property
    def extents(self) -> Extents:
        """Where each session's queries and keys are."""
        ...


def supported(batch: Batch, query_THD: Tensor, values_JRD: Tensor, params: AttentionParams) -> bool:
    """Return whether torch's kernel computes this attention.

    Args:
        batch: The tokens of the pass.
        query_THD: Their queries.
        values_JRD: Values of the whole pool.
        params: The layer's parameters.
    """
    size = query_THD.shape[-1]
    return (
        query_THD.is_cuda
        and params.softcap is None
        and (params.sinks_H is None or torch.version.hip is None)
        and query_THD.dtype in {torch.float16, torch.bfloat16}
        and size == values_JRD.shape[-1]
        and size <= _LARGEST_HEAD
        and size % 8 == 0
        and (IN_PLACE or batch.extents.key_slots is not None)
    )


def attend(  # noqa: PLR0913 - every argument is a tensor or says how
    extents: Extents,
    query_THD: Tensor,
    keys_JRD: Tensor,
    values_JRD: Tensor,
    params: AttentionParams,
    *,
    deterministic: bool = False,
) -> Tensor:
    """Return the attention `[T, H, D]` of every token to its own session.

    Args:
        extents: Where the sessions are.
        query_THD: The queries.
        keys_JRD: Keys of the whole pool.
        values_JRD: Values of the whole pool.
        params: The layer's parameters.
        deterministic: The result does not depend on the other sessions.
    """
    key, value = keys_JRD.transpose(0, 1), values_JRD.transpose(0, 1)
    starts, counts = extents.key_starts, extents.key_counts
    if extents.key_slots is not None:
        key, value = key[extents.key_slots], value[extents.key_slots]
        starts, counts = torch.cat([counts[:0].new_zeros(1), counts.cumsum(0).int()]), None
    out_THD, lse_HT = varlen_attn(
        query_THD,
        key,
        value,
        extents.query_offsets,
        starts,
        extents.max_queries,
        extents.max_keys,
        scale=params.scale,
        window_size=(-1 if params.window is None else params.window - 1, 0),
        seqused_k=counts,
        num_splits=1 if deterministic else None,
        return_aux=_WITH_LSE,
    )
    return out_THD if params.sinks_H is None else add_sinks(out_THD, lse_HT.T, params.sinks_H)


def add_sinks(out_THD: Tensor, lse_TH: Tensor, sinks_H: Tensor) -> Tensor:
    """Return attention with sinks, given the attention without them.

    A sink is one more score of the softmax, so all weights shrink by the same factor.

    Args:
        out_THD: The attention without sinks.
        lse_TH: Natural logarithm of the sum of its exponential scores.
        sinks_H: The score of each head's sink.
    """
    kept_TH = torch.sigmoid(lse_TH.float() - sinks_H.float())
    return (out_THD * kept_TH.unsqueeze(-1)).to(out_THD.dtype)


def varlen_attn(  # noqa: PLR0913, PLR0917 - the arguments are torch's
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    seqused_k: Tensor | None = None,
    num_splits: int | None = None,
    return_aux: varlen.AuxRequest = _WITH_LSE,
) -> tuple[Tensor, Tensor]:
    """Return what `torch.nn.attention.varlen.varlen_attn` returns, on a CPU too.

    That is the attention `[T, H, D]`, and the logarithm of the sum of the exponential scores
    `[H, T]`.

    Queries are aligned with the end of their session's keys, and fewer key heads are shared.

    Args:
        query: `[T, H, D]`.
        key: `[R, J, D]`.
        value: `[R, J, D]`.
        cu_seq_q: `[N + 1]`, where each session's queries begin, and their number.
        cu_seq_k: `[N + 1]`, the same of the keys; with `seqused_k` only the beginnings are read.
        max_q: Queries of the longest session.
        max_k: Keys of the longest session.
        scale: Factor of the scores.
        window_size: Keys that a query sees before and after its own; -1 for all.
        seqused_k: `[N]`, each session's keys, if they are not all up to the next session's.
        num_splits: 1 for results that do not depend on the other sessions (CUDA).
        return_aux: What is returned beside the attention.
    """
    if query.device.type == "cpu":
        ends = cu_seq_k[1:] if seqused_k is None else cu_seq_k[:-1] + seqused_k
        parts = [
            _one(query[first:last], key[begin:end], value[begin:end], scale, window_size)
            for first, last, begin, end in zip(
                *(part.tolist() for part in (cu_seq_q[:-1], cu_seq_q[1:], cu_seq_k[:-1], ends)),
                strict=True,
            )
        ]
        return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)
    kernel: Any = varlen.varlen_attn
    options = {
        "scale": scale,
        "window_size": window_size,
        "enable_gqa": query.shape[1] != key.shape[1],
        "seqused_k": seqused_k,
        "num_splits": num_splits,
        "return_aux": return_aux,
    }
    known = {name: option for name, option in options.items() if name in _ARGUMENTS}
    return kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **known)


def _one(
    query: Tensor, key: Tensor, value: Tensor, scale: float, window_size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Return the attention of one session, shaped as its queries, and `[H, T]` of its scores."""
    before, after = window_size
    own_Q1 = len(key) - len(query) + torch.arange(len(query))[:, None]
    key_K = torch.arange(len(key))
    seen_QK = torch.ones(len(query), len(key), dtype=torch.bool)
    if before >= 0:
        seen_QK &= key_K >= own_Q1 - before
    if after >= 0:
        seen_QK &= key_K <= own_Q1 + after
    query_HQD, key_JKD, value_JKD = (states.transpose(0, 1) for states in (query, key, value))
    share = len(query_HQD) // len(key_JKD)
    scores_HQK = query_HQD @ key_JKD.repeat_interleave(share, dim=0).mT * scale
    scores_HQK = scores_HQK.float().masked_fill(~seen_QK, float("-inf"))
    out_HQD = scores_HQK.softmax(-1).to(value) @ value_JKD.repeat_interleave(share, dim=0)
    return out_HQD.transpose(0, 1), scores_HQK.logsumexp(-1)
