"""Keys and values of every layer in one pool of rows.

Shapes: `H` heads, `T` tokens, `R` rows, `D` head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


class KVPool:
    """Head-major storage `[H, R, D]` per layer, shaped by the first states a layer writes.

    So per-layer head sizes, K and V of different sizes and grouped heads need no configuration.
    """

    def __init__(self, *, rows: int) -> None:
        self.rows = rows
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def bytes_per_token(self) -> int:
        """Return the memory one token takes in all layers that have been written."""
        tensors = [tensor for pair in self._layers.values() for tensor in pair]
        return sum(t.numel() * t.element_size() for t in tensors) // max(self.rows, 1)

    def write(
        self, layer: int, *, key_HTD: Tensor, value_HTD: Tensor, rows_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store the states of `T` tokens at `rows_T` and return the layer's whole K and V."""
        if layer not in self._layers:
            self._layers[layer] = (self._zeros(key_HTD), self._zeros(value_HTD))
        key_HRD, value_HRD = self._layers[layer]
        key_HRD.index_copy_(1, rows_T, key_HTD)
        value_HRD.index_copy_(1, rows_T, value_HTD)
        return key_HRD, value_HRD

    def copy(self, *, source: int, target: int, count: int) -> None:
        """Copy `count` rows of every layer from row `source` to row `target`; they may overlap."""
        for pair in self._layers.values():
            for states_HRD in pair:
                moved = states_HRD[:, source : source + count].clone()
                states_HRD[:, target : target + count] = moved

    def _zeros(self, states_HTD: Tensor) -> Tensor:
        heads, _, size = states_HTD.shape
        # Inference tensors refuse updates outside inference mode; zeros are mapped when first used.
        with torch.inference_mode(mode=False):
            return torch.zeros(
                (heads, self.rows, size), dtype=states_HTD.dtype, device=states_HTD.device
            )
