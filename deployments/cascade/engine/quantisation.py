"""Checkpoints with quantised weights: what they need, and what exactness means for them.

Quantised weights alone change nothing: a token's logits are those of the quantised model's plain
forward pass, within rounding. Quantised *activations* do: rounding noise then moves a value by a
whole step, and some schemes take their scale from all tokens of a pass. So where a library can, a
checkpoint whose scheme quantises activations is served with dense weights and full activations.

Shapes: `T` tokens, `I` inputs and `O` outputs of a layer.
"""

from __future__ import annotations

import json
import logging
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

log = logging.getLogger(__name__)

# What transformers needs to load each kind, by the name to import and to install; and our extra.
_ACCELERATE = ("accelerate", "accelerate")
_LIBRARIES: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "awq": ("gptq", (("gptqmodel", "gptqmodel"), _ACCELERATE)),
    "bitsandbytes": ("quantised", (("bitsandbytes", "bitsandbytes"), _ACCELERATE)),
    "compressed-tensors": (
        "quantised",
        (("compressed_tensors", "compressed-tensors"), _ACCELERATE),
    ),
    "fp8": ("quantised", (_ACCELERATE,)),
    "gptq": ("gptq", (("gptqmodel", "gptqmodel"), ("optimum", "optimum"), _ACCELERATE)),
    "torchao": ("quantised", (("torchao", "torchao"), _ACCELERATE)),
}

_FOR_GPUS = {"fp8", "mxfp8", "mxfp4"}  # transformers has no CPU kernels, and can unpack them

# Largest share of a layer's largest output by which a neighbour may change a token's, and by which
# a kernel may differ from the dense layer. Kernels of half precision err by 1e-2.
_NEIGHBOUR, _DENSE = 1e-3, 0.05
_LOUD = 3e4  # larger than any activation, and a float16

_FUSED_ROWS = 32  # outputs that bitsandbytes' fused kernel for CPUs computes together


def method(config: PreTrainedConfig) -> str | None:
    """Return the name of a checkpoint's quantisation, None if it has none."""
    stated: Any = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    found = stated.get("quant_method") if isinstance(stated, dict) else stated.quant_method
    return str(getattr(found, "value", found))


def prepare(name: str, config: PreTrainedConfig, *, device: torch.device) -> bool:
    """Check that a quantised checkpoint can be loaded; return whether to unpack its weights.

    Args:
        name: Of the checkpoint.
        config: Its configuration.
        device: Where the model will be.

    Raises:
        UnsupportedModel: A library is missing, or the scheme is one that is not served.
    """
    kind = str(method(config))
    extra, needed = _LIBRARIES.get(kind, ("", ()))
    missing = [package for module, package in needed if find_spec(module) is None]
    if missing:
        raise UnsupportedModel(
            f"{name!r} is quantised with {kind}, which needs {' and '.join(missing)}: "
            f"pip install 'speculative-cascades[{extra}]', or serve an unquantised checkpoint"
        )
    stated: Any = config.quantization_config
    if kind == "compressed-tensors":
        _check_scheme(name, stated)
    unpacked = is_unpacked(config, device=device)
    if unpacked and kind in _FOR_GPUS:
        stated["dequantize"] = True  # read by transformers
    return unpacked


def is_unpacked(config: PreTrainedConfig, *, device: torch.device) -> bool:
    """Return whether a quantised checkpoint is served with dense weights."""
    stated: Any = config.quantization_config
    match method(config):
        case "compressed-tensors":  # transformers would unpack them in the first pass
            return True
        case "bitsandbytes":  # 8 bits of activations too, outliers of a whole pass apart
            return bool(stated.get("load_in_8bit"))
        case "torchao":
            return "Activation" in json.dumps(stated)
        case kind:
            return kind in _FOR_GPUS and device.type == "cpu"


def _check_scheme(name: str, stated: dict[str, Any]) -> None:
    for key, what in (
        ("kv_cache_scheme", "its keys and values, which this server keeps in full precision"),
        ("transform_config", "weights that it rotates, which transformers does not undo"),
        ("sparsity_config", "sparse weights"),
    ):
        if stated.get(key):
            advice = f"; remove {key} from its config.json" if key == "kv_cache_scheme" else ""
            raise UnsupportedModel(
                f"{name!r} quantises {what} ({key} of compressed-tensors){advice}, or serve "
                "another checkpoint"
            )


def unpack(name: str, model: PreTrainedModel, *, dtype: torch.dtype | str) -> None:
    """Give a model dense weights, and its layers their own forward pass.

    Args:
        name: Of the checkpoint.
        model: As transformers loaded it.
        dtype: Of its numbers then; "auto" for that of the checkpoint.

    Raises:
        UnsupportedModel: It quantises something else than linear and embedding layers.
    """
    config: Any = model.config
    number: torch.dtype = dtype if isinstance(dtype, torch.dtype) else config.dtype
    quantiser: Any = getattr(model, "hf_quantizer", None)  # None if unpacked while it was loaded
    match method(config):
        case "compressed-tensors":
            _decompress(name, model)
        case "bitsandbytes":
            model.dequantize(number)
        case "torchao":
            for module in model.modules():
                weight: Any = getattr(module, "weight", None)
                if _is_torchao(weight):
                    dense = nn.Parameter(weight.dequantize(), requires_grad=False)
                    setattr(module, "weight", dense)  # noqa: B010 - typed as a tensor or module
        case _:
            pass
    if quantiser is not None:
        quantiser.remove_quantization_config(model)
    _cast(model, number)
    log.warning(
        "The quantised weights of %s are unpacked to %s; activations are not quantised",
        name,
        str(number).removeprefix("torch."),
    )


