"""Storage of keys and values: a pool of slots, each for one token in every layer.

Shapes: `L` layers, `H` or `J` heads, `T` tokens, `R` slots, `D` head size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class KVPool(ABC):
    """Keys and values of `num_slots` tokens."""

    def __init__(self, *, num_slots: int) -> None:
        self.num_slots = num_slots

    @abstractmethod
    def tensors(self) -> Iterable[Tensor]:
        """Return all storage that exists, each tensor `[..., R, D]`."""

    @property
    def bytes_per_token(self) -> int:
        """Return the memory of one token in all layers that exist."""
        return sum(t.numel() * t.element_size() for t in self.tensors()) // max(self.num_slots, 1)

    def copy(self, *, source: int, target: int, count: int) -> None:
        """Copy slots in every layer; the two ranges may overlap.

        Args:
            source: First slot to read.
            target: First slot to write.
            count: Number of slots.
        """
        for states_RD in self.tensors():
            copied = states_RD[..., source : source + count, :].clone()
            states_RD[..., target : target + count, :] = copied


class LayeredKVPool(KVPool):
    """Head-major storage `[H, R, D]` per layer, shaped by the first states that a layer writes.

    So head sizes may differ by layer and between K and V, without configuration.
    """

    def __init__(self, *, num_slots: int) -> None:
        super().__init__(num_slots=num_slots)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def tensors(self) -> Iterable[Tensor]:
        """Return keys and values of each layer that has been written."""
        return (states for pair in self._layers.values() for states in pair)

    def write(
        self, layer: int, *, key_HTD: Tensor, value_HTD: Tensor, slots_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store the states of `T` tokens and return the layer's whole K and V.

        Args:
            layer: Index of the layer.
            key_HTD: Keys `[H, T, D]`.
            value_HTD: Values `[H, T, D]`.
            slots_T: Slot of each token, int64.
        """
        if layer not in self._layers:
            shape = (len(key_HTD), self.num_slots)
            self._layers[layer] = (
                _zeros((*shape, key_HTD.shape[-1]), key_HTD),
                _zeros((*shape, value_HTD.shape[-1]), value_HTD),
            )
        key_HRD, value_HRD = self._layers[layer]
        key_HRD.index_copy_(1, slots_T, key_HTD)
        value_HRD.index_copy_(1, slots_T, value_HTD)
        return key_HRD, value_HRD


class StackedKVPool(KVPool):
    """Keys and values of equally shaped layers in one tensor `[L, 2, J, R, D]` on the CPU.

    One view reads all layers, and one copy writes keys and values.

    Args:
        layers: L.
        heads: J.
        num_slots: R.
        size: D.
    """

    def __init__(self, *, layers: int, heads: int, num_slots: int, size: int) -> None:
        super().__init__(num_slots=num_slots)
        # On a CPU attention is fastest in float32, whatever the type of the weights.
        like = torch.empty(0, dtype=torch.float32, device="cpu")
        self.states_L2JRD = _zeros((layers, 2, heads, num_slots, size), like)
        self.layers = self.states_L2JRD.unbind()

    def tensors(self) -> Iterable[Tensor]:
        """Return the one tensor."""
        return (self.states_L2JRD,)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    # Inference tensors refuse updates outside inference mode; zeros are mapped when first used.
    with torch.inference_mode(mode=False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
