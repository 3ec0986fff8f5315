"""Attention by FlashInfer: what it is asked, computed as it is documented, against the formula."""

from __future__ import annotations

import inspect
import math
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import torch
from tests.engine.test_varlen_attn import (
    CPU,
    HEADS,
    KEY_HEADS,
    PASSES,
    SIZE,
    SLOTS,
    by_hand,
    states,
)
from torch._subclasses.fake_tensor import FakeTensorMode

from cascade.engine import flashinfer_attn
from cascade.engine.attention import AttentionParams, attend_groups
from cascade.engine.batch import RaggedBatch
from cascade.engine.flashinfer_attn import FlashInferAttention

if TYPE_CHECKING:
    from torch import Tensor

    from cascade.engine.batch import Segment

SINKS = torch.linspace(-2, 3, HEADS)
PARAMS = {
    "soft caps": AttentionParams(scale=0.7, window=None, softcap=2.0),
    "soft caps in a window": AttentionParams(scale=0.7, window=5, softcap=2.0),
    "soft caps and sinks": AttentionParams(scale=0.7, window=64, softcap=2.0, sinks_H=SINKS),
    "shorter values": AttentionParams(scale=0.7, window=None),
}


class Wrapper:
    """FlashInfer's wrapper of that name, page by page, as its documentation describes it."""

    plans = 0
    fails = False

    def __init__(self, workspace: Tensor, *, kv_layout: str, backend: str) -> None:
        assert workspace.dtype == torch.uint8
        assert (kv_layout, backend) == ("NHD", "fa2")

    def plan(  # noqa: PLR0913, PLR0917 - the arguments are FlashInfer's
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        head_dim_vo: int | None = None,
        *,
        causal: bool = False,
        sm_scale: float | None = None,
        window_left: int = -1,
        logits_soft_cap: float | None = None,
        q_data_type: torch.dtype = torch.float16,
        kv_data_type: torch.dtype | None = None,
    ) -> None:
        if Wrapper.fails:
            raise RuntimeError("nvcc was not found")
        Wrapper.plans += 1
        indices = (qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len)
        assert {part.dtype for part in indices} == {torch.int32}
        assert causal
        assert page_size == 1
        assert set(paged_kv_last_page_len.tolist()) == {1}
        self.shapes = [(num_qo_heads, head_dim_qk), (num_kv_heads, head_dim_qk)]
        self.shapes.append((num_kv_heads, head_dim_vo or head_dim_qk))
        self.types = [q_data_type, *[kv_data_type or q_data_type] * 2]
        self.offsets, self.page_offsets = qo_indptr.tolist(), paged_kv_indptr.tolist()
        self.pages = paged_kv_indices.tolist()
        self.scale = head_dim_qk**-0.5 if sm_scale is None else sm_scale
        self.window_left, self.cap = window_left, logits_soft_cap or 0

    def run(
        self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor], *, return_lse: bool = False
    ) -> Any:
        keys, values = (states[:, 0] for states in paged_kv_cache)
        assert [tuple(part.shape[1:]) for part in (q, keys, values)] == self.shapes
        assert [part.dtype for part in (q, keys, values)] == self.types
        out = q.new_empty(*q.shape[:2], values.shape[-1])
        lse = q.new_empty(q.shape[:2])
        spans = zip(self.offsets, self.offsets[1:], self.page_offsets, self.page_offsets[1:])  # noqa: B905 - each pair is one shorter
        for first, last, begin, end in spans:
            for token in range(first, last):
                own = end - (last - token)  # aligned with the end of the keys
                start = begin if self.window_left < 0 else max(begin, own - self.window_left)
                seen = self.pages[start : own + 1]
                for head in range(q.shape[1]):
                    of = head * keys.shape[1] // q.shape[1]
                    scores = keys[seen, of] @ q[token, head] * self.scale
                    if self.cap > 0:
                        scores = self.cap * torch.tanh(scores / self.cap)
                    out[token, head] = scores.softmax(-1) @ values[seen, of]
                    lse[token, head] = scores.logsumexp(-1) / math.log(2)
        return (out, lse) if return_lse else out


