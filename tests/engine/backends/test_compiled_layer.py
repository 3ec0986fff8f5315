from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import pytest
import torch
from tests.engine.architectures import VOCABULARY, build
from torch import nn

from cascade.engine.backends import compiled_layer, compiled_linear, widened_linear
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.batch import Segment

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENS = tuple(3 + 7 * index % 200 for index in range(40))


@pytest.fixture(
    autouse=True, params=[(1, 4), pytest.param(compiled_layer.ROWS, marks=pytest.mark.slow)]
)
def rows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ...]:
    """Numbers of tokens that functions are compiled for, also for small models, on any CPU."""
    monkeypatch.setattr(compiled_layer, "ROWS", request.param)
    monkeypatch.setattr(compiled_layer, "MOST_ROWS", 2 * request.param[-1])
    monkeypatch.setattr(widened_linear, "_in_hardware", Mock(return_value=False))
    monkeypatch.setattr(compiled_linear, "MIN_WEIGHTS", 0)
    monkeypatch.setattr(compiled_linear, "faster", Mock(return_value=True))
    return request.param


def in_bfloat16(name: str = "qwen2", **settings: Any) -> PreTrainedModel:
    """Return a model with an odd vocabulary, and with biases if it is a Qwen 2."""
    model = build(name, **settings)
    for one, parameter in model.named_parameters():
        if one.endswith("bias"):
            nn.init.normal_(parameter)
    nn.Module.to(model, torch.bfloat16)
    return model


def runner_of(model: PreTrainedModel) -> CpuLlamaRunner:
    runner = CpuLlamaRunner(model)
    runner.resize(num_slots=512)
    return runner


@pytest.mark.parametrize(
    "name", ["qwen2", *(pytest.param(one, marks=pytest.mark.slow) for one in ("llama", "qwen3"))]
)
def test_a_pass_of_few_tokens_is_computed_in_float32(name: str, rows: tuple[int, ...]) -> None:
    model = in_bfloat16(name)
    wide = copy.deepcopy(model)
    nn.Module.to(wide, torch.float32)
    runner = runner_of(model)
    with torch.inference_mode(), torch.compiler.set_stance("fail_on_recompile"):
        for count in range(1, 2 * rows[-1] + 2):
            runner.forward([Segment(start=0, past=0, tokens=TOKENS[:7], num_logits=0)])
            expected = wide(torch.tensor([TOKENS[: 7 + count]])).logits[0]
            for wanted in {0, 1, count}:
                found = runner.forward(
                    [Segment(start=0, past=7, tokens=TOKENS[7 : 7 + count], num_logits=wanted)]
                )
                assert found.shape == (wanted, VOCABULARY)
                torch.testing.assert_close(
                    found, expected[7 + count - wanted :], rtol=1e-4, atol=1e-4
                )


def test_sessions_share_a_pass_of_few_tokens(rows: tuple[int, ...]) -> None:
    model = in_bfloat16()
    wide = copy.deepcopy(model)
    nn.Module.to(wide, torch.float32)
    counts = (rows[-1] - 2, 1, 2)
    with torch.inference_mode():
        found = runner_of(model).forward(
            [
                Segment(
                    start=64 * index, past=0, tokens=TOKENS[index : index + count], num_logits=1
                )
                for index, count in enumerate(counts)
            ]
        )
        for index, count in enumerate(counts):
            expected = wide(torch.tensor([TOKENS[index : index + count]])).logits[0, -1]
            torch.testing.assert_close(found[index], expected, rtol=1e-4, atol=1e-4)


def test_without_a_compiler_a_pass_of_few_tokens_is_rounded_to_bfloat16(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    segment = Segment(start=0, past=0, tokens=TOKENS[:3], num_logits=3)
    with torch.inference_mode():
        expected = runner_of(in_bfloat16()).forward([segment])
        monkeypatch.setattr(
            compiled_layer,
            "_function",
            Mock(return_value=Mock(side_effect=RuntimeError("No working C++ compiler found"))),
        )
        found = runner_of(in_bfloat16()).forward([segment])

    assert "no kernel compiles: No working C++ compiler found" in caplog.text
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("settings", "helps"),
    [({}, True), ({"hidden_act": "gelu"}, False), ({"hidden_size": 61, "head_dim": 16}, False)],
)
def test_unusual_layers_are_not_compiled(settings: dict[str, Any], *, helps: bool) -> None:
    assert compiled_layer.helps(in_bfloat16(**settings)) is helps
