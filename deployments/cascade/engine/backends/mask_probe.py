"""Find which tokens each layer attends to, by intercepting the masks that the model builds.

Transformers builds masks from functions of (batch, head, query, key). For one short forward pass, a
mask function that returns such a function instead of a tensor, and an attention function that
records what each layer receives, show every layer's attention pattern for any model.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from cascade.engine.backends.base import PathUnsupported

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformers import PreTrainedModel

_PROBE = "cascade_probe"
_QUERY = 8191  # a position whose sliding window, in current models, does not reach the start


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

    def keys_of(self, query: int) -> list[int]:
        """Return the keys up to `query` + 1 that `query` attends to."""
        keys = torch.arange(query + 2)
        flags: Any = self._function(0, 0, torch.tensor(query), keys)
        return torch.as_tensor(flags).expand_as(keys).nonzero().view(-1).tolist()


_lock = threading.Lock()  # one probe at a time

_masks: dict[Any, Any] = {}  # what each layer received


def windows(model: PreTrainedModel) -> dict[int, int | None]:
    """Return how many tokens back each layer sees, itself included; None for all.

    Raises:
        PathUnsupported: A layer's pattern is neither causal nor a sliding window, or the layers do
            not use transformers' attention interface.
    """
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
    return {layer: _window(layer, mask) for layer, mask in found.items()}


_original: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def original_attention(model: PreTrainedModel) -> str:
    """Return the name of the attention function `model` was loaded with."""
    if model not in _original:
        config: Any = model.config
        _original[model] = config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    return _original[model]


def _window(layer: int, mask: Any) -> int | None:
    if not isinstance(mask, _MaskFunction):
        raise PathUnsupported(f"layer {layer} does not take its mask from transformers")
    last, before = mask.keys_of(_QUERY), mask.keys_of(_QUERY - 1)
    if last == list(range(_QUERY + 1)):
        return None
    if last != list(range(_QUERY + 1 - len(last), _QUERY + 1)) or len(before) != len(last):
        raise PathUnsupported(f"layer {layer} is neither causal nor a sliding window")
    return len(last)


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
