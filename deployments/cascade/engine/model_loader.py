"""Load one model's weights: safetensors only, no code from a checkpoint unless it is asked for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the tokens a model was made for, or None where its configuration names no bound."""
    text: Any = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = next((v for v in (getattr(text, n, None) for n in names) if isinstance(v, int)), None)
    if not found or found <= 0:
        return None
    rope: Any = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return int(found * rope.get("factor", 1.0))
    return found


_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """A model on its device, and what others need to know of it."""

    name: str
    model: PreTrainedModel
    vocabulary: int  # columns of its logits
    context_length: int | None  # None: no bound is known
    stop_ids: tuple[int, ...]  # what its generation settings end an answer with
    owned: bool = False  # by the engine that runs it, which may then free what it has copied


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
        name: directory or repository id.
        device: a torch device, or "auto": cuda where there is one, else cpu.
        dtype: "float32", "bfloat16", "float16" or "auto": float32 on a CPU, else the checkpoint's.
        revision: branch, tag or commit of the repository.
        trust_remote_code: run model code that comes with the checkpoint.

    Raises:
        UnsupportedModel: if there is no such model, or it is not one this server can run.
    """
    place = torch.device(pick_device(device))
    config = _config(name, revision=revision, trust_remote_code=trust_remote_code)
    check_kind(name, config)
    _check_files(name)
    model = _weights(
        name,
        dtype=_dtype(dtype, place),
        revision=revision,
        trust_remote_code=trust_remote_code,
    )
    return replace(adopt(model.to(place), name=name), owned=True)  # pyright: ignore[reportArgumentType] - stub of `to`


def adopt(model: PreTrainedModel, *, name: str) -> LoadedModel:
    """Return `model`, already in memory, as a loaded one."""
    stop: Any = getattr(model.generation_config, "eos_token_id", None)
    return LoadedModel(
        name=name,
        model=model.eval().requires_grad_(requires_grad=False),
        vocabulary=_vocabulary(model),
        context_length=context_length(model.config),
        stop_ids=tuple(stop) if isinstance(stop, list) else () if stop is None else (int(stop),),
    )


def pick_device(device: str) -> str:
    """Return the torch device that "auto" means here, or `device` itself."""
    if device != "auto":
        return device
    return "cuda" if torch.cuda.is_available() else "cpu"


def _config(name: str, *, revision: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(
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


def check_kind(name: str, config: PreTrainedConfig) -> None:
    """Raise UnsupportedModel for what a configuration alone says cannot be served."""
    if config.is_encoder_decoder:
        raise UnsupportedModel(
            f"{name!r} is an encoder-decoder ({config.model_type}); this server runs decoder-only "
            "models"
        )
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
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


def check_state(kind: type[PreTrainedModel] | None) -> None:
    """Raise UnsupportedModel for a model class whose layers are not all attention."""
    if kind is not None and getattr(kind, "_is_stateful", False):
        raise UnsupportedModel(
            f"{kind.__name__} keeps a recurrent state, which cannot be rolled back when drafted "
            "tokens are refused; serve a model whose layers all use attention"
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
            f"dtype {dtype!r} is not one; take auto, float32, bfloat16 or float16"
        )
    return found


def _vocabulary(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if weight is not None:
        return int(weight.shape[0])
    config: Any = model.config.get_text_config(decoder=True)
    return int(config.vocab_size)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
