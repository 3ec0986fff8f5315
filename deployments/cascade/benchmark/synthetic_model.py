"""Synthetic models: what a small model writes, at the cost of a large one (*cost-padded*).

A synthetic model is **not** a larger model. It is the source model with added work that changes no
logit, so steps cost as much as those of a model of a given size, while text, probabilities and
acceptance stay those of the real pair:

* the residual stream is wider, and the new dimensions are always zero: columns of the embedding and
  rows of `o_proj` and `down_proj` that lead there are zero. A root mean square over H' dimensions
  of which H are not zero is sqrt(H / H') too small, so every norm of the source has its weight
  times sqrt(H / H') and its epsilon times H / H', which compensates exactly;
* there are more heads, whose columns of `o_proj` are zero, and more intermediate channels, whose
  columns of `down_proj` are zero; all other new weights are random, so their work is real;
* there are more layers, whose `o_proj` and `down_proj` are zero.

Logits equal the source's within rounding. The result is a standard Llama checkpoint, so every
engine can load it. What is *not* padded: vocabulary (the output layer is as cheap as the source's),
context, and head width. On a GPU, multiplying zeros draws less power than real weights would.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from cascade.engine.model_loader import load
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from cascade.settings import Application

LABEL = "cost_padded"  # the key of `config.json` that marks such a model

_STANDARD_DEVIATION = 0.02
_WEIGHTS = (".safetensors", ".safetensors.index.json")
_NORMS = ("input_layernorm", "post_attention_layernorm")

# Output and input of each matrix; those that write to the residual stream get zeros, others noise.
_MATRICES = {
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("key-value", "hidden"),
    "self_attn.v_proj": ("key-value", "hidden"),
    "mlp.gate_proj": ("intermediate", "hidden"),
    "mlp.up_proj": ("intermediate", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "mlp.down_proj": ("hidden", "intermediate"),
}

# Hidden and intermediate size of GPT-2, Qwen2.5-0.5B, Llama-3.2-1B, Llama-3.1-8B and Qwen3-32B.
_WIDTHS = {
    120_000_000: (768, 3072),
    500_000_000: (1280, 4096),
    1_200_000_000: (2048, 8192),
    7_000_000_000: (4096, 14336),
    30_000_000_000: (5120, 25600),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """Sizes of a Llama; heads have the source's width, and their number divides `hidden`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int  # key-value heads


def parse_parameters(text: str) -> int:
    """Return a number of parameters: `parse_parameters("1.2B") == 1_200_000_000`.

    Raises:
        UnsupportedModel: The text is no number of at least 1.
    """
    unit = {"M": 10**6, "B": 10**9}.get(text[-1:].upper())
    try:
        count = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        count = 0
    if count < 1:
        raise UnsupportedModel(f"{text!r} is no number of parameters; write 120M, 500M or 7B")
    return round(count)


