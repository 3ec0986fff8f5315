"""Quantised checkpoints are loaded, checked layer by layer, and refused with what to do."""

from __future__ import annotations

import json
import logging
import sys
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.conftest import random_model, words
from tests.engine.architectures import build
from tests.support.quantised import KINDS, MORE, read
from transformers import BitsAndBytesConfig

from cascade.engine import quantisation
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.prepacked_linear import pack
from cascade.engine.backends.select import select_runner
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.memory_plan import plan_memory
from cascade.engine.model_loader import load
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from pathlib import Path as Folder

ALL = KINDS | MORE
PER_TENSOR = "torchao int8 activations per tensor"
SERVED = [name for name in ALL if not name.endswith("keys and values")]
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])


class Checkpoints:
    """One checkpoint of each kind, of the same model."""

    def __init__(self, root: Folder) -> None:
        self._root = root
        self.plain = random_model(root / "plain", vocabulary=64, width=64, layers=2, seed=3).path

    def __getitem__(self, name: str) -> Folder:
        folder = self._root / name
        return folder if folder.exists() else ALL[name].make(self.plain, folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    return Checkpoints(tmp_path_factory.mktemp("quantised"))


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(TOKENS).logits[0].float()


@pytest.mark.parametrize("name", SERVED)
def test_a_kind_is_loaded_and_proved_exact(checkpoints: Checkpoints, name: str) -> None:
    """Dense weights are packed and run on the fastest path; others as their library runs them."""
    kind = ALL[name]
    loaded = load(str(checkpoints[name]), device="cpu")
    model = loaded.model

    assert loaded.vocabulary == 64
    own = logits(kind.reference(checkpoints[name]))
    torch.testing.assert_close(logits(model), own, rtol=0, atol=1e-3)
    assert (logits(model) - logits(read(checkpoints.plain))).abs().max() > 1e-2
    runner = select_runner(model, settings=EngineSettings(cache_tokens=1024))
    assert type(runner) is (CpuLlamaRunner if kind.dense else VarlenRunner)


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes 4-bit"])
def test_the_padded_path_is_exact_too(checkpoints: Checkpoints, name: str) -> None:
    model = load(str(checkpoints[name]), device="cpu").model

    assert select_runner(model, settings=EngineSettings(cache_tokens=1024, path=Path.PADDED))


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes 4-bit"])
@pytest.mark.parametrize("architecture", ["qwen2-moe", "gemma3"])
def test_other_architectures_are_exact_too(tmp_path: Folder, architecture: str, name: str) -> None:
    build(architecture).save_pretrained(tmp_path / "plain")
    words(64).save_pretrained(tmp_path / "plain")
    folder = KINDS[name].make(tmp_path / "plain", tmp_path / "quantised")
    model = load(str(folder), device="cpu").model

    torch.testing.assert_close(logits(model), logits(KINDS[name].reference(folder)))
    assert type(select_runner(model, settings=EngineSettings(cache_tokens=1024))) is VarlenRunner


@pytest.mark.parametrize("name", ["compressed-tensors W4A16", "fp8", "bitsandbytes 8-bit"])
def test_unpacked_weights_have_the_requested_dtype(checkpoints: Checkpoints, name: str) -> None:
    model = load(str(checkpoints[name]), device="cpu", dtype="bfloat16").model

    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_that_weights_are_unpacked_is_logged(
    checkpoints: Checkpoints, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="cascade"):
        load(str(checkpoints["compressed-tensors FP8"]), device="cpu")

    assert "unpacked to float32; activations are not quantised" in caplog.text


def test_weights_that_stay_quantised_have_the_dtype_of_their_checkpoint(
    checkpoints: Checkpoints, tmp_path: Folder
) -> None:
    half = tmp_path / "half"
    read(checkpoints.plain, dtype=torch.bfloat16).save_pretrained(half)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (half / file).write_bytes((checkpoints.plain / file).read_bytes())
    folder = MORE["torchao float8"].make(half, tmp_path / "quantised")

    assert load(str(folder), device="cpu").model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("bitsandbytes 4-bit", "run in float32, not in bfloat16; set engine.dtype to auto or flo"),
        ("torchao int4", r"cannot run on cpu in torch.bfloat16: .*leave engine.dtype at auto"),
    ],
)
def test_a_dtype_that_the_kernels_do_not_have_is_refused(
    checkpoints: Checkpoints, name: str, reason: str
) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        load(str(checkpoints[name]), device="cpu", dtype="bfloat16")


@pytest.mark.parametrize("name", [PER_TENSOR, "bitsandbytes 8-bit"])
def test_a_layer_whose_tokens_change_each_other_is_refused(
    checkpoints: Checkpoints, name: str
) -> None:
    """As transformers loads them: `load` unpacks them."""
    with pytest.raises(UnsupportedModel, match=r"a scale of the whole pass \(model.layers.0.self"):
        quantisation.check_layers(name, read(checkpoints[name]))


