"""Quantised checkpoints of a small model, each written by its own library."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationConfig,
    QuantizationScheme,
    QuantizationStatus,
    apply_quantization_config,
)
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file
from torchao.quantization import (
    Float8WeightOnlyConfig,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerGroup,
    PerRow,
    PerTensor,
)
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CompressedTensorsConfig,
    FineGrainedFP8Config,
    TorchAoConfig,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_GROUP = 32  # inputs that share a scale
_BLOCK = 32  # of a matrix in FP8, each way
_FP8 = torch.float8_e4m3fn
_LARGEST = 8.0  # input that a fixed scale is made for
_TORCH_INT4: torch.dtype = getattr(torch, "int4")  # noqa: B009 - torch's stubs lack it
_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
_INT4 = {"num_bits": 4, "type": "int", "symmetric": True}
_FLOAT8 = {"num_bits": 8, "type": "float", "symmetric": True}
_GROUPED = {"strategy": "group", "group_size": _GROUP}
_DYNAMIC = {"strategy": "token", "dynamic": True}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A way to quantise."""

    write: Callable[[Path, Path], object]  # from a checkpoint to a folder
    dense: bool = False  # served with unpacked weights
    reference: Callable[[Path], Any]  # the model as transformers runs it

    def make(self, source: Path, folder: Path) -> Path:
        """Write the quantised checkpoint of a model, with its tokenizer."""
        folder.mkdir(parents=True)
        self.write(source, folder)
        AutoTokenizer.from_pretrained(source).save_pretrained(folder)
        return folder


def read(folder: Path, **settings: Any) -> Any:
    """Return a model as transformers loads it."""
    return AutoModelForCausalLM.from_pretrained(folder, **settings).eval()


def _by_transformers(config: Any, source: Path, folder: Path) -> None:
    read(source, quantization_config=config).save_pretrained(folder)


def _compressed(
    source: Path,
    folder: Path,
    *,
    weights: dict[str, Any],
    inputs: dict[str, Any] | None = None,
    mlp: dict[str, Any] | None = None,
    **more: Any,
) -> None:
    """Write a checkpoint of compressed-tensors.

    Args:
        source: The model.
        folder: Of the new checkpoint.
        weights: How its weights are quantised.
        inputs: How the inputs of its linear layers are.
        mlp: How weights of MLPs are quantised, if in another way.
        more: Of the configuration.
    """
    model = read(source)
    schemes = {"all": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}}
    if mlp:
        schemes = {"mlp": {"targets": [r"re:.*mlp\..*"], "weights": mlp}} | schemes
    config = QuantizationConfig(
        config_groups={
            name: QuantizationScheme.model_validate(scheme) for name, scheme in schemes.items()
        },
        ignore=["lm_head"],
        quantization_status=QuantizationStatus.INITIALIZED,
        **more,
    )
    apply_quantization_config(model, config, show_progress=False)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and hasattr(module, "weight_scale"):
            _calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder)
    compressor.update_config(str(folder))


def _calibrate(module: Any) -> None:
    scheme = module.quantization_scheme
    weight_OI = module.weight.detach()
    match scheme.weights.strategy:
        case "tensor":
            runs = weight_OI.view(1, -1)
        case "channel":
            runs = weight_OI[:, None]
        case _:
            runs = weight_OI.unflatten(1, (-1, _GROUP))
    scale, _ = calculate_qparams(runs.amin(-1), runs.amax(-1), scheme.weights)
    module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
    if hasattr(module, "input_scale"):
        module.input_scale.data.fill_(_LARGEST / torch.finfo(_FP8).max)
    module.quantization_status = QuantizationStatus.FROZEN


def _fine_grained(source: Path, folder: Path) -> None:
    """Write a checkpoint in FP8 with a scale per block, as those of DeepSeek and Qwen3 are."""
    model = read(source)
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in model.state_dict().items():
        tensors[name] = weight.contiguous()
        if name.endswith("proj.weight"):
            blocks = weight.unflatten(1, (-1, _BLOCK)).unflatten(0, (-1, _BLOCK))
            scale = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(_FP8).max
            tensors[name] = (blocks / scale).flatten(2).flatten(0, 1).to(_FP8)
            tensors[f"{name}_scale_inv"] = scale[:, 0, :, 0].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    stated = model.config.to_dict() | {
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
        }
    }
    (folder / "config.json").write_text(json.dumps(stated, default=str))


