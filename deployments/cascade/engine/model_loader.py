"""Load one model. Weights come from safetensors; a checkpoint's own code runs only if allowed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device."""

    model: PreTrainedModel
    vocabulary: int  # logits kept per token
    context_length: int | None  # None if unknown
    stop_ids: tuple[int, ...]  # end-of-text ids of its generation settings
    owned: bool = False  # by the engine that runs it, which may free weights that it has copied


def load(
    name: str,
    *,
    device: str = "auto",
    dtype: str = "auto",
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """Return the model at a local path or of a Hugging Face repository, for one engine.

    Args:
        name: Directory or repository id.
        device: A torch device, or "auto": cuda if there is one, else cpu.
        dtype: "float32", "bfloat16", "float16" or "auto": float32 on a CPU, else the checkpoint's.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run model code that comes with the checkpoint.

    Raises:
        UnsupportedModel: There is no such model, or this server cannot run it.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    torch_device = torch.device(device)
    read_config(name, revision=revision, trust_remote_code=trust_remote_code)
    _check_files(name)
    model = _weights(
        name,
        dtype=_dtype(dtype, torch_device),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return replace(adopt(model.to(torch_device)), owned=True)  # pyright: ignore[reportArgumentType] - stub of `to`


def adopt(model: PreTrainedModel) -> LoadedModel:
    """Return `model`, already in memory, as a loaded one."""
    return LoadedModel(
        model=model.eval().requires_grad_(requires_grad=False),
        vocabulary=_vocabulary(model),
        context_length=context_length(model.config),
        stop_ids=stop_ids(model.generation_config),
    )


def stop_ids(generation_config: Any) -> tuple[int, ...]:
    """Return the end-of-text ids of a model's generation settings."""
    ids: Any = getattr(generation_config, "eos_token_id", None)
    return tuple(ids) if isinstance(ids, list) else () if ids is None else (int(ids),)


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
    try:
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    except OSError as error:
        raise UnsupportedModel(
            f"No model at {name!r}: neither a directory with a config.json nor a repository that "
            f"can be reached ({_first_line(error)})"
        ) from error
    except (ValueError, KeyError, StrictDataclassError) as error:
        raise UnsupportedModel(
            f"The configuration of {name!r} is not one transformers can read: {_first_line(error)}"
        ) from error
    _check_kind(name, config)
    model_class: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    check_state(model_class)
    return config


def _check_kind(name: str, config: PreTrainedConfig) -> None:
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name!r} is an encoder-decoder ({config.model_type}); this server runs decoder-only "
            "models"
        )
    known: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    heads = {known} if isinstance(known, str) else set(known or ())
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    stated = set(config.architectures or ())
    if remote or (heads and (not stated or stated & heads)):
        return
    raise UnsupportedModel(
        f"{name!r} has no causal language model head (it is a "
        f"{', '.join(sorted(stated)) or config.model_type}); serve a checkpoint of "
        f"{', '.join(sorted(heads)) or 'a decoder-only language model'}"
    )


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


def _check_files(name: str) -> None:
    folder = Path(name)
    if not folder.is_dir() or any(folder.glob("*.safetensors")):
        return
    if any(next(folder.glob(pattern), None) for pattern in _PICKLES):
        raise UnsupportedModel(
            f"{name!r} has only pickled weights, which can run code when they are read; convert "
            "them to safetensors"
        )
    raise UnsupportedModel(f"{name!r} has a configuration but no *.safetensors weights")


def _weights(
    name: str, *, dtype: torch.dtype | str, revision: str | None, trust_remote_code: bool
) -> PreTrainedModel:
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            revision=revision,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise UnsupportedModel(
            f"The weights of {name!r} cannot be loaded: {_first_line(error)}"
        ) from error
    model, report = loaded
    missing = sorted(report["missing_keys"])
    if missing:
        raise UnsupportedModel(
            f"The weights of {name!r} lack {len(missing)} tensors ({', '.join(missing[:3])}); "
            "they would be random"
        )
    return model


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
    weight = getattr(lm_head, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    config: Any = model.config.get_text_config(decoder=True)
    return int(config.vocab_size)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
