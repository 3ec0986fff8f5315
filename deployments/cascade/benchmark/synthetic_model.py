"""Cost-padded models: what a small model writes, at the cost of a large one.

A cost-padded model is **not** a larger model. It is the source model with work added that changes
nothing it says, so that timings have the step cost of a model of a given size while text,
probabilities and acceptance stay those of the real pair:

* the residual stream is wider, and the new dimensions are always zero: columns of the embedding and
  rows of `o_proj` and `down_proj` that lead there are zero. A root mean square over H' dimensions
  of which H are not zero is sqrt(H / H') too small, so every norm of the source has its weight
  times sqrt(H / H') and its epsilon times H / H', which compensates exactly;
* there are more heads, whose columns of `o_proj` are zero, and more intermediate channels, whose
  columns of `down_proj` are zero; all other new weights are random, and so is their work real;
* there are more layers, whose `o_proj` and `down_proj` are zero.

Logits equal the source's within rounding. The result is a standard Llama checkpoint, so every
engine can load it. What is *not* padded: vocabulary (the output layer is as cheap as the source's),
context, and head width. On a GPU, multiplying zeros draws less power than real weights would.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from cascade.engine.model_loader import load
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedConfig

LABEL = "cost_padded"  # the key of `config.json` that marks such a model

_STANDARD_DEVIATION = 0.02

_NOT_COPIED = ("config.json", "*.safetensors", "*.safetensors.index.json")

_NORMS = ("input_layernorm", "post_attention_layernorm")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a Llama; heads have the source's width, and their number divides `hidden`."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    groups: int  # key-value heads


@dataclass(frozen=True, slots=True, kw_only=True)
class Width:
    """How wide models of about this size are built."""

    hidden: int
    intermediate: int


# After GPT-2, Qwen2.5-0.5B, Llama-3.2-1B, Llama-3.1-8B and Qwen3-32B.
_WIDTHS = {
    120_000_000: Width(hidden=768, intermediate=3072),
    500_000_000: Width(hidden=1280, intermediate=4096),
    1_200_000_000: Width(hidden=2048, intermediate=8192),
    7_000_000_000: Width(hidden=4096, intermediate=14336),
    30_000_000_000: Width(hidden=5120, intermediate=25600),
}

_UNITS = {"M": 10**6, "B": 10**9}


def parse_parameters(text: str) -> int:
    """Return a number of parameters: `parse_parameters("1.2B") == 1_200_000_000`."""
    unit = _UNITS.get(text[-1:].upper())
    try:
        count = float(text[:-1]) * unit if unit else float(text)
    except ValueError:
        count = 0
    if count < 1:
        raise UnsupportedModel(f"{text!r} is no number of parameters; write 120M, 500M or 7B")
    return round(count)


def shape_for(parameters: int, source: PreTrainedConfig) -> Shape:
    """Return a shape of about `parameters`, as wide as models of that size are, and then as deep.

    A quarter of the heads are key-value heads, or as many as the source has.
    """
    size = min(_WIDTHS, key=lambda known: max(known / parameters, parameters / known))
    width, config = _WIDTHS[size], _checked(source)
    heads = width.hidden // config.head_dim
    fewest = max(config.num_key_value_heads, heads // 4)
    groups = next(count for count in range(fewest, heads + 1) if heads % count == 0)
    attention = 2 * width.hidden * config.head_dim * (heads + groups)
    layer = attention + 3 * width.hidden * width.intermediate
    layers = round((parameters - config.vocab_size * width.hidden) / layer)
    return Shape(
        hidden=width.hidden,
        intermediate=width.intermediate,
        layers=max(layers, config.num_hidden_layers),
        heads=heads,
        groups=groups,
    )


def pad(source: str, *, out: Path, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> int:
    """Write the model at `source`, cost-padded to `shape`, into folder `out`.

    Tokenizer and generation settings come along. Returns the number of parameters.

    Raises:
        UnsupportedModel: The source is no Llama without biases, or does not fit into the shape.
    """
    loaded = load(source, device="cpu", dtype="float32")
    config = _checked(loaded.model.config)
    _check_fit(config, shape)
    out.mkdir(parents=True, exist_ok=True)
    _copy_rest(Path(source), out)
    padding = _Padding(loaded.model.state_dict(), config=config, shape=shape)
    count = _write(padding.shards(), out=out, dtype=dtype)
    changed = _config(config, shape, dtype) | {LABEL: {"source": Path(source).name, "count": count}}
    (out / "config.json").write_text(json.dumps(changed, indent=2))
    return count


def is_padded(folder: Path) -> bool:
    """Whether the model in a folder is cost-padded."""
    return LABEL in json.loads((folder / "config.json").read_text())


class _Padding:
    """The tensors of a padded model, made shard by shard."""

    def __init__(self, state: Mapping[str, Tensor], *, config: Any, shape: Shape) -> None:
        self._state = state
        self._config = config
        self._shape = shape
        self._scale = (config.hidden_size / shape.hidden) ** 0.5
        self._random: dict[tuple[int, int], Tensor] = {}
        self._generator = torch.Generator().manual_seed(0)

    def shards(self) -> Iterator[dict[str, Tensor]]:
        """Yield the ends of the model, then layer by layer."""
        width = self._shape.hidden
        ends = {
            "model.embed_tokens.weight": self._wide("model.embed_tokens.weight"),
            "model.norm.weight": self._norm("model.norm.weight", width),
        }
        if not self._config.tie_word_embeddings:
            ends["lm_head.weight"] = self._wide("lm_head.weight")
        yield ends
        for layer in range(self._shape.layers):
            prefix = f"model.layers.{layer}."
            yield {prefix + name: weight for name, weight in self._layer(prefix)}

    def _layer(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        shape, head = self._shape, self._config.head_dim
        queries, pairs = self._query_rows(), torch.arange(self._config.num_key_value_heads * head)
        hidden = torch.arange(self._config.hidden_size)
        inner = torch.arange(self._config.intermediate_size)
        for name, rows, kept in (
            ("self_attn.q_proj", shape.heads * head, queries),
            ("self_attn.k_proj", shape.groups * head, pairs),
            ("self_attn.v_proj", shape.groups * head, pairs),
            ("mlp.gate_proj", shape.intermediate, inner),
            ("mlp.up_proj", shape.intermediate, inner),
        ):
            weight = self._noise(rows, shape.hidden).clone()
            self._place(weight, prefix + name, kept, hidden)
            yield f"{name}.weight", weight
        for name, columns, kept in (
            ("self_attn.o_proj", shape.heads * head, queries),
            ("mlp.down_proj", shape.intermediate, inner),
        ):
            weight = torch.zeros(shape.hidden, columns)
            self._place(weight, prefix + name, hidden, kept)
            yield f"{name}.weight", weight
        for name in _NORMS:
            yield f"{name}.weight", self._norm(f"{prefix}{name}.weight", shape.hidden)

    def _query_rows(self) -> Tensor:
        """Return where the source's heads stand among the new ones: with their key-value heads."""
        config, shape = self._config, self._shape
        before = config.num_attention_heads // config.num_key_value_heads
        group, member = torch.arange(config.num_attention_heads), shape.heads // shape.groups
        heads = group // before * member + group % before
        return (heads[:, None] * config.head_dim + torch.arange(config.head_dim)).flatten()

    def _place(self, weight: Tensor, name: str, rows: Tensor, columns: Tensor) -> None:
        """Write the source's weight of this name into the given rows and columns, if it has one."""
        own = self._state.get(f"{name}.weight")
        if own is not None:
            weight[rows[:, None], columns] = own

    def _norm(self, name: str, width: int) -> Tensor:
        weight = torch.ones(width)
        own = self._state.get(name)
        if own is not None:
            weight[: len(own)] = own * self._scale
        return weight

    def _wide(self, name: str) -> Tensor:
        own = self._state[name]
        weight = torch.zeros(own.shape[0], self._shape.hidden)
        weight[:, : own.shape[1]] = own
        return weight

    def _noise(self, rows: int, columns: int) -> Tensor:
        """Return random weights, the same for all layers: what they are does not matter."""
        size = (rows, columns)
        if size not in self._random:
            noise = torch.randn(size, generator=self._generator)
            self._random[size] = noise * _STANDARD_DEVIATION
        return self._random[size]


