"""What a model needs of a device's memory, from its configuration, without its weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

from cascade.engine import quantisation
from cascade.engine.kv_pool import accelerator_budget, size_class
from cascade.engine.model_loader import auto_class, context_length, first_line, read_config
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

_SHAPES = "cascade_shapes"


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """The memory of one replica."""

    parameters: int
    weights_bytes: int
    token_bytes: int  # of the KV cache
    context_tokens: int | None  # None if unknown

    def cache_tokens(self, total_bytes: int, *, utilization: float) -> int:
        """Return how many tokens the KV cache of a replica holds.

        Args:
            total_bytes: Memory of the device.
            utilization: Share of it that the replica takes.
        """
        budget = accelerator_budget(
            total=total_bytes, used=self.weights_bytes, utilization=utilization
        )
        return budget // max(self.token_bytes, 1)

    def sessions(self, total_bytes: int, *, utilization: float, session_tokens: int) -> int:
        """Return how many sessions the cache holds at once.

        Args:
            total_bytes: Memory of the device.
            utilization: Share of it that the replica takes.
            session_tokens: Tokens of a session.
        """
        tokens = self.cache_tokens(total_bytes, utilization=utilization)
        return tokens // size_class(session_tokens)


def plan_memory(
    name: str, *, dtype: torch.dtype | None = None, revision: str | None = None
) -> MemoryPlan:
    """Return what a model needs on an accelerator.

    Args:
        name: Directory or repository id.
        dtype: Of weights and cache; None for the checkpoint's own.
        revision: Branch, tag or commit of the repository.

    Raises:
        UnsupportedModel: There is no such model, or it does not run on token ids alone.
    """
    config = read_config(name, revision=revision)
    stated: Any = config.dtype
    number: torch.dtype = dtype or stated or torch.float32
    stored = _stored_bytes(name, config)
    try:
        # In bfloat16: kernels of experts take no other type on the meta device.
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=torch.bfloat16)
        states = _states_per_token(model)
    # As in the check at load: model code may fail in any way.
    except Exception as error:
        raise UnsupportedModel(
            f"What {name!r} needs cannot be told from its configuration: {first_line(error)}"
        ) from error
    parameters = sum(weight.numel() for weight in model.parameters())
    return MemoryPlan(
        parameters=parameters,
        weights_bytes=parameters * number.itemsize if stored is None else stored,
        token_bytes=states * number.itemsize,
        context_tokens=context_length(config),
    )


def _stored_bytes(name: str, config: PreTrainedConfig) -> int | None:
    """Return the bytes of weights that stay quantised, None for dense ones."""
    dense = quantisation.method(config) is None
    if dense or quantisation.is_unpacked(config, device=torch.device("cuda")):
        return None
    files = list(Path(name).glob("*.safetensors"))
    if not files:
        raise UnsupportedModel(
            f"{name!r} is quantised, so the size of its files counts; download it and plan its "
            "directory"
        )
    return sum(file.stat().st_size for file in files)


def _states_per_token(model: PreTrainedModel) -> int:
    """Return how many numbers the KV cache holds for a token, in all layers."""
    ids = torch.zeros((1, 1), dtype=torch.int64, device="meta")
    if model.config.is_encoder_decoder:
        model.set_attn_implementation("eager")  # masks of others read the device
        # A token of the prompt takes as much as one of the answer: both have keys and values.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        with torch.inference_mode():
            model(input_ids=ids, decoder_input_ids=ids, past_key_values=cache, use_cache=True)
        layers: Any = cache.self_attention_cache.layers
        return sum(one.shape[1] * one.shape[-1] for own in layers for one in (own.keys, own.values))
    found: dict[int, int] = {}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, None]:
        found[module.layer_idx] = sum(one.shape[1] * one.shape[-1] for one in (key, value))
        batch, heads, tokens = query.shape[:3]
        return query.new_empty(batch, tokens, heads, value.shape[-1]), None

    AttentionInterface.register(_SHAPES, attention)
    model.set_attn_implementation(_SHAPES)
    with torch.inference_mode():
        out: Any = model(input_ids=ids, use_cache=True)
    # Some models have attention of their own, which is not replaced; they have a cache of theirs.
    own = [layer for layer in out.past_key_values.layers if layer.keys is not None]
    return sum(found.values()) or sum(
        states.shape[1] * states.shape[-1] for layer in own for states in (layer.keys, layer.values)
    )