def shape_for(parameters: int, source: PreTrainedConfig) -> ModelShape:
    """Return a shape of about `parameters`: as wide as models of that size are, then deep enough.

    A quarter of the heads are key-value heads, or as many as the source has.

    Raises:
        UnsupportedModel: The source is no Llama without biases.
    """
    size = min(_WIDTHS, key=lambda known: max(known / parameters, parameters / known))
    (hidden, intermediate), config = _WIDTHS[size], _checked(source)
    heads = hidden // config.head_dim
    fewest = max(config.num_key_value_heads, heads // 4)
    groups = next(count for count in range(fewest, heads + 1) if heads % count == 0)
    attention = 2 * hidden * config.head_dim * (heads + groups)
    layer = attention + 3 * hidden * intermediate
    layers = round((parameters - config.vocab_size * hidden) / layer)
    return ModelShape(
        hidden=hidden,
        intermediate=intermediate,
        layers=max(layers, config.num_hidden_layers),
        heads=heads,
        groups=groups,
    )


def write(source: str, *, out: Path, shape: ModelShape, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write a synthetic model with the tokenizer and generation settings of its source.

    Args:
        source: A folder with a Llama.
        out: Folder of the synthetic model.
        shape: Its sizes.
        dtype: Of its weights.

    Returns:
        The number of parameters.

    Raises:
        UnsupportedModel: The source is no Llama without biases, or does not fit into the shape.
    """
    loaded = load(source, device="cpu", dtype="float32")
    config = _checked(loaded.model.config)
    shards = _shards(loaded.model, shape)
    out.mkdir(parents=True, exist_ok=True)
    for path in Path(source).iterdir():
        # `config.json` is written last: a folder that has one is complete.
        if path.is_file() and path.name != "config.json" and not path.name.endswith(_WEIGHTS):
            shutil.copy(path, out)
    count = _write_shards(shards, out=out, dtype=dtype)
    changed = _padded(config, shape, dtype=dtype) | {
        LABEL: {"source": Path(source).name, "count": count}
    }
    (out / "config.json").write_text(json.dumps(changed, indent=2))
    return count


def build(
    source: str, *, shape: ModelShape, device: str, dtype: torch.dtype = torch.bfloat16
) -> PreTrainedModel:
    """Return a synthetic model, made on its device without a file.

    Args:
        source: A folder with a Llama.
        shape: Sizes of the synthetic model.
        device: A torch device.
        dtype: Of its weights.

    Raises:
        UnsupportedModel: The source is no Llama without biases, or does not fit into the shape.
    """
    loaded = load(source, device=device, dtype="float32").model
    config = LlamaConfig.from_dict(_padded(_checked(loaded.config), shape, dtype=dtype))
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for shard in _shards(loaded, shape):
        model.load_state_dict(shard, strict=False)  # copies, and leaves the other shards' weights
    return model.eval()


def with_synthetic_expert(settings: Application, *, parameters: str) -> Application:
    """Return the settings with the expert padded to a size; the model is made once and kept.

    Raises:
        UnsupportedModel: The expert cannot be padded, or `parameters` is no number.
    """
    source, dtype = settings.expert.model_path, settings.expert.engine.dtype
    shape = shape_for(parse_parameters(parameters), AutoConfig.from_pretrained(source))
    digest = hashlib.sha256(repr(shape).encode())
    for path in sorted(Path(source).glob("*.safetensors")):
        digest.update(path.read_bytes())
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cascade" / "padded"
    folder = caches / f"{parameters}-{dtype}-{digest.hexdigest()[:12]}"
    if not (folder / "config.json").exists():
        stored = torch.float32 if dtype == "auto" else getattr(torch, dtype)
        write(source, out=folder, shape=shape, dtype=stored)
    expert = settings.expert.model_copy(update={"model": str(folder)})
    return settings.model_copy(update={"expert": expert})


def provenance_note(parameters: str) -> str:
    """Return what a reader of measurements with a synthetic expert must know."""
    return f"The expert is cost-padded to {parameters} parameters; its text is its own."


def _padded(config: Any, shape: ModelShape, *, dtype: torch.dtype) -> dict[str, Any]:
    """Return the configuration of the source with other sizes."""
    return config.to_dict() | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "rms_norm_eps": config.rms_norm_eps * config.hidden_size / shape.hidden,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _shards(source: PreTrainedModel, shape: ModelShape) -> Iterator[dict[str, Tensor]]:
    """Yield embedding, last norm and LM head, then the weights of each layer, on its device."""
    state, config, device = source.state_dict(), _checked(source.config), source.device
    dimensions = {
        name: (size, own.to(device)) for name, (size, own) in _dimensions(config, shape).items()
    }
    generator = torch.Generator(device).manual_seed(0)

    @cache
    def noise(rows: int, columns: int) -> Tensor:
        # The same for all layers: only its cost matters.
        values = torch.randn(rows, columns, generator=generator, device=device)
        return values.mul_(_STANDARD_DEVIATION)

    def matrix(name: str, output: str, input_: str) -> Tensor:
        (rows, own_rows), (columns, own_columns) = dimensions[output], dimensions[input_]
        reads = output not in {"hidden", "vocabulary"}
        zeros = torch.zeros(rows, columns, device=device)
        weight = noise(rows, columns).clone() if reads else zeros
        if (own := state.get(name)) is not None:
            weight[own_rows[:, None], own_columns] = own
        return weight

    def norm(name: str) -> Tensor:
        weight = torch.ones(shape.hidden, device=device)
        if (own := state.get(name)) is not None:
            weight[: len(own)] = own * (config.hidden_size / shape.hidden) ** 0.5
        return weight

    ends = ["model.embed_tokens", *([] if config.tie_word_embeddings else ["lm_head"])]
    names = [f"{name}.weight" for name in ends]
    yield {name: matrix(name, "vocabulary", "hidden") for name in names} | {
        "model.norm.weight": norm("model.norm.weight")
    }
    for layer in range(shape.layers):
        matrices = {f"model.layers.{layer}.{name}.weight": of for name, of in _MATRICES.items()}
        norms = [f"model.layers.{layer}.{name}.weight" for name in _NORMS]
        yield {name: matrix(name, *of) for name, of in matrices.items()} | {
            name: norm(name) for name in norms
        }


def _dimensions(config: Any, shape: ModelShape) -> dict[str, tuple[int, Tensor]]:
    """Return the size of each dimension, and where the source's entries are in it."""
    width, heads = config.head_dim, config.num_attention_heads
    kv_heads = config.num_key_value_heads
    before, after = heads // kv_heads, shape.heads // shape.groups
    for name, own, new in (
        ("hidden", config.hidden_size, shape.hidden),
        ("intermediate", config.intermediate_size, shape.intermediate),
        ("layers", config.num_hidden_layers, shape.layers),
        ("groups", kv_heads, shape.groups),
        ("heads of a group", before, after),
    ):
        if new < own:
            raise UnsupportedModel(f"The source has {own} {name}, and the shape only {new}")
    # Each head stays with its key-value head.
    head = torch.arange(heads)
    places = head // before * after + head % before
    queries = (places[:, None] * width + torch.arange(width)).flatten()
    return {
        "vocabulary": (config.vocab_size, torch.arange(config.vocab_size)),
        "hidden": (shape.hidden, torch.arange(config.hidden_size)),
        "intermediate": (shape.intermediate, torch.arange(config.intermediate_size)),
        "query": (shape.heads * width, queries),
        "key-value": (shape.groups * width, torch.arange(kv_heads * width)),
    }


def _checked(config: Any) -> Any:
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if config.model_type != "llama" or biased:
        raise UnsupportedModel(
            f"Only a Llama without biases can be padded, and this is a {config.model_type}"
            f"{' with biases' if biased else ''}; pad the expert that ships"
        )
    return config


def _write_shards(shards: Iterator[dict[str, Tensor]], *, out: Path, dtype: torch.dtype) -> int:
    """Write one file per shard, and the index; return the number of parameters."""
    files: dict[str, str] = {}
    count = 0
    for number, shard in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        tensors = {key: weight.to(dtype).contiguous() for key, weight in shard.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        files |= dict.fromkeys(tensors, name)
        count += sum(weight.numel() for weight in tensors.values())
    index = {"metadata": {"total_size": count * dtype.itemsize}, "weight_map": files}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return count
