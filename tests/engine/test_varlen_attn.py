"""Attention by torch's `varlen_attn`: a CPU's computation from its arguments, and every other."""

from __future__ import annotations

import inspect
import math
from typing import TYPE_CHECKING

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from cascade.engine import batch as batch_module
from cascade.engine import varlen_attn
from cascade.engine.attention import AttentionParams, attend_groups
from cascade.engine.backends.cuda_graph import StaticBatch
from cascade.engine.batch import RaggedBatch, Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

CPU = torch.device("cpu")
SLOTS, KEY_HEADS, HEADS, SIZE = 1024, 2, 6, 16
WINDOWS = (None, 1, 5, 64)
EMPTY = 512  # a slot after all sessions
PREFILL = Segment(start=0, past=0, tokens=range(40))
BLOCK = Segment(start=128, past=60, tokens=range(6))
LATER = Segment(start=256, past=61, tokens=range(6))
TOKENS = [Segment(start=start, past=9 + start // 8, tokens=(1,)) for start in (0, 128, 384)]
PASSES: dict[str, list[Segment]] = {
    "a prompt": [PREFILL],
    "all at once": [PREFILL, BLOCK, LATER, Segment(start=384, past=3, tokens=(1,))],
    "one token each": TOKENS,
    "blocks at equal distances": [BLOCK, LATER],
}


def states(seed: int, segments: Sequence[Segment]) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and a pool of keys and values."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(segment.count for segment in segments)
    query = torch.randn(tokens, HEADS, SIZE, generator=generator)
    keys, values = torch.randn(2, KEY_HEADS, SLOTS, SIZE, generator=generator).unbind()
    return query, keys, values


def by_hand(
    segments: Sequence[Segment],
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    params: AttentionParams,
) -> Tensor:
    """Compute each head of each token from the softmax over the keys that it sees."""
    window, cap, sinks = params.window, params.softcap, params.sinks_H
    out = query.new_empty(*query.shape[:2], values.shape[-1])
    token = 0
    for segment in segments:
        for past in range(segment.past, segment.length):
            first = 0 if window is None else max(0, past - window + 1)
            seen = slice(segment.start + first, segment.start + past + 1)
            for head in range(HEADS):
                own = head // (HEADS // KEY_HEADS)
                scores = keys[own, seen] @ query[token, head] * params.scale
                if cap is not None:
                    scores = cap * torch.tanh(scores / cap)
                sink = torch.empty(0) if sinks is None else sinks[head, None]
                weights = torch.cat([scores, sink]).softmax(-1)[: len(scores)]
                out[token, head] = weights @ values[own, seen]
            token += 1
    return out


@pytest.mark.parametrize("sinks", [None, torch.linspace(-2, 3, HEADS)], ids=["", "sinks"])
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("segments", PASSES.values(), ids=PASSES)
def test_every_way_gives_the_attention_of_the_formula(
    segments: list[Segment],
    window: int | None,
    sinks: Tensor | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    query, keys, values = states(1, segments)
    pool = keys, values
    params = AttentionParams(scale=SIZE**-0.5, window=window, sinks_H=sinks)
    expected = by_hand(segments, query, *pool, params)
    batch = RaggedBatch(segments, device=CPU, num_slots=SLOTS)
    found = {
        "in place": varlen_attn.attend(batch.extents, query, *pool, params),
        "in groups": attend_groups(batch, query, *pool, params),
    }
    monkeypatch.setattr(batch_module, "IN_PLACE", False)  # as on torch 2.11
    copied = RaggedBatch(segments, device=CPU, num_slots=SLOTS).extents
    assert copied.key_slots is not None
    found["copied"] = varlen_attn.attend(copied, query, *pool, params)
    if segments is TOKENS:
        columns = [(1, s.past, s.start + s.past, s.start, s.length) for s in segments]
        inputs = torch.tensor(list(zip(*columns, strict=True)))
        static = StaticBatch(inputs, keys=128, num_slots=SLOTS)
        found["static"] = static.attend(query, *pool, params)
        found["static in place"] = varlen_attn.attend(static.extents, query, *pool, params)
    for way, actual in found.items():
        torch.testing.assert_close(actual, expected, msg=way)


def test_a_result_does_not_depend_on_what_lies_beside_the_session() -> None:
    segments = PASSES["all at once"]
    query, keys, values = states(2, segments)
    params = AttentionParams(scale=1.0, window=None)
    extents = RaggedBatch(segments, device=CPU, num_slots=SLOTS).extents
    before = varlen_attn.attend(extents, query, keys, values, params)
    keys[:, EMPTY:] = values[:, EMPTY:] = math.nan
    keys[:, PREFILL.length : BLOCK.start] = values[:, PREFILL.length : BLOCK.start] = math.nan
    assert torch.equal(varlen_attn.attend(extents, query, keys, values, params), before)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("window", [None, 64])
def test_torchs_kernel_takes_the_arguments(
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
    *,
    deterministic: bool,
) -> None:
    """Through its own signature, and the shapes that it says it returns on a GPU."""
    segments = PASSES["all at once"]
    kernel, calls = varlen_attn.varlen.varlen_attn, list[inspect.BoundArguments]()

    def called(*args: object, **kwargs: object) -> object:
        calls.append(inspect.signature(kernel).bind(*args, **kwargs))
        return kernel(*args, **kwargs)  # pyright: ignore[reportArgumentType] - arguments by name

    monkeypatch.setattr(varlen_attn.varlen, "varlen_attn", called)
    with FakeTensorMode():
        device = torch.device("cuda")
        shapes = [
            (sum(one.count for one in segments), HEADS, SIZE),
            *[(KEY_HEADS, SLOTS, SIZE)] * 2,
        ]
        query, keys, values = (
            torch.empty(shape, dtype=torch.bfloat16, device=device) for shape in shapes
        )
        batch = RaggedBatch(segments, device=device, num_slots=SLOTS)
        params = AttentionParams(scale=0.5, window=window)
        sinks = torch.empty(HEADS, dtype=torch.bfloat16, device=device)
        sunk = AttentionParams(scale=0.5, window=window, sinks_H=sinks)
        for one in (params, sunk):
            assert varlen_attn.supported(batch, query, values, one)
            out = varlen_attn.attend(
                batch.extents, query, keys, values, one, deterministic=deterministic
            )
            assert (out.shape, out.dtype, out.device) == (query.shape, query.dtype, query.device)
        capped = AttentionParams(scale=0.5, window=window, softcap=30.0)
        assert not varlen_attn.supported(batch, query, values, capped)
        assert not varlen_attn.supported(batch, query.float(), values, params)
    call, _ = calls
    assert (call.arguments["max_q"], call.arguments["max_k"]) == (40, 67)
    assert call.arguments["window_size"] == (-1 if window is None else 63, 0)
    assert call.arguments.get("num_splits") == (1 if deterministic else None)
