"""Find which tokens each layer attends to, by intercepting the masks that the model builds.

Transformers builds masks from functions of (batch, head, query, key). For one short forward pass, a
mask function that returns such a function instead of a tensor, and an attention function that
records what each layer receives, show every layer's attention pattern for any model and length.
"""

from __future__ import annotations

import re
import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cascade.engine.backends.base import PathUnsupported, boundaries
from cascade.engine.model_loader import context_length

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

_PROBE = "cascade_probe"
_PER_LAYER = re.compile(r"layer_types|rope|attention|window|chunk")
_LONGEST = 2**17  # tokens up to which a window is found that no configuration names


class _MaskFunction:
    """A mask function that passes through a model where a mask tensor is expected."""

    shape = (1,)
    ndim = 1
    dtype = torch.bool
    device = torch.device("cpu")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def to(self, *_: Any, **__: Any) -> _MaskFunction:
        return self

    def __getitem__(self, _: Any) -> _MaskFunction:
        return self

    def window(self, queries: Sequence[int]) -> int | None:
        """Return how many tokens back the queries see, given in ascending order; None for all."""
        width = int(self._seen_by(queries[-1]).sum())
        for query in queries:
            expected = torch.zeros(query + 2, dtype=torch.bool)
            expected[max(0, query + 1 - width) : query + 1] = True
            if not torch.equal(self._seen_by(query), expected):
                raise PathUnsupported(
                    "the attention of its layers is neither causal nor a sliding window"
                )
        return width if width <= queries[-1] else None

    def _seen_by(self, query: int) -> Tensor:
        """Return of each key up to `query` + 1 whether `query` attends to it."""
        keys = torch.arange(query + 2)
        flags: Any = self._function(0, 0, torch.tensor(query), keys)
        return torch.as_tensor(flags).expand_as(keys)


_lock = threading.Lock()  # one probe at a time

_masks: dict[Any, Any] = {}  # what each layer received


def windows(model: PreTrainedModel) -> dict[int, int | None]:
    """Return how many tokens back each layer sees, itself included; None for all.

    Raises:
        PathUnsupported: A layer's pattern is neither causal nor a sliding window, or the layers do
            not use transformers' attention interface.
    """
    masks, queries = _layer_masks(model), _queries(model)
    found = {mask: mask.window(queries) for mask in set(masks.values())}
    return {layer: found[mask] for layer, mask in masks.items()}


def layers_of_every_kind(model: PreTrainedModel) -> int:
    """Return how many of the first layers include every pattern of attention and kind of RoPE."""
    config: Any = model.config.get_text_config(decoder=True)
    lists = [v for k, v in config.to_dict().items() if _PER_LAYER.search(k) and isinstance(v, list)]
    count = int(config.num_hidden_layers)
    kinds = [[one[layer] for one in lists if len(one) == count] for layer in range(count)]
    try:
        for layer, mask in _layer_masks(model).items():
            kinds[layer].append(id(mask))
    except Exception:  # noqa: BLE001 - any model's code may fail on a mask that is no tensor
        if not kinds[0]:
            return count
    return 1 + max(kinds.index(kind) for kind in kinds)


def _layer_masks(model: PreTrainedModel) -> dict[int, _MaskFunction]:
    """Return the mask of each layer; layers of one kind have the same."""
    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    original = original_attention(model)
    with _lock, torch.inference_mode():
        _masks.clear()
        model.set_attn_implementation(_PROBE)
        try:
            model(input_ids=tokens, position_ids=positions, use_cache=False)
        finally:
            model.set_attn_implementation(original)
        found = dict(_masks)
    if not found or None in found:
        raise PathUnsupported("its layers do not use the attention interface")
    if not all(isinstance(mask, _MaskFunction) for mask in found.values()):
        raise PathUnsupported("some layers do not take their masks from transformers")
    return found


_original: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def original_attention(model: PreTrainedModel) -> str:
    """Return the name of the attention function `model` was loaded with."""
    if model not in _original:
        config: Any = model.config
        _original[model] = config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    return _original[model]


def _queries(model: PreTrainedModel) -> list[int]:
    """Return positions on both sides of each length at which a mask may change, ascending."""
    longest = max(_LONGEST, context_length(model.config) or 0)
    named = boundaries(model.config, below=longest)
    doublings = [2**power for power in range(longest.bit_length())]
    lengths = {*named.attention, *named.position, *doublings, longest}
    around = {length + shift for length in lengths for shift in (-2, -1, 0, 1)}
    return sorted(query for query in around if 0 <= query < longest)


def _mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> _MaskFunction:
    return _MaskFunction(mask_function)


def _attention(
    module: torch.nn.Module, query: Tensor, _key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    _masks[getattr(module, "layer_idx", None)] = mask
    batch, heads, tokens = query.shape[:3]
    return query.new_zeros((batch, tokens, heads, value.shape[-1])), None


AttentionMaskInterface.register(_PROBE, _mask)

AttentionInterface.register(_PROBE, _attention)