@pytest.fixture
def attention(monkeypatch: pytest.MonkeyPatch) -> FlashInferAttention:
    module: Any = ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = Wrapper
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setattr(flashinfer_attn.importlib.util, "find_spec", Mock(return_value=module))
    monkeypatch.setattr(Wrapper, "plans", 0)
    return FlashInferAttention()


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
@pytest.mark.parametrize("segments", PASSES.values(), ids=PASSES)
def test_it_gives_the_attention_of_the_formula(
    segments: list[Segment], params: AttentionParams, attention: FlashInferAttention
) -> None:
    query, keys, values = states(3, segments)
    if params.softcap is None:
        values = values[..., : SIZE // 2]
    batch = RaggedBatch(segments, device=CPU, num_slots=SLOTS)
    expected = by_hand(segments, query, keys, values, params)
    for actual in (
        attention.attend(batch, query, keys, values, params),
        attend_groups(batch, query, keys, values, params),
    ):
        torch.testing.assert_close(actual, expected)


def test_a_pass_is_planned_once_for_each_kind_of_layer(attention: FlashInferAttention) -> None:
    kinds = [PARAMS["soft caps"], PARAMS["soft caps in a window"]]
    for planned, segments in ((2, PASSES["a prompt"]), (4, PASSES["all at once"])):
        query, keys, values = states(4, segments)
        batch = RaggedBatch(segments, device=CPU, num_slots=SLOTS)
        for params in (*kinds, *kinds):
            out = attention.attend(batch, query, keys, values, params)
            torch.testing.assert_close(out, by_hand(segments, query, keys, values, params))
        assert Wrapper.plans == planned


def test_torch_computes_what_flashinfer_fails_at(
    attention: FlashInferAttention,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(Wrapper, "fails", True)
    segments = PASSES["all at once"]
    query, keys, values = states(5, segments)
    batch = RaggedBatch(segments, device=CPU, num_slots=SLOTS)
    params = PARAMS["soft caps"]
    with FakeTensorMode():
        assert attention.supports(*on_a_gpu(128, 128), params)
    out = attention.attend(batch, query, keys, values, params)
    torch.testing.assert_close(out, by_hand(segments, query, keys, values, params))
    assert "nvcc was not found" in caplog.text
    with FakeTensorMode():
        assert not attention.supports(*on_a_gpu(128, 128), params)


def on_a_gpu(key: int, value: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
    """Return queries and a pool of values on a GPU that need not be there."""
    query = torch.empty((3, HEADS, key), dtype=dtype, device="cuda")
    return query, torch.empty((KEY_HEADS, SLOTS, value), dtype=dtype, device="cuda")


def test_it_is_for_what_torchs_kernel_lacks(
    attention: FlashInferAttention, monkeypatch: pytest.MonkeyPatch
) -> None:
    capped, plain = PARAMS["soft caps"], PARAMS["shorter values"]
    with FakeTensorMode():
        assert attention.supports(*on_a_gpu(256, 256), capped)
        assert attention.supports(*on_a_gpu(192, 128), plain)
        assert not attention.supports(*on_a_gpu(128, 128), plain)
        assert not attention.supports(*on_a_gpu(80, 80), capped)
        assert not attention.supports(*on_a_gpu(128, 128, torch.float32), capped)
        assert not FlashInferAttention(enabled=False).supports(*on_a_gpu(256, 256), capped)
        monkeypatch.setattr(flashinfer_attn.importlib.util, "find_spec", Mock(return_value=None))
        assert not FlashInferAttention().supports(*on_a_gpu(256, 256), capped)
    assert not attention.supports(torch.empty(3, HEADS, 128), torch.empty(2, SLOTS, 128), capped)


def test_flashinfer_takes_the_arguments() -> None:
    """Where it is installed: the stand-in above must not accept what the real one does not."""
    real = pytest.importorskip("flashinfer").BatchPrefillWithPagedKVCacheWrapper
    for name in ("plan", "run"):
        known = inspect.signature(getattr(real, name)).parameters
        assert set(inspect.signature(getattr(Wrapper, name)).parameters) <= set(known)
        assert (
            list(known)[: 10 if name == "plan" else 3]
            == list(inspect.signature(getattr(Wrapper, name)).parameters)[
                : 10 if name == "plan" else 3
            ]
        )
