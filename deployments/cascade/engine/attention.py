"""Attention of a ragged batch over the KV pool, which reads each session's states in place.

Shapes as in `batch`; `H` query heads, `J` key heads, `D` head size, `R` slots of the pool.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import scaled_dot_product_attention

if TYPE_CHECKING:
    from torch import Tensor

    from cascade.engine.batch import RaggedBatch

_SHORT = 32  # queries up to which folding heads into them is faster than broadcasting keys


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionParams:
    """How a layer computes and weighs its scores."""

    scale: float
    window: int | None  # tokens the layer sees back, itself included; None for all
    softcap: float | None = None  # scores become softcap * tanh(score / softcap)
    sinks_H: Tensor | None = None  # a score per head that takes weight and gives no value

    @property
    def unfused(self) -> bool:
        """Whether the fused kernels cannot compute it."""
        return self.softcap is not None or self.sinks_H is not None


def attend_groups(
    batch: RaggedBatch,
    query_THD: Tensor,
    keys_JRD: Tensor,
    values_JRD: Tensor,
    params: AttentionParams,
) -> Tensor:
    """Return the attention `[T, H, D]` of every token, group by group.

    Args:
        batch: The tokens of the pass.
        query_THD: Their queries.
        keys_JRD: Keys of the whole pool.
        values_JRD: Values of the whole pool.
        params: The layer's parameters.
    """
    parts: list[Tensor] = []
    for group in batch.groups(params.window):
        keys_NJKD, values_NJKD = group.view(keys_JRD), group.view(values_JRD)
        queries_THD = query_THD[group.first : group.last]
        mask = batch.mask(group, params.window, query_THD.dtype)
        only_new = group.size == 1 and group.queries == group.keys
        causal = only_new and (params.window is None or group.keys[0] <= params.window)
        if group.uniform:
            parts.append(attend(queries_THD, keys_NJKD, values_NJKD, mask, params, causal=causal))
        else:
            padded, valid = batch.gather(group)
            padded_THD = queries_THD[padded]
            parts.append(attend(padded_THD, keys_NJKD, values_NJKD, mask, params)[valid])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend(  # noqa: PLR0913 - every argument is a tensor or says how
    query_THD: Tensor,
    keys_NJKD: Tensor,
    values_NJKD: Tensor,
    mask: Tensor | None,
    params: AttentionParams,
    *,
    causal: bool = False,
) -> Tensor:
    """Return the attention `[T, H, D]` of N sessions with equally many queries.

    Args:
        query_THD: The queries, session after session.
        keys_NJKD: The keys of each session.
        values_NJKD: The values of each session.
        mask: Additive `[N, 1, 1, Q, K]`; None if every query sees every key.
        params: The layer's parameters.
        causal: The mask is causal over one session whose keys are its queries.
    """
    tokens, heads, size = query_THD.shape
    count, key_heads = keys_NJKD.shape[:2]
    queries, share = tokens // count, heads // key_heads
    if not params.unfused and (count > 1 or queries <= _SHORT):
        bias = None if mask is None else mask[:, 0].repeat(1, 1, share, 1)
        return attend_folded(query_THD, keys_NJKD, values_NJKD, bias=bias, scale=params.scale).view(
            tokens, heads, -1
        )
    split = query_THD.reshape(count, queries, key_heads, share, size).permute(0, 2, 3, 1, 4)
    if params.unfused:
        out = _unfused(split, keys_NJKD[:, :, None], values_NJKD[:, :, None], mask, params)
    else:
        # The key heads of the one session are the batch: neither keys nor mask are repeated.
        out = scaled_dot_product_attention(
            split[0],
            keys_NJKD[0][:, None].expand(-1, share, -1, -1),
            values_NJKD[0][:, None].expand(-1, share, -1, -1),
            attn_mask=None if causal or mask is None else mask[0],
            is_causal=causal and keys_NJKD.shape[2] > 1,
            scale=params.scale,
        )[None]
    return out.permute(0, 3, 1, 2, 4).reshape(tokens, heads, -1)


def attend_folded(
    query_THD: Tensor,
    keys_NJKD: Tensor,
    values_NJKD: Tensor,
    *,
    bias: Tensor | None,
    scale: float,
) -> Tensor:
    """Return the attention `[T, H * D]` of N sessions with equally many queries.

    The query heads of a key head are folded into the query axis, so that K is read once.

    Args:
        query_THD: The queries, session after session.
        keys_NJKD: The keys of each session.
        values_NJKD: The values of each session.
        bias: Additive mask `[N, 1, G * Q, K]`; None if every query sees every key.
        scale: Factor of the scores.
    """
    tokens, heads, size = query_THD.shape
    count, key_heads = keys_NJKD.shape[:2]
    queries, share = tokens // count, heads // key_heads
    if queries == 1:
        folded = query_THD.reshape(count, key_heads, share, size)
    else:
        split = query_THD.reshape(count, queries, key_heads, share, size)
        folded = split.permute(0, 2, 3, 1, 4).reshape(count, key_heads, share * queries, size)
    out = scaled_dot_product_attention(folded, keys_NJKD, values_NJKD, attn_mask=bias, scale=scale)
    if queries > 1:
        out = out.unflatten(2, (share, queries)).permute(0, 3, 1, 2, 4)
    return out.reshape(tokens, -1)


def _unfused(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, params: AttentionParams
) -> Tensor:
    """Compute attention with soft caps and sinks step by step."""
    scores = torch.matmul(query, keys.transpose(-1, -2)) * params.scale
    if params.softcap is not None:
        scores = torch.tanh(scores / params.softcap) * params.softcap
    if mask is not None:
        scores = scores + mask
    if params.sinks_H is None:
        weights = torch.softmax(scores.float(), dim=-1)
    else:
        sinks = params.sinks_H.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores.float(), dim=-1)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)
