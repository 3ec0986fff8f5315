"""How the ranks of a sharded model share its attention heads.

Each rank has the query heads of its part, and the key and value heads that they read. Where these
are fewer than the ranks, several ranks have the same one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn

from cascade.engine import quantisation
from cascade.engine.settings import MAX_RANKS
from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_KEY_HEADS = ("num_key_value_heads", "num_global_key_value_heads")
# Plans of attention whose key and value heads can be taken one by one.
_SEPARATE = {
    "q_proj": "colwise",
    "k_proj": "colwise",
    "v_proj": "colwise",
    "q_norm": "replicated_with_grad_allreduce",
    "k_norm": "replicated_with_grad_allreduce",
    "o_proj": "rowwise",
    "dense": "rowwise",
}


def check(name: str, config: PreTrainedConfig, *, size: int) -> None:
    """Check that a model can be sharded.

    Args:
        name: The model, for errors.
        config: Its configuration.
        size: The number of ranks.

    Raises:
        UnsupportedModel: It cannot; the message says why.
    """
    if method := quantisation.method(config):
        raise UnsupportedModel(
            f"{name!r} is quantised ({method}), and this server splits no scales of quantised "
            "weights; serve it on one device (engine.tensor_parallel: 1), or an unquantised "
            "checkpoint on several"
        )
    text: Any = config.get_text_config(decoder=True)
    if not _plan(text):
        raise UnsupportedModel(
            f"transformers has no tensor parallel plan for {name!r} ({text.model_type}), and this "
            "server does not run the layers of a model on one device after another (pipeline); "
            "serve it on one device (engine.tensor_parallel: 1), quantised if it is too large"
        )
    if not any(style == "colwise" for style in _attention(text).values()):
        return  # every rank has all heads
    sizes = [size for size in range(1, MAX_RANKS + 1) if _fits(text, size)]
    if size not in sizes:
        keys = " or ".join(map(str, _key_heads(text)))
        raise UnsupportedModel(
            f"{name!r} has {text.num_attention_heads} attention heads and {keys} key and value "
            f"heads, which {size} devices cannot share evenly; engine.tensor_parallel can be "
            f"{', '.join(map(str, sizes))}"
        )


def keep_key_heads_whole(config: PreTrainedConfig, *, size: int) -> bool:
    """Return whether ranks share key and value heads; if so, transformers is not to split them.

    Args:
        config: A model's configuration, whose plan may change.
        size: The number of ranks.
    """
    text: Any = config.get_text_config(decoder=True)
    whole = _separate(text) and any(heads % size for heads in _key_heads(text))
    if whole:
        text.base_model_tp_plan = {
            rule: style
            for rule, style in _plan(text).items()
            if rule.rpartition(".")[2] not in {"k_proj", "v_proj"}
        }
    return whole


def take_key_heads(model: PreTrainedModel) -> None:
    """Leave this rank the key and value heads that its query heads read."""
    config: Any = model.config.get_text_config(decoder=True)
    rank, size = dist.get_rank(), dist.get_world_size()
    modules: Any = [one for one in model.modules() if hasattr(one, "num_key_value_groups")]
    for module in modules:
        total = config.num_attention_heads // module.num_key_value_groups  # of this layer
        first, count = rank * total // size, max(1, total // size)
        # Layers that read the keys of another layer have none of their own.
        for name in ("k_proj", "v_proj"):
            if getattr(module, name, None) is not None:
                _cut(getattr(module, name), first=first, count=count, total=total)
        module.num_key_value_groups = config.num_attention_heads // size // count


def _cut(layer: nn.Linear, *, first: int, count: int, total: int) -> None:
    width = layer.out_features // total
    rows = slice(first * width, (first + count) * width)
    for name, whole in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(whole[rows].clone(), requires_grad=False))
    layer.out_features = count * width


def _fits(text: Any, size: int) -> bool:
    shared = _separate(text)
    return text.num_attention_heads % size == 0 and all(
        heads % size == 0 or (shared and size % heads == 0) for heads in _key_heads(text)
    )


def _key_heads(text: Any) -> list[int]:
    found = [getattr(text, name, None) for name in _KEY_HEADS]
    return sorted({one for one in found if one}) or [text.num_attention_heads]


def _plan(text: Any) -> dict[str, str]:
    return getattr(text, "base_model_tp_plan", None) or {}


def _attention(text: Any) -> dict[str, str]:
    plan = _plan(text).items()
    return {rule: style for rule, style in plan if "attn" in rule or "attention" in rule}


def _separate(text: Any) -> bool:
    styles = {rule.rpartition(".")[2]: style for rule, style in _attention(text).items()}
    return {"k_proj", "v_proj"} <= styles.keys() and styles.items() <= _SEPARATE.items()
