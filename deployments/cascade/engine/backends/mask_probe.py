"""Find what each layer attends to, without knowing the model: capture its own mask functions.

Transformers builds masks from closures over (batch, head, query, key). A mask function that returns
its closure instead of a tensor, and an attention function that notes which closure reaches which
layer, show each layer's law in one short forward pass.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from torch import Tensor
    from transformers import PreTrainedModel

_PROBE = "cascade_probe"

_QUERY = 8191  # a position that no sliding window of the day covers from the start


class Unsuited(Exception):
    """This path cannot serve the model; the message says why."""


class _Closure:
    """A mask function that travels through a model where a mask is expected."""

    shape = (1,)
    ndim = 1
    dtype = torch.bool
    device = torch.device("cpu")

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def to(self, *_: Any, **__: Any) -> _Closure:
        return self

    def __getitem__(self, _: Any) -> _Closure:
        return self

    def seen_by(self, query: int) -> list[int]:
        """Return the keys that `query` attends to, of those up to the one after it."""
        keys = torch.arange(query + 2)
        flags: Any = self._function(0, 0, torch.tensor(query), keys)
        return torch.as_tensor(flags).expand_as(keys).nonzero().view(-1).tolist()


class _Record:
    """What reached which layer; one probe at a time."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.masks: dict[Any, Any] = {}


_record = _Record()


def windows(model: PreTrainedModel) -> dict[int, int | None]:
    """Return how many tokens back each layer sees, itself included; None is all of them.

    Raises:
        Unsuited: if a layer's law is neither causal nor a sliding window, or no layer asked for
            attention through transformers' interface.
    """
    with _record.lock:
        _record.masks.clear()
        with _probing(model):
            _run(model)
        found = dict(_record.masks)
    if not found or None in found:
        raise Unsuited("its layers do not use the attention interface")
    return {layer: _window(layer, mask) for layer, mask in found.items()}


_own: WeakKeyDictionary[PreTrainedModel, str] = WeakKeyDictionary()


def own_attention(model: PreTrainedModel) -> str:
    """Return the name of the attention function `model` came with, whatever it uses now."""
    if model not in _own:
        config: Any = model.config
        _own[model] = config._attn_implementation  # noqa: SLF001 - transformers has no public reader
    return _own[model]


def _run(model: PreTrainedModel) -> None:
    tokens = torch.zeros((1, 2), dtype=torch.long, device=model.device)
    places = torch.arange(2, device=model.device)[None]
    with torch.inference_mode():
        model(input_ids=tokens, position_ids=places, use_cache=False)


@contextmanager
def _probing(model: PreTrainedModel) -> Generator[None]:
    usual = own_attention(model)
    model.set_attn_implementation(_PROBE)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def _window(layer: int, mask: Any) -> int | None:
    if not isinstance(mask, _Closure):
        raise Unsuited(f"layer {layer} does not take its mask from transformers")
    last, before = mask.seen_by(_QUERY), mask.seen_by(_QUERY - 1)
    if last == list(range(_QUERY + 1)):
        return None
    if last != list(range(_QUERY + 1 - len(last), _QUERY + 1)) or len(before) != len(last):
        raise Unsuited(f"layer {layer} is neither causal nor a sliding window")
    return len(last)


def _mask(*_: Any, mask_function: Callable[..., Any], **__: Any) -> _Closure:
    return _Closure(mask_function)


def _attention(
    module: torch.nn.Module, query: Tensor, _key: Tensor, value: Tensor, mask: Any, **_: Any
) -> tuple[Tensor, None]:
    _record.masks[getattr(module, "layer_idx", None)] = mask
    batch, heads, tokens = query.shape[:3]
    return query.new_zeros((batch, tokens, heads, value.shape[-1])), None


AttentionMaskInterface.register(_PROBE, _mask)

AttentionInterface.register(_PROBE, _attention)