def _torchao(config: Any) -> Callable[[Path, Path], None]:
    return partial(_by_transformers, TorchAoConfig(config))


def _bitsandbytes(**settings: Any) -> Callable[[Path, Path], None]:
    return partial(_by_transformers, BitsAndBytesConfig(**settings))


def _unpacked_compressed(folder: Path) -> Any:
    with warnings.catch_warnings(action="ignore"):  # that only part of the configuration is read
        return read(folder, quantization_config=CompressedTensorsConfig(dequantize=True))


def _unpacked_torchao(folder: Path) -> Any:
    model = read(folder)
    for module in model.modules():
        if isinstance(module, torch.nn.Linear) and type(module.weight) is not torch.nn.Parameter:
            weight: Any = module.weight
            module.weight = torch.nn.Parameter(weight.dequantize(), requires_grad=False)
    return model


def _in_float32(folder: Path) -> Any:
    model = read(folder)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # a kernel that rounds to bfloat16
            setattr(module, "support_avx512bf16_for_cpu", False)  # noqa: B010 - typed as a tensor or module
    return model


KINDS: dict[str, Kind] = {
    "torchao int8": Kind(write=_torchao(Int8WeightOnlyConfig()), reference=read),
    "torchao int4": Kind(
        write=_torchao(
            IntxWeightOnlyConfig(weight_dtype=_TORCH_INT4, granularity=PerGroup(_GROUP))
        ),
        reference=read,
    ),
    "bitsandbytes 4-bit": Kind(
        write=_bitsandbytes(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        reference=_in_float32,
    ),
    "bitsandbytes 8-bit": Kind(
        write=_bitsandbytes(load_in_8bit=True),
        dense=True,
        reference=lambda folder: read(folder).dequantize(torch.float32),
    ),
    "compressed-tensors W8A16": Kind(
        write=partial(_compressed, weights={**_INT8, "strategy": "channel"}),
        dense=True,
        reference=read,
    ),
    "compressed-tensors W4A16": Kind(
        write=partial(_compressed, weights={**_INT4, **_GROUPED}), dense=True, reference=read
    ),
    "compressed-tensors FP8": Kind(
        write=partial(
            _compressed,
            weights={**_FLOAT8, "strategy": "tensor"},
            inputs={**_FLOAT8, "strategy": "tensor"},
        ),
        dense=True,
        reference=_unpacked_compressed,
    ),
    "fp8": Kind(
        write=_fine_grained,
        dense=True,
        reference=lambda folder: read(
            folder, quantization_config=FineGrainedFP8Config(dequantize=True)
        ),
    ),
}

# More of the same libraries, for single tests.
MORE: dict[str, Kind] = {
    "torchao float8": Kind(write=_torchao(Float8WeightOnlyConfig()), reference=read),
    "torchao int8 activations per tensor": Kind(
        write=_torchao(Int8DynamicActivationInt8WeightConfig(granularity=PerTensor())),
        dense=True,
        reference=_unpacked_torchao,
    ),
    "torchao int8 activations per token": Kind(
        write=_torchao(Int8DynamicActivationInt8WeightConfig(granularity=PerRow())),
        dense=True,
        reference=_unpacked_torchao,
    ),
    "bitsandbytes 4-bit, doubly": Kind(
        write=_bitsandbytes(
            load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_use_double_quant=True
        ),
        reference=_in_float32,
    ),
    "compressed-tensors FP8 per token": Kind(
        write=partial(
            _compressed,
            weights={**_FLOAT8, "strategy": "channel"},
            inputs={**_FLOAT8, **_DYNAMIC},
        ),
        dense=True,
        reference=_unpacked_compressed,
    ),
    "compressed-tensors W8A8 per tensor": Kind(
        write=partial(
            _compressed,
            weights={**_INT8, "strategy": "channel"},
            inputs={**_INT8, "strategy": "tensor", "dynamic": True},
        ),
        dense=True,
        reference=_unpacked_compressed,
    ),
    "compressed-tensors in two schemes": Kind(
        write=partial(
            _compressed,
            weights={**_INT8, "strategy": "channel"},
            mlp={**_INT4, **_GROUPED},
        ),
        dense=True,
        reference=read,
    ),
    "compressed-tensors with quantised keys and values": Kind(
        write=partial(
            _compressed,
            weights={**_INT8, "strategy": "channel"},
            kv_cache_scheme={**_FLOAT8, "strategy": "tensor"},
        ),
        reference=read,
    ),
}
