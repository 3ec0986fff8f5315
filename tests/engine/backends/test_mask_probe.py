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
