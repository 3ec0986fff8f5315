"""The attention function of the flat path: writes new rows to the pool and reads sessions in place.

It is registered with transformers under a name that has no mask function, so that models build no
mask. Shapes as in `batch`; `H` query heads, `J` key heads, `D` head size, `R` rows of the pool.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Mapping

    from torch import Tensor

    from cascade.engine.batch import Group, RaggedBatch
    from cascade.engine.kv_pool import KVPool

FLAT = "cascade_flat"
_FLASH_HEAD_SIZE = 256
_SHORT = 32  # queries up to which folding heads into them beats broadcasting keys


class Batch(Protocol):
    """What a pass knows of its tokens, whichever way their sessions are read."""

    rows_T: Tensor

    @property
    def tokens(self) -> int:
        """Return T."""
        ...

    def ragged(self) -> tuple[Tensor, Tensor, Tensor, int, int]:
        """Return query offsets, key starts and key counts as int32, and the longest of each."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Pass:
    """What the attention function needs besides its arguments."""

    batch: Batch
    attend: Callable[[Tensor, Tensor, Tensor, Form], Tensor]  # where FlashAttention does not serve
    pool: KVPool
    windows: Mapping[int, int | None]  # tokens each layer sees back, itself included; None: all
    deterministic: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """What a layer does to its scores."""

    scale: float
    window: int | None
    cap: float | None = None  # scores become cap * tanh(score / cap)
    sinks_H: Tensor | None = None  # a score per head that takes weight and gives no value
    deterministic: bool = False  # a token's row does not depend on the batch

    @property
    def manual(self) -> bool:
        """Whether the fused kernels cannot do it."""
        return self.cap is not None or self.sinks_H is not None


class _Current(threading.local):
    value: Pass | None = None


_current = _Current()


@contextmanager
def running(current: Pass) -> Generator[None]:
    """Make `current` what attention of this thread works on."""
    _current.value = current
    try:
        yield
    finally:
        _current.value = None