def _decompress(name: str, model: PreTrainedModel) -> None:
    """Unpack the weights of compressed-tensors."""
    from compressed_tensors.compressors import decompress_module  # noqa: PLC0415 - an extra

    quantiser: Any = model.hf_quantizer
    scheme: Any = "quantization_scheme"
    quantised = [module for module in model.modules() if getattr(module, scheme, None) is not None]
    for module in quantised:
        if not isinstance(module, nn.Linear | nn.Embedding):
            raise UnsupportedModel(
                f"{name!r} quantises what is inside {type(module).__name__}, not its weights "
                "alone; serve another checkpoint"
            )
        decompress_module(module, leave_decompressed=False)
        vars(module).pop("forward", None)  # a second name of its class's, as it was
    quantiser.compressor.remove_decompression_hook(model)


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Cast what was dense in a checkpoint that was unpacked; transformers may leave it."""
    kept = (*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ()))  # noqa: SLF001 - transformers has no public reader
    for key, weight in model.named_parameters():
        if weight.is_floating_point() and not any(part in key for part in kept):
            weight.data = weight.data.to(dtype)


def _is_torchao(weight: Any) -> bool:
    return isinstance(weight, Tensor) and type(weight).__module__.startswith("torchao.")


def check_layers(name: str, model: PreTrainedModel) -> None:
    """Check the linear layers of a model with quantised weights on the activations of a short text.

    A token's outputs must not depend on other tokens, and must be those of the dense layer, where
    the library can unpack it: within 1e-3 and 5e-2 of the largest.

    Args:
        name: Of the checkpoint.
        model: On its device.

    Raises:
        UnsupportedModel: A layer is not like that, or fails.
    """
    if getattr(model, "hf_quantizer", None) is None:
        return
    _keep_precision(model)
    hooks = [
        module.register_forward_pre_hook(_Check(name, layer), with_kwargs=True)
        for layer, module in model.named_modules()
        if hasattr(module, "in_features")  # a linear layer of any library
    ]
    size = int(model.config.get_text_config(decoder=True).vocab_size)
    ids_1T = torch.tensor([[(7 * i + 3) % size for i in range(16)]], device=model.device)
    try:
        with torch.inference_mode():
            model(input_ids=ids_1T, use_cache=False)
    except UnsupportedModel:
        raise
    # Kernels of libraries fail in any way: for a device, a type, a shape.
    except Exception as error:
        raise UnsupportedModel(
            f"The quantised weights of {name!r} ({method(model.config)}) cannot run on "
            f"{model.device} in {model.dtype}: {str(error)[:200]}; leave engine.dtype at auto, or "
            "serve another checkpoint"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()


def _keep_precision(model: PreTrainedModel) -> None:
    """Let 4-bit layers of bitsandbytes compute in the type that they state.

    Where a CPU multiplies bfloat16 numbers, bitsandbytes takes a kernel that rounds activations to
    that type, whatever the layer's is, and that fails at matrices without whole blocks.
    """
    for module in model.modules():
        fused: Any = "support_avx512bf16_for_cpu"
        state: Any = getattr(getattr(module, "weight", None), "quant_state", None)
        if not hasattr(module, fused) or state is None:
            continue
        outputs, inputs = state.shape
        whole = outputs % _FUSED_ROWS == 0 and inputs % state.blocksize == 0
        if not whole or (getattr(module, "compute_dtype", None) or model.dtype) != torch.bfloat16:
            setattr(module, fused, False)


class _Check:
    """Checks a layer on its inputs, before it runs."""

    def __init__(self, name: str, layer: str) -> None:
        self._name = name
        self._layer = layer

    def __call__(self, module: Any, args: tuple[Any, ...], others: dict[str, Any]) -> None:
        inputs = args[0] if len(args) == 1 and not others else None
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            return
        dense_OI = _dense(module)
        tokens = inputs.shape[-2]
        quiet, loud = (
            module.forward(torch.cat([inputs, other], dim=-2))
            for other in (inputs, torch.full_like(inputs, _LOUD))
        )
        if not isinstance(quiet, Tensor) or quiet.shape[-2] != 2 * tokens:
            return
        quiet = quiet[..., :tokens, :]
        error = _error(loud[..., :tokens, :], quiet)
        if not error <= _NEIGHBOUR:
            raise UnsupportedModel(
                f"{self._name!r} quantises activations by a scale of the whole pass "
                f"({self._layer}), so what is beside a token would change its logits, by "
                f"{error:.0e} here; serve a checkpoint of quantised weights alone, or one whose "
                "scales are per token"
            )
        if dense_OI is None:
            return
        error = _error(quiet, linear(inputs, dense_OI.to(inputs.dtype), module.bias))
        if not error <= _DENSE:
            raise UnsupportedModel(
                f"{self._layer} of {self._name!r} differs from its dense weights by {error:.0e} "
                f"of the largest output (allowed {_DENSE}): its kernel does not work on this "
                "machine; serve another checkpoint"
            )


def _error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference as a share of the largest value."""
    difference = (actual.float() - expected.float()).abs().max()
    return float(difference / expected.abs().max().float().clamp(min=1e-12))


def _dense(module: Any) -> Tensor | None:
    """Return the weights of a quantised linear layer `[O, I]`, None for others."""
    if not isinstance(module, nn.Linear):
        return None
    weight: Any = module.weight
    if _is_torchao(weight):
        return weight.dequantize()
    if type(weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit  # noqa: PLC0415 - an extra

        return dequantize_4bit(weight.data, weight.quant_state)
    return None
