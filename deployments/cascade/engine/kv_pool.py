"""Keys and values of every layer in one pool of rows.

Shapes: `L` layers, `H` or `J` heads, `T` tokens, `R` rows, `D` head size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor


class Pool(Protocol):
    """Rows that hold keys and values of tokens."""

    @property
    def bytes_per_token(self) -> int:
        """Return the memory one token takes."""
        ...

    def copy(self, *, source: int, target: int, count: int) -> None:
        """Copy `count` rows of every layer from row `source` to row `target`; they may overlap."""
        ...


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
        return _bytes((t for pair in self._layers.values() for t in pair), self.rows)

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
                _copy(states_HRD, source=source, target=target, count=count)

    def _zeros(self, states_HTD: Tensor) -> Tensor:
        heads, _, size = states_HTD.shape
        return _zeros((heads, self.rows, size), states_HTD.dtype, states_HTD.device)


class StackedPool:
    """Keys and values of layers of one shape in one tensor, `[L, 2, H, R, D]`.

    So one view reads all layers, and one copy writes keys and values.
    """

    def __init__(self, *, layers: int, heads: int, rows: int, size: int) -> None:
        self.rows = rows
        # On a CPU attention is quickest in float32, whatever the weights are.
        self.states_L2JRD = _zeros(
            (layers, 2, heads, rows, size), torch.float32, torch.device("cpu")
        )
        self.layers = self.states_L2JRD.unbind()

    @property
    def bytes_per_token(self) -> int:
        """Return the memory one token takes."""
        return _bytes([self.states_L2JRD], self.rows)

    def copy(self, *, source: int, target: int, count: int) -> None:
        """Copy `count` rows of every layer from row `source` to row `target`; they may overlap."""
        _copy(self.states_L2JRD, source=source, target=target, count=count)


def _bytes(tensors: Iterable[Tensor], rows: int) -> int:
    return sum(t.numel() * t.element_size() for t in tensors) // max(rows, 1)


def _copy(states_HRD: Tensor, *, source: int, target: int, count: int) -> None:
    moved = states_HRD[..., source : source + count, :].clone()
    states_HRD[..., target : target + count, :] = moved


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    # Inference tensors refuse updates outside inference mode; zeros are mapped when first used.
    with torch.inference_mode(mode=False):
        return torch.zeros(shape, dtype=dtype, device=device)