def flat_attention(  # noqa: PLR0913 - the signature is transformers'
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention `[1, T, H, D]` of every token to its own session's rows.

    Args:
        module: the layer; `layer_idx` names its storage.
        query: `[1, H, T, D]`.
        key: `[1, J, T, D]`.
        value: `[1, J, T, D']`.
        attention_mask: None.
        scaling: factor of the scores; None is D ** -0.5.
        softcap: bound of the scores.
        s_aux: sinks `[H]`.
    """
    current = _current.value
    assert current is not None, "an engine runs this model; use another copy"
    assert attention_mask is None, "masks follow from the batch"
    assert query.shape[2] == current.batch.tokens, "every token of the pass has a query"
    layer: Any = module.layer_idx
    form = Form(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=current.windows[layer],
        cap=softcap,
        sinks_H=s_aux,
        deterministic=current.deterministic,
    )
    batch = current.batch
    states = current.pool.write(layer, key_HTD=key[0], value_HTD=value[0], rows_T=batch.rows_T)
    query_THD = query[0].transpose(0, 1)
    if _flash_serves(query_THD, states[1], form):
        return _flash(batch, query_THD, *states, form)[None], None
    return current.attend(query_THD, *states, form)[None], None


def grouped(
    batch: RaggedBatch, query_THD: Tensor, keys_JRD: Tensor, values_JRD: Tensor, form: Form
) -> Tensor:
    """Return the attention `[T, H, D]` of every token, group by group."""
    parts: list[Tensor] = []
    for group in batch.groups(form.window):
        keys_NJKD = _view(keys_JRD, group)
        values_NJKD = _view(values_JRD, group)
        queries_THD = query_THD[group.first : group.last]
        mask = batch.mask(group, form.window, query_THD.dtype)
        causal = group.whole and (form.window is None or group.keys[0] <= form.window)
        if group.even:
            parts.append(attend(queries_THD, keys_NJKD, values_NJKD, mask, form, causal=causal))
        else:
            padded, valid = batch.gather(group)
            some_THD = queries_THD[padded]
            parts.append(attend(some_THD, keys_NJKD, values_NJKD, mask, form)[valid])
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _view(states_JRD: Tensor, group: Group) -> Tensor:
    """Return the group's rows as `[N, J, K, D]`, in place."""
    heads, _, size = states_JRD.shape
    across, down, _ = states_JRD.stride()
    return states_JRD.as_strided(
        (group.size, heads, max(group.keys), size),
        (group.stride * down, across, down, 1),
        states_JRD.storage_offset() + group.start * down,
    )


def attend(  # noqa: PLR0913 - every argument is a tensor or says how
    query_THD: Tensor,
    keys_NJKD: Tensor,
    values_NJKD: Tensor,
    mask: Tensor | None,
    form: Form,
    *,
    causal: bool = False,
) -> Tensor:
    """Return the attention `[T, H, D]` of N sessions that have as many queries each.

    The query heads of a key head are folded into the query axis, so that K is read once.

    Args:
        query_THD: the sessions' queries, one session after the other.
        keys_NJKD: the keys of each.
        values_NJKD: their values.
        mask: additive `[N, 1, 1, Q, K]`; None where a query sees every key.
        form: what is done to the scores.
        causal: the mask is that of a session alone whose keys are its queries.
    """
    tokens, heads, size = query_THD.shape
    count, key_heads = keys_NJKD.shape[:2]
    queries, share = tokens // count, heads // key_heads
    folded = query_THD.reshape(count, queries, key_heads, share, size).permute(0, 2, 3, 1, 4)
    if form.manual:
        out = _manual(folded, keys_NJKD[:, :, None], values_NJKD[:, :, None], mask, form)
    elif count == 1 and queries > _SHORT:
        out = _single(folded[0], keys_NJKD[0], values_NJKD[0], mask, form, causal=causal)[None]
    else:
        flat = folded.reshape(count, key_heads, share * queries, size)
        bias = None if mask is None else mask[:, 0].repeat(1, 1, share, 1)
        out = scaled_dot_product_attention(
            flat, keys_NJKD, values_NJKD, attn_mask=bias, scale=form.scale
        ).unflatten(2, (share, queries))
    return out.permute(0, 3, 1, 2, 4).reshape(tokens, heads, -1)


def _single(  # noqa: PLR0913 - as above
    query_JGQD: Tensor,
    keys_JKD: Tensor,
    values_JKD: Tensor,
    mask: Tensor | None,
    form: Form,
    *,
    causal: bool,
) -> Tensor:
    """Attend within one session: key heads are the batch, so neither keys nor mask are repeated."""
    share = query_JGQD.shape[1]
    return scaled_dot_product_attention(
        query_JGQD,
        keys_JKD[:, None].expand(-1, share, -1, -1),
        values_JKD[:, None].expand(-1, share, -1, -1),
        attn_mask=None if causal or mask is None else mask[0],
        is_causal=causal and keys_JKD.shape[1] > 1,
        scale=form.scale,
    )


def _manual(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, form: Form) -> Tensor:
    """Attend in the open, for soft caps and sinks."""
    scores = torch.matmul(query, keys.transpose(-1, -2)) * form.scale
    if form.cap is not None:
        scores = torch.tanh(scores / form.cap) * form.cap
    if mask is not None:
        scores = scores + mask
    if form.sinks_H is None:
        weights = torch.softmax(scores.float(), dim=-1)
    else:
        sinks = form.sinks_H.to(scores.dtype).view(1, *scores.shape[1:3], 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], dim=-1)
        weights = torch.softmax(scores.float(), dim=-1)[..., :-1]
    return torch.matmul(weights.to(values.dtype), values)


def _flash_serves(query_THD: Tensor, values_JRD: Tensor, form: Form) -> bool:
    size = query_THD.shape[-1]
    return (
        query_THD.is_cuda
        and not form.manual
        and not form.deterministic
        and query_THD.dtype in {torch.float16, torch.bfloat16}
        and size == values_JRD.shape[-1]
        and size <= _FLASH_HEAD_SIZE
        and size % 8 == 0
    )


def _flash(
    batch: Batch, query_THD: Tensor, keys_JRD: Tensor, values_JRD: Tensor, form: Form
) -> Tensor:
    """Attend with FlashAttention 2: `seqused_k` lets it read extents where they are.

    Key offsets only name starts then; an extent may be longer than what is used of it.
    """
    offsets, starts, counts, queries, keys = batch.ragged()
    return torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - no public op takes seqused_k in 2.11
        query_THD,
        keys_JRD.transpose(0, 1),
        values_JRD.transpose(0, 1),
        offsets,
        starts,
        queries,
        keys,
        0.0,
        True,  # noqa: FBT003 - causal, positional in the op
        False,  # noqa: FBT003 - no debug mask
        scale=form.scale,
        window_size_left=-1 if form.window is None else form.window - 1,
        window_size_right=0,
        seqused_k=counts,
    )[0]


AttentionInterface.register(FLAT, flat_attention)
