"""The engine's logits are those of the model's plain forward pass."""

from __future__ import annotations

from inspect import Signature, signature
from typing import Any

import pytest
import torch
from tests.engine.architectures import (
    LLAMA_LIKE,
    MORE,
    PADDED,
    ROPE,
    VARLEN,
    build,
    with_slow,
)
from tests.engine.harness import EngineHarness, ragged_scenario
from torch import nn

from cascade.engine.backends import cpu_llama
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.batch import Segment
from cascade.engine.kv_pool import MIN_RANGE
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

TOLERANCE = 1e-4
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    with_slow(
        VARLEN, fast=("llama", "gemma3", "mistral sliding", "gpt2", "gpt-oss", "deepseek-v3")
    ),
)
def test_the_flat_path_is_exact(name: str) -> None:
    harness = EngineHarness(build(name), EngineSettings(cache_tokens=1024, path=Path.FLAT))

    ragged_scenario(harness)

    assert harness.largest > 0.5, "the logits differ enough for an error to show"
    assert isinstance(harness.engine.runner, VarlenRunner)
    assert harness.worst < TOLERANCE


@pytest.mark.parametrize("name", with_slow(LLAMA_LIKE, fast=("llama", "qwen2 sliding", "yarn")))
@pytest.mark.parametrize("packed", [True, False])
def test_the_lean_path_is_exact(name: str, *, packed: bool) -> None:
    harness = EngineHarness(build(name), EngineSettings(cache_tokens=1024, packed=packed))

    ragged_scenario(harness)

    assert isinstance(harness.engine.runner, CpuLlamaRunner)
    assert harness.worst < TOLERANCE


@pytest.mark.parametrize("name", with_slow(LLAMA_LIKE, fast=("qwen2 sliding", "qwen3")))
def test_the_lean_path_in_bfloat16_is_exact_within_rounding(name: str) -> None:
    model = build(name)
    nn.Module.to(model, torch.bfloat16)
    harness = EngineHarness(model, EngineSettings(cache_tokens=1024))

    ragged_scenario(harness)

    assert isinstance(harness.engine.runner, CpuLlamaRunner)
    assert harness.worst < 0.1 * harness.largest


def test_the_lean_path_grows_its_table_of_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_llama, "_POSITIONS", 16)
    harness = EngineHarness(build("llama"), EngineSettings(cache_tokens=1024, path=Path.LEAN))

    ragged_scenario(harness)

    assert harness.worst < TOLERANCE


@pytest.mark.parametrize("name", with_slow(PADDED, fast=("bloom", "falcon alibi", "llama4")))
def test_the_padded_path_is_exact(name: str) -> None:
    harness = EngineHarness(build(name), EngineSettings(cache_tokens=1024, path=Path.PADDED))

    ragged_scenario(harness)

    assert isinstance(harness.engine.runner, PaddedRunner)
    assert harness.worst < TOLERANCE


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_the_padded_path_finds_the_cache_under_both_of_its_names(name: str) -> None:
    model = build("llama")
    forward = model.forward
    own = next(one for one in ("past_key_values", "cache") if one in signature(forward).parameters)

    def renamed(**arguments: Any) -> Any:
        return forward(**{own if key == name else key: arguments[key] for key in arguments})

    parameters = [
        one.replace(name=name if one.name == own else one.name, kind=one.KEYWORD_ONLY)
        for one in signature(forward).parameters.values()
        if one.kind is not one.VAR_KEYWORD
    ]
    renamed.__signature__ = Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess] - what `inspect` reads
    model.forward = renamed
    runner = PaddedRunner(model)
    runner.resize(num_slots=MIN_RANGE)
    tokens = (3, 4, 5)

    with torch.inference_mode():
        found = runner.forward([Segment(start=0, past=0, tokens=tokens, num_logits=3)])
        expected = build("llama")(torch.tensor([tokens])).logits[0]

    assert torch.allclose(found, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("longrope", Path.FLAT),
        ("dynamic", Path.PADDED),
        *(pytest.param(name, Path.FLAT, marks=SLOW) for name in ROPE if name != "longrope"),
        pytest.param("longrope", Path.PADDED, marks=SLOW),
    ],
)
def test_a_long_session_does_not_change_the_rope_of_a_short_one(name: str, path: Path) -> None:
    model = build(name)
    try:
        with torch.inference_mode():
            for _ in range(2):
                model(torch.ones((1, 100), dtype=torch.long))
    except UnboundLocalError:
        pytest.skip("this release of transformers runs LongRoPE of several kinds once only")
    harness = EngineHarness(model, EngineSettings(cache_tokens=1024, max_step_tokens=48, path=path))

    ragged_scenario(harness)

    assert harness.worst < TOLERANCE


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("qwen3", Path.AUTO),
        ("gemma2", Path.FLAT),
        pytest.param("gemma2", Path.AUTO, marks=SLOW),
        pytest.param("mistral sliding", Path.AUTO, marks=SLOW),
        pytest.param("mistral sliding", Path.FLAT, marks=SLOW),
        pytest.param("qwen3", Path.FLAT, marks=SLOW),
    ],
)
def test_deterministic_engines_are_exact(name: str, path: Path) -> None:
    harness = EngineHarness(
        build(name), EngineSettings(cache_tokens=1024, deterministic=True, path=path)
    )

    ragged_scenario(harness)

    assert harness.worst < TOLERANCE


def test_a_mixture_of_experts_is_refused_by_a_deterministic_engine() -> None:
    with pytest.raises(UnsupportedModel, match="its logits depend on the batch"):
        EngineHarness(build("deepseek-v3"), EngineSettings(deterministic=True))


def test_padded_batches_are_not_deterministic() -> None:
    with pytest.raises(ValueError, match="path is padded, whose logits depend on the batch"):
        EngineSettings(deterministic=True, path=Path.PADDED)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_small_passes_and_a_full_cache_change_nothing(name: str) -> None:
    settings = EngineSettings(cache_tokens=512, max_step_tokens=16)
    harness = EngineHarness(build(name), settings)

    ragged_scenario(harness)

    assert harness.worst < TOLERANCE
    assert harness.engine.stats().preemptions


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "recurrent state, which cannot be rolled back"),
        ("jamba", "recurrent state, which cannot be rolled back"),
        ("minimax", "layers of kind linear_attention, whose recurrent state cannot be rolled back"),
        ("bert", "cannot be served exactly"),
    ],
)
def test_a_model_that_cannot_be_rolled_back_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        EngineHarness(build(name))


def test_diffllama_is_refused_on_the_flat_path() -> None:
    with pytest.raises(UnsupportedModel, match="differ from the plain forward pass"):
        EngineHarness(build("diffllama"), EngineSettings(path=Path.FLAT))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_architectures_are_exact(name: str) -> None:
    harness = EngineHarness(build(name), EngineSettings(cache_tokens=1024))

    ragged_scenario(harness)

    assert harness.worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", VARLEN)
def test_the_padded_path_is_exact_for_models_of_the_flat_path(name: str) -> None:
    harness = EngineHarness(build(name), EngineSettings(cache_tokens=1024, path=Path.PADDED))

    ragged_scenario(harness)

    assert harness.worst < TOLERANCE
