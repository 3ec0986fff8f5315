"""Attention that torch's kernel lacks, by FlashInfer if installed: soft caps, shorter values.

A page of its paged cache is one slot of ours, so that it reads the pool in place. Shapes as in
`varlen_attn`.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from cascade.engine.attention import attend_groups
from cascade.engine.varlen_attn import add_sinks

if TYPE_CHECKING:
    from torch import Tensor

    from cascade.engine.attention import AttentionParams
    from cascade.engine.batch import RaggedBatch

log = logging.getLogger(__name__)

_PACKAGE = "flashinfer"
_WORKSPACE_BYTES = 128 * 2**20
_HEAD_SIZES = frozenset({(64, 64), (128, 128), (256, 256), (192, 128)})  # of keys and of values


class FlashInferAttention:
    """FlashInfer's attention over a paged cache, planned once per pass and kind of layer.

    Args:
        enabled: It may be used; its results depend on the other sessions of a pass.
    """

    def __init__(self, *, enabled: bool = True) -> None:
        self._usable = enabled and importlib.util.find_spec(_PACKAGE) is not None
        self._workspace: Tensor | None = None
        self._planned: dict[tuple[Any, ...], tuple[Any, RaggedBatch]] = {}

    def supports(self, query_THD: Tensor, values_JRD: Tensor, params: AttentionParams) -> bool:
        """Return whether FlashInfer is there and computes this attention.

        Args:
            query_THD: Queries of a pass.
            values_JRD: Values of the whole pool.
            params: The layer's parameters.
        """
        return (
            self._usable
            and query_THD.is_cuda
            and torch.version.hip is None
            and query_THD.dtype in {torch.float16, torch.bfloat16}
            and (query_THD.shape[-1], values_JRD.shape[-1]) in _HEAD_SIZES
            and (params.softcap is not None or query_THD.shape[-1] != values_JRD.shape[-1])
        )

    def attend(
        self,
        batch: RaggedBatch,
        query_THD: Tensor,
        keys_JRD: Tensor,
        values_JRD: Tensor,
        params: AttentionParams,
    ) -> Tensor:
        """Return the attention `[T, H, D]` of every token to its own session.

        FlashInfer compiles its kernels at their first use. Where that fails, torch computes.

        Args:
            batch: The tokens of the pass.
            query_THD: Their queries.
            keys_JRD: Keys of the whole pool.
            values_JRD: Values of the whole pool.
            params: The layer's parameters.
        """
        try:
            wrapper = self._plan(batch, query_THD, keys_JRD, values_JRD, params)
            pages = keys_JRD.transpose(0, 1)[:, None], values_JRD.transpose(0, 1)[:, None]
            if params.sinks_H is None:
                return wrapper.run(query_THD.contiguous(), pages)
            out_THD, lse_TH = wrapper.run(query_THD.contiguous(), pages, return_lse=True)
        except (RuntimeError, ValueError, TypeError, OSError, ImportError, AttributeError):
            log.warning("FlashInfer failed, so torch computes this attention", exc_info=True)
            self._usable = False
            self._planned.clear()
            return attend_groups(batch, query_THD, keys_JRD, values_JRD, params)
        return add_sinks(out_THD, lse_TH * math.log(2), params.sinks_H)  # it counts in powers of 2

    def _plan(
        self,
        batch: RaggedBatch,
        query_THD: Tensor,
        keys_JRD: Tensor,
        values_JRD: Tensor,
        params: AttentionParams,
    ) -> Any:
        """Return a wrapper that is planned for this pass and this kind of layer."""
        heads, sizes = query_THD.shape[1], (keys_JRD.shape[-1], values_JRD.shape[-1])
        kind = heads, len(keys_JRD), sizes, params.scale, params.window, params.softcap
        wrapper, planned = self._planned.get(kind, (None, None))
        if wrapper is None:
            flashinfer = importlib.import_module(_PACKAGE)
            if self._workspace is None:
                self._workspace = torch.empty(
                    _WORKSPACE_BYTES, dtype=torch.uint8, device=query_THD.device
                )
            # Its FA2 kernels alone take keys and values of different strides.
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(
                self._workspace, kv_layout="NHD", backend="fa2"
            )
        if planned is not batch:
            counts = [segment.length for segment in batch.segments]
            queries = [segment.count for segment in batch.segments]
            wrapper.plan(
                torch.tensor([0, *accumulate(queries)], dtype=torch.int32),
                torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
                batch.key_slots,
                torch.ones(len(counts), dtype=torch.int32),
                heads,
                len(keys_JRD),
                sizes[0],
                1,
                head_dim_vo=sizes[1],
                causal=True,
                sm_scale=params.scale,
                window_left=-1 if params.window is None else params.window - 1,
                logits_soft_cap=params.softcap,
                q_data_type=query_THD.dtype,
                kv_data_type=keys_JRD.dtype,
            )
            self._planned[kind] = wrapper, batch
        return wrapper