@pytest.mark.parametrize(
    "name", ["torchao int8 activations per token", "compressed-tensors FP8 per token"]
)
def test_scales_of_each_token_are_told_from_scales_of_a_pass(
    checkpoints: Checkpoints, name: str
) -> None:
    quantisation.check_layers(name, read(checkpoints[name]))


@pytest.mark.parametrize("name", ["torchao int8", "bitsandbytes 4-bit"])
def test_a_kernel_that_computes_something_else_is_refused(
    checkpoints: Checkpoints, name: str
) -> None:
    model = read(checkpoints[name])
    layer = model.model.layers[1].mlp.up_proj
    forward = layer.forward

    def wrong(inputs: torch.Tensor) -> torch.Tensor:
        return 1.1 * forward(inputs)

    layer.forward = wrong
    with pytest.raises(UnsupportedModel, match=r"up_proj of .* differs from its dense weights by"):
        quantisation.check_layers(name, model)


@pytest.mark.parametrize(
    ("settings", "blocksize", "fused"),
    [
        ({}, 64, False),
        ({"bnb_4bit_compute_dtype": torch.bfloat16}, 64, True),
        ({"bnb_4bit_compute_dtype": torch.bfloat16}, 4096, False),
    ],
)
def test_four_bits_are_not_rounded_to_bfloat16_unasked(
    checkpoints: Checkpoints, settings: dict[str, Any], blocksize: int, *, fused: bool
) -> None:
    """By the kernel that bitsandbytes takes on CPUs with such instructions."""
    stated: Any = BitsAndBytesConfig(load_in_4bit=True, **settings)
    model = read(checkpoints.plain, quantization_config=stated)
    layer = model.model.layers[1].mlp.up_proj
    layer.weight.quant_state.blocksize = blocksize
    layer.support_avx512bf16_for_cpu = True

    quantisation._keep_precision(model)  # pyright: ignore[reportPrivateUsage] - the kernel is not everywhere

    assert layer.support_avx512bf16_for_cpu is fused


def test_quantised_keys_and_values_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(UnsupportedModel, match=r"remove kv_cache_scheme from its config\.json"):
        load(str(checkpoints["compressed-tensors with quantised keys and values"]))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config of compressed"),
        ({"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config of compressed"),
    ],
)
def test_what_transformers_would_ignore_is_refused(
    checkpoints: Checkpoints, tmp_path: Folder, change: dict[str, Any], reason: str
) -> None:
    kind = KINDS["compressed-tensors W8A16"]
    file = kind.make(checkpoints.plain, tmp_path / "changed") / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))

    with pytest.raises(UnsupportedModel, match=reason):
        load(str(file.parent))


@pytest.mark.parametrize("name", ["torchao int8", "compressed-tensors W4A16"])
def test_planned_memory_is_that_of_the_weights_as_they_are_served(
    checkpoints: Checkpoints, name: str
) -> None:
    folder = checkpoints[name]
    dense = plan_memory(str(checkpoints.plain)).weights_bytes
    files = sum(file.stat().st_size for file in folder.glob("*.safetensors"))

    assert plan_memory(str(folder)).weights_bytes == (dense if ALL[name].dense else files)


LIBRARIES = {
    "torchao int8": ("torchao", "torchao"),
    "bitsandbytes 4-bit": ("bitsandbytes", "bitsandbytes"),
    "compressed-tensors W4A16": ("compressed_tensors", "compressed-tensors"),
    "fp8": ("accelerate", "accelerate"),
}


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_library_that_is_missing_is_named_with_the_command(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    module, package = LIBRARIES[name]
    folder = checkpoints[name]
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed

    with pytest.raises(
        UnsupportedModel,
        match=rf"needs {package}: pip install 'speculative-cascades\[quantised\]'",
    ):
        load(str(folder))


@pytest.mark.skipif(find_spec("gptqmodel") is not None, reason="gptqmodel is installed")
@pytest.mark.parametrize("kind", ["gptq", "awq"])
def test_gptq_and_awq_ask_for_their_library(
    checkpoints: Checkpoints, tmp_path: Folder, kind: str
) -> None:
    config = json.loads((checkpoints.plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": kind, "bits": 4, "group_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(config))

    with pytest.raises(
        UnsupportedModel,
        match=rf"with {kind}, which needs gptqmodel.*pip install 'speculative-cascades\[gptq\]'",
    ):
        load(str(tmp_path))


def test_layers_whose_forward_pass_was_replaced_are_not_packed(checkpoints: Checkpoints) -> None:
    """compressed-tensors quantises activations there."""
    model = read(checkpoints["compressed-tensors FP8"])
    model(TOKENS)  # unpacks its weights
    layer = model.model.layers[0].mlp.up_proj
    assert type(layer.weight) is torch.nn.Parameter
    before = logits(model)

    pack(model, deterministic=True)

    assert torch.equal(logits(model)[0], before[0])
    with pytest.raises(UnsupportedModel, match="lean path: its weights are quantised"):
        select_runner(model, settings=EngineSettings(cache_tokens=1024, path=Path.LEAN))
