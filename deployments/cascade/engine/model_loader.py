"""Load one model. Weights come from safetensors; a checkpoint's own code runs only if allowed."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    AutoModelForSeq2SeqLM,
)
from transformers.distributed.configuration_utils import DistributedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import model_type_to_module_name

from cascade.engine import progress, quantisation, tp_plan
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

    from cascade.engine.ranks import Ranks

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PACKED = ("I8", "U8", "F8", "F4")  # how safetensors names the types of quantised numbers
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device."""

    model: PreTrainedModel
    vocabulary: int  # logits kept per token
    context_length: int | None  # None if unknown
    owned: bool = False  # by the engine that runs it, which may free weights that it has copied
    ranks: Ranks | None = None  # that it is sharded over


def load(  # noqa: PLR0913 - what transformers is told
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    tensor_parallel: int = 1,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Return the model at a local path or of a Hugging Face repository, for one engine.

    Args:
        name: Directory or repository id.
        device: A torch device, or "auto": cuda if there is one, else cpu.
        dtype: "float32", "bfloat16", "float16" or "auto": float32 on a CPU, else the checkpoint's,
            which is also that of quantised weights that stay so.
        tensor_parallel: The ranks of the process group of this process, which share the weights.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        UnsupportedModel: There is no such model, or this server cannot run it.
    """
    torch_device = _device(device)
    config = read_config(name, revision=revision, trust_remote_code=trust_remote_code)
    quantised = quantisation.method(config) is not None
    dense = quantised and quantisation.prepare(name, config, device=torch_device)
    _check_files(name, quantised=quantised)
    # transformers ignores this file if it is broken.
    read_json(name, "generation_config.json", revision=revision)
    number = _dtype(dtype, torch_device)
    model = _weights(
        name,
        config=config,
        dtype="auto" if quantised and dtype == "auto" and not dense else number,
        device_map={"": torch_device} if quantised else None,  # kernels are chosen by the device
        attention=required_attention(config),
        tensor_parallel=tensor_parallel,
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    try:
        if tensor_parallel == 1:  # else each rank's part is on its device
            model = model.to(torch_device)  # pyright: ignore[reportArgumentType] - stub of `to`
    except (RuntimeError, AssertionError) as error:
        raise UnsupportedModel(
            f"{name!r} cannot be loaded to device {device!r}: {first_line(error)}"
        ) from error
    if dense:
        quantisation.unpack(name, model, dtype=number)
    elif quantised:
        quantisation.check_layers(name, model)
        _check_dtype(name, model, dtype)
    _check_numbers(name, model)
    return replace(adopt(model), owned=True)


def adopt(model: PreTrainedModel) -> LoadedModel:
    """Return `model`, already in memory, as a loaded one."""
    return LoadedModel(
        model=model.eval().requires_grad_(requires_grad=False),
        vocabulary=_vocabulary(model),
        context_length=context_length(model.config),
    )


def context_length(config: PreTrainedConfig) -> int | None:
    """Return a model's context length in tokens, or None if its configuration has none."""
    text: Any = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = next((v for v in (getattr(text, n, None) for n in names) if isinstance(v, int)), None)
    if not found or found <= 0:
        return None
    rope: Any = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return int(found * rope.get("factor", 1.0))
    return found


def read_config(
    name: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedConfig:
    """Return the configuration of a model.

    Args:
        name: Directory or repository id.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run configuration code that comes with the checkpoint.

    Raises:
        UnsupportedModel: It cannot be read, or says that this server cannot run the model.
    """
    stated = read_json(name, "config.json", revision=revision)
    adapter = read_json(name, "adapter_config.json", revision=revision)
    if adapter is not None and (stated is None or find_spec("peft") is None):
        raise UnsupportedModel(
            f"{name!r} holds an adapter (adapter_config.json) of "
            f"{adapter.get('base_model_name_or_path') or 'another model'}, which this server does "
            "not apply; merge it into that model (`merge_and_unload` of peft) and serve the result"
        )
    if stated is None:
        raise UnsupportedModel(_no_model(name, "it has no config.json"))
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    # transformers fails in as many ways as a configuration can be wrong.
    except Exception as error:
        raise UnsupportedModel(
            f"The configuration of {name!r} is not one transformers can read: {first_line(error)}"
        ) from error
    _check_kind(name, config)
    if not config.is_encoder_decoder and _may_keep_state(config):
        model_classes: Any = auto_class(config)._model_mapping  # noqa: SLF001 - transformers has no public reader
        check_state(model_classes.get(type(config), None))
    return config


def find_file(name: str, file: str, *, revision: str | None = None) -> Path | None:
    """Return the path of a file of a checkpoint, None if it has none of that name.

    Args:
        name: Directory or repository id.
        file: The file's name.
        revision: Branch, tag or commit of the repository.

    Raises:
        UnsupportedModel: There is neither such a directory nor such a repository.
    """
    folder = Path(name)
    try:
        if not folder.is_dir():
            return Path(hf_hub_download(name, file, revision=revision))
        return folder / file if (folder / file).is_file() else None
    except EntryNotFoundError:
        return None
    except HFValidationError as error:
        raise UnsupportedModel(_no_model(name, "there is nothing of that name")) from error
    except (OSError, ValueError) as error:
        raise UnsupportedModel(_no_model(name, first_line(error))) from error


def read_json(name: str, file: str, *, revision: str | None = None) -> dict[str, Any] | None:
    """Return what a JSON file of a checkpoint says, None if it has none of that name.

    Args:
        name: Directory or repository id.
        file: The file's name.
        revision: Branch, tag or commit of the repository.

    Raises:
        UnsupportedModel: It cannot be read, or is no JSON object.
    """
    path = find_file(name, file, revision=revision)
    if path is None:
        return None
    try:
        found: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UnsupportedModel(f"{file} of {name!r} is no JSON: {first_line(error)}") from error
    if not isinstance(found, dict):
        raise UnsupportedModel(f"{file} of {name!r} is no JSON object but {str(found)[:20]!r}")
    return found


def _no_model(name: str, reason: str) -> str:
    folder = Path(name)
    if any(folder.glob("*.gguf")):
        reason = "it has GGUF weights; convert them to safetensors with a config.json"
    elif (folder / "params.json").is_file():
        reason = "it is in Mistral's own format; serve the same model in Hugging Face's"
    return (
        f"No model at {name!r}, neither a directory with a config.json nor a repository that can "
        f"be reached: {reason}"
    )


def _check_kind(name: str, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        _check_encoder_decoder(name, config)
        return
    heads = _language_models(config) | _wrappers(config)
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    stated = set(config.architectures or ())
    if remote or (heads and (not stated or stated & heads)):
        return
    kind = ", ".join(sorted(stated)) or config.model_type
    text: Any = config.get_text_config(decoder=True)
    if not heads and text is not config:
        heads = _language_models(text)
    if not heads:
        raise UnsupportedModel(
            f"{name!r} is a {kind}, and transformers {version('transformers')} has no causal "
            f"language model of type {config.model_type!r}; serve a decoder-only language model"
        )
    raise UnsupportedModel(
        f"{name!r} has no causal language model head (it is a {kind}); serve a checkpoint of "
        f"{', '.join(sorted(heads))}"
    )


def _check_encoder_decoder(name: str, config: PreTrainedConfig) -> None:
    names: Any = modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    head: str | None = names.get(config.model_type)
    if "AutoModelForSeq2SeqLM" in (getattr(config, "auto_map", None) or {}):
        return
    if head is None:
        raise UnsupportedModel(
            f"{name!r} is an encoder-decoder ({config.model_type}) whose encoder reads images, "
            "sound or numbers, or that has no language model head; serve one that turns text into "
            "text, such as T5 or BART"
        )
    # Some checkpoints of whole models name the class without a head, which shares its embeddings.
    known = {head, head.replace("ForConditionalGeneration", "Model")}
    stated = set(config.architectures or ())
    if stated and not stated & known:
        raise UnsupportedModel(
            f"{name!r} has no language model head (it is a {', '.join(sorted(stated))}); serve a "
            f"checkpoint of {head}"
        )


def _language_models(config: PreTrainedConfig) -> set[str]:
    """Return the names of the causal language models of a configuration's type."""
    known: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    return {known} if isinstance(known, str) else set(known or ())


def _wrappers(config: PreTrainedConfig) -> set[str]:
    """Return the names of the language models of a type that read images or sound besides text."""
    kinds: tuple[Any, ...] = (
        modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
        # Some whose encoder reads sound are decoder-only to a text.
        modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )
    return {names[config.model_type] for names in kinds if config.model_type in names}


def _may_keep_state(config: PreTrainedConfig) -> bool:
    """Return whether the code of a model marks some model as one that keeps a recurrent state.

    To import that code takes seconds and 200 MB, which processes without a model need not spend.
    """
    module = model_type_to_module_name(config.model_type)
    folder = Path(str(transformers.__file__)).parent / "models" / module
    code = folder / f"modeling_{module}.py"
    return not code.exists() or "_is_stateful = True" in code.read_text("utf-8")


def check_state(model_class: type[PreTrainedModel] | None) -> None:
    """Check that a model's cache can be rolled back.

    Raises:
        UnsupportedModel: Some layers keep a recurrent state.
    """
    if model_class is not None and getattr(model_class, "_is_stateful", False):
        raise UnsupportedModel(
            f"{model_class.__name__} keeps a recurrent state, which cannot be rolled back when "
            "drafted tokens are rejected; serve a model whose layers all use attention"
        )


def _check_files(name: str, *, quantised: bool) -> None:
    folder = Path(name)
    if not folder.is_dir():
        return
    files = sorted(folder.glob("*.safetensors"))
    if not files and any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise UnsupportedModel(
            f"{name!r} has only pickled weights, which can run code when they are read; convert "
            "them to safetensors"
        )
    if not files:
        raise UnsupportedModel(f"{name!r} has a configuration but no *.safetensors weights")
    for file in () if quantised else files:
        try:
            with safe_open(file, framework="pt") as tensors:
                types = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118 - no dict
        except (OSError, SafetensorError) as error:
            pointer = file.read_bytes()[:20].startswith(b"version https://git")
            advice = "; it is a pointer, fetch the file with `git lfs pull`" if pointer else ""
            raise UnsupportedModel(
                f"The weights of {name!r} cannot be loaded: {file.name}: "
                f"{first_line(error)}{advice}"
            ) from error
        packed = next((key for key, kind in types.items() if kind.startswith(_PACKED)), None)
        if packed is not None:
            raise UnsupportedModel(
                f"{name!r} stores {packed} as {types[packed]}, but its config.json has no "
                "quantization_config that says what the numbers mean; serve an unquantised "
                "checkpoint"
            )


def required_attention(config: PreTrainedConfig) -> str | None:
    """Return the attention function that a model needs, None if transformers may choose.

    The oldest releases choose SDPA for models with soft-capped scores too; it does not cap them.
    """
    return "eager" if getattr(config.get_text_config(), "attn_logit_softcapping", None) else None


def auto_class(config: PreTrainedConfig) -> Any:
    """Return the class of transformers that builds a model of text, or one that reads more."""
    if config.is_encoder_decoder:
        return AutoModelForSeq2SeqLM
    models, wrappers = _language_models(config), _wrappers(config)
    is_wrapper = wrappers - models and (not models or wrappers & set(config.architectures or ()))
    if not is_wrapper:
        return AutoModelForCausalLM
    known = config.model_type in modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    return AutoModelForMultimodalLM if known else AutoModelForSeq2SeqLM


def _weights(  # noqa: PLR0913 - what transformers is told
    name: str,
    *,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    device_map: dict[str, torch.device] | None,
    attention: str | None,
    tensor_parallel: int,
    revision: str | None,
    trust_remote_code: bool,
) -> PreTrainedModel:
    method = quantisation.method(config)
    sharding: dict[str, Any] = {}
    shared = tensor_parallel > 1 and tp_plan.keep_key_heads_whole(config, size=tensor_parallel)
    if tensor_parallel > 1:
        sharding["distributed_config"] = DistributedConfig(tp_size=tensor_parallel)
    try:
        with progress.reading(name):
            loaded: Any = auto_class(config).from_pretrained(
                name,
                config=config,
                dtype=dtype,
                device_map=device_map,
                attn_implementation=attention,
                revision=revision,
                trust_remote_code=trust_remote_code,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # refused below, with the tensor's name
                **sharding,
            )
    # As in `read_config`.
    except Exception as error:
        what = f" (quantised: {method})" if method else ""
        advice = f"; pip install {error.name}" if isinstance(error, ModuleNotFoundError) else ""
        advice += "; or serve an unquantised checkpoint" if method else ""
        raise UnsupportedModel(
            f"The weights of {name!r}{what} cannot be loaded: {first_line(error)}{advice}"
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModel(
            f"The weights of {name!r} lack {len(missing)} tensors ({', '.join(missing[:3])}); "
            "they would be random"
        )
    for key, stored, expected in sorted(report["mismatched_keys"]):
        raise UnsupportedModel(
            f"{key} of {name!r} is {list(stored)}, but {list(expected)} by its configuration"
        )
    if quantisation.method(model.config) and getattr(model, "hf_quantizer", None) is None:
        raise UnsupportedModel(
            f"{name!r} is quantised with {method}, which this transformers does not know; "
            "serve an unquantised checkpoint"
        )
    if shared:
        tp_plan.take_key_heads(model)
    return model


def _check_dtype(name: str, model: PreTrainedModel, dtype: str) -> None:
    found = str(model.dtype).removeprefix("torch.")
    if dtype not in {"auto", found}:
        raise UnsupportedModel(
            f"The quantised weights of {name!r} run in {found}, not in {dtype}; set engine.dtype "
            f"to auto or {found}"
        )


def _check_numbers(name: str, model: PreTrainedModel) -> None:
    """Raise UnsupportedModel if a weight is NaN or infinite."""
    bad = [
        key
        for key, weight in ((name, _local(one)) for name, one in model.named_parameters())
        # Quantised weights are of other classes. A sum is one pass over memory, and NaN or infinite
        # if a weight is; a finite one may overflow too.
        if type(weight) is nn.Parameter
        and weight.dtype in _FLOATS
        and not weight.is_meta
        and not weight.sum(dtype=torch.float32).isfinite()
        and not weight.isfinite().all()
    ]
    if bad:
        raise UnsupportedModel(
            f"{len(bad)} tensors of {name!r} have weights that are NaN or infinite "
            f"({', '.join(bad[:3])}); load or convert the checkpoint again"
        )


def _local(weight: Any) -> Any:
    """Return this rank's part of a weight."""
    return nn.Parameter(weight.to_local()) if hasattr(weight, "to_local") else weight


def _device(device: str) -> torch.device:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise UnsupportedModel(
            f"device {device!r} is unknown; use auto, cpu, cuda or cuda:1"
        ) from error


def _dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    found = getattr(torch, dtype, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise UnsupportedModel(
            f"dtype {dtype!r} is unknown; use auto, float32, bfloat16 or float16"
        )
    return found


def _vocabulary(model: PreTrainedModel) -> int:
    lm_head: Any = model.get_output_embeddings()
    if isinstance(lm_head, nn.Linear):
        return lm_head.out_features  # quantised weights may have other shapes
    weight = getattr(lm_head, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    config: Any = model.config.get_text_config(decoder=True)
    size: int | None = getattr(config, "vocab_size", None)
    if size is None:
        raise UnsupportedModel(
            f"{type(model).__name__} has no outputs for tokens; serve a language model"
        )
    return size


def first_line(error: Exception) -> str:
    """Return the first line of an error, with the error's name if it is a word or nothing."""
    line = "".join(str(error).strip().splitlines()[:1]).rstrip(".:")[:300]
    return line if " " in line else f"{type(error).__name__} {line}".rstrip()
