from __future__ import annotations

import pytest
import torch
from tests.engine.architectures import build

from cascade.engine.backends import mask_probe
from cascade.engine.backends.base import PathUnsupported


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", [None] * 4),
        ("gpt2", [None] * 4),
        ("mistral sliding", [16] * 4),
        ("gemma2", [16, None, 16, None]),
        ("gemma3", [16, 16, 16, None]),
    ],
)
def test_the_window_of_each_layer_is_found(name: str, expected: list[int | None]) -> None:
    assert list(mask_probe.windows(build(name)).values()) == expected


@pytest.mark.parametrize("window", [15, 16, 17, 4096, 8190, 8191, 8192, 8193, 10_000, 200_000])
@pytest.mark.parametrize("name", ["mistral sliding", "gemma2", "qwen2 sliding"])
def test_a_window_of_any_size_is_found(name: str, window: int) -> None:
    model = build(name, sliding_window=window, max_position_embeddings=2**18)

    assert set(mask_probe.windows(model).values()) <= {window, None}
    assert window in mask_probe.windows(model).values()


@pytest.mark.parametrize("chunk", [15, 16, 17, 4096, 8190, 8191, 8192, 8193, 10_000, 200_000])
def test_a_chunk_of_any_size_is_seen(chunk: int) -> None:
    model = build("llama4", attention_chunk_size=chunk, max_position_embeddings=2**18)

    with pytest.raises(PathUnsupported, match="neither causal nor a sliding window"):
        mask_probe.windows(model)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        *(("llama", 1), ("mistral sliding", 1), ("gemma2", 2), ("qwen2 sliding", 3), ("gemma3", 4)),
        *(("llama4", 4), ("gpt-neo", 2), ("two kinds of layers", 2)),
        ("bloom", 4),  # nothing tells its layers apart
    ],
)
def test_the_first_layers_of_every_kind_are_counted(name: str, count: int) -> None:
    assert mask_probe.layers_of_every_kind(build(name)) == count


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("llama4", "neither causal nor a sliding window"),
        ("bert", "neither causal nor a sliding window"),
        ("gpt-j", "do not use the attention interface"),
    ],
)
def test_other_attention_patterns_are_unsupported(name: str, reason: str) -> None:
    with pytest.raises(PathUnsupported, match=reason):
        mask_probe.windows(build(name))


def test_probing_leaves_the_model_as_it_was() -> None:
    model = build("llama")
    tokens = torch.tensor([[3, 4, 5]])
    before = model(tokens).logits

    mask_probe.windows(model)

    assert torch.equal(model(tokens).logits, before)