def _checked(config: Any) -> Any:
    biased = getattr(config, "attention_bias", False) or getattr(config, "mlp_bias", False)
    if config.model_type != "llama" or biased:
        raise UnsupportedModel(
            f"Only a Llama without biases can be cost-padded, and this is a {config.model_type}"
            f"{' with biases' if biased else ''}; pad the expert that ships"
        )
    return config


def _check_fit(config: Any, shape: Shape) -> None:
    before = config.num_attention_heads // config.num_key_value_heads
    for name, own, new in (
        ("hidden", config.hidden_size, shape.hidden),
        ("intermediate", config.intermediate_size, shape.intermediate),
        ("layers", config.num_hidden_layers, shape.layers),
        ("groups", config.num_key_value_heads, shape.groups),
        ("heads of a group", before, shape.heads // shape.groups),
    ):
        if new < own:
            raise UnsupportedModel(f"The source has {own} {name}; a padded model cannot have {new}")


def _config(config: Any, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    eps = config.rms_norm_eps * config.hidden_size / shape.hidden
    return config.to_dict() | {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.intermediate,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.groups,
        "rms_norm_eps": eps,
        "dtype": str(dtype).removeprefix("torch."),
    }


def _copy_rest(source: Path, out: Path) -> None:
    weights = {path for pattern in _NOT_COPIED for path in source.glob(pattern)}
    for path in source.iterdir():
        if path.is_file() and path not in weights:
            shutil.copy(path, out)


def _write(shards: Iterator[dict[str, Tensor]], *, out: Path, dtype: torch.dtype) -> int:
    """Write one file a shard, and the index; return the number of parameters."""
    places: dict[str, str] = {}
    count = 0
    for number, shard in enumerate(shards):
        name = f"model-{number:05}.safetensors"
        tensors = {key: weight.to(dtype).contiguous() for key, weight in shard.items()}
        save_file(tensors, out / name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, name)
        count += sum(weight.numel() for weight in tensors.values())
    index = {"metadata": {"total_size": count * dtype.itemsize}, "weight_map": places}
    (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return count
