"""One token of one session, or of each of a few, through a small model on a CPU, on numpy.

It is a drafter's usual step. There the arithmetic takes less time than what torch does between its
operators. numpy does less, and needs less code: the core of a drafter that has waited for a pass of
the expert finds its caches empty.

Shapes: `C` hidden size, `O` outputs, `J` key heads, `S` query heads of each, `X` heads of any kind,
`D` head size, `E` pairs of it that turn together, `L` layers, `K` keys, `R` rows of the pool,
`P` positions, `N` sessions, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from cascade.engine.backends import llama_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.backends.llama_weights import Layer, Matrix, Norm, Weights
    from cascade.engine.batch import Segment
    from cascade.engine.kv_pool import StackedPool

    Row: TypeAlias = NDArray[Any]
    RowMap: TypeAlias = Callable[[Row], Row]

FEW = 4  # sessions that are quicker one after the other than together

MOST_WEIGHTS = 2**20  # of a matrix; a larger one is worth a second core


class NumpyLlama:
    """A Llama-like model for one token at a time, over the pool of the lean path.

    Args:
        model: The model; its matrices are copied.
        windows: Tokens that each layer sees back, itself included; None: all.
    """

    def __init__(self, model: PreTrainedModel, *, windows: Sequence[int | None]) -> None:
        weights = llama_weights.read(model, _map)
        self._embedding_VC = weights.embedding_VC.numpy()
        self._layers = [
            _Layer(layer, weights, window=window)
            for layer, window in zip(weights.layers, windows, strict=True)
        ]
        self._norm, self._head = _norm(weights.norm), weights.head

    @staticmethod
    def suits(model: PreTrainedModel) -> bool:
        """Return whether the model is small, of float32 and of the usual activation."""
        usual = getattr(model.config, "hidden_act", None) in {"silu", "swish"}
        small = all(one.numel() <= MOST_WEIGHTS for one in model.parameters())
        return usual and small and model.dtype == torch.float32

    def forward(
        self, segments: Sequence[Segment], *, pool: StackedPool, turns_P1E: Tensor
    ) -> Tensor:
        """Store the row of each segment's only token and return its logits, `[N, V]`."""
        states_L2JRD, turns = pool.states_L2JRD.numpy(), turns_P1E.numpy()
        logits = [self._logits(one, states_L2JRD, turns[one.length - 1]) for one in segments]
        return torch.from_numpy(logits[0][None] if len(logits) == 1 else np.stack(logits))

    def _logits(self, segment: Segment, states_L2JRD: Row, turn_1E: Row) -> Row:
        states_L2JKD = states_L2JRD[..., segment.start : segment.start + segment.length, :]
        hidden_C = self._embedding_VC[segment.tokens[0]]
        for layer, states_2JKD in zip(self._layers, states_L2JKD, strict=True):
            hidden_C = layer.forward(hidden_C, states_2JKD, turn_1E)
        return self._head(self._norm(hidden_C))


class _Layer:
    def __init__(
        self, layer: Layer[RowMap], weights: Weights[RowMap], *, window: int | None
    ) -> None:
        self._layer = layer
        self._before, self._between = _norm(layer.before), _norm(layer.between)
        self._query_norm, self._key_norm = (
            norm and _norm(norm) for norm in (layer.query_norm, layer.key_norm)
        )
        self._heads, self._key_heads = weights.query_heads, weights.key_heads
        self._size, self._scale = weights.size, weights.scale
        self._window = window

    def forward(self, hidden_C: Row, states_2JKD: Row, turn_1E: Row) -> Row:
        """Return the hidden row after this layer; its keys and values become the last of K."""
        layer = self._layer
        between_C = hidden_C + layer.out(self._attention(hidden_C, states_2JKD, turn_1E))
        gates = layer.gates(self._between(between_C))
        half = len(gates) // 2
        return between_C + layer.down(_silu(gates[:half]) * gates[half:])

    def _attention(self, hidden_C: Row, states_2JKD: Row, turn_1E: Row) -> Row:
        """Return what the heads read, `[X * D]`."""
        heads, keyed, size = self._heads, self._heads + self._key_heads, self._size
        states_XD = self._layer.heads(self._before(hidden_C)).reshape(-1, size)
        if self._query_norm and self._key_norm:
            states_XD[:heads] = self._query_norm(states_XD[:heads])
            states_XD[heads:keyed] = self._key_norm(states_XD[heads:keyed])
        states_XD[:keyed].view(turn_1E.dtype)[:] *= turn_1E
        states_2JKD[0, :, -1], states_2JKD[1, :, -1] = states_XD[heads:keyed], states_XD[keyed:]
        keys_JKD, values_JKD = states_2JKD[:, :, -(self._window or 0) :]
        query_JSD = states_XD[:heads].reshape(self._key_heads, -1, size)
        scores_JSK = np.matmul(query_JSD * self._scale, keys_JKD.swapaxes(1, 2))
        scores_JSK -= scores_JSK.max(axis=-1, keepdims=True)
        weights_JSK = np.exp(scores_JSK, out=scores_JSK)
        read_JSD = np.matmul(weights_JSK, values_JKD)
        return (read_JSD / weights_JSK.sum(axis=-1, keepdims=True)).reshape(-1)


def _map(matrix: Matrix) -> RowMap:
    """Return a matrix as a function of a row."""
    weight_CO = matrix.weight_OC.numpy().T
    if matrix.bias_O is None:
        return lambda row: row @ weight_CO
    bias_O = matrix.bias_O.numpy()
    return lambda row: row @ weight_CO + bias_O


def _norm(norm: Norm) -> RowMap:
    """Return a norm as a function of a row, or of the rows of heads."""
    floor, weight_C = norm.floor**2, norm.weight_C.numpy() if norm.weighs else None

    def alone(row_C: Row) -> Row:
        return row_C * (1 / math.sqrt(row_C.dot(row_C) + floor))

    def weighed(rows_XC: Row) -> Row:
        lengths_X1 = np.sqrt(np.square(rows_XC).sum(axis=-1, keepdims=True) + np.float32(floor))
        return rows_XC / lengths_X1 * weight_C

    return alone if weight_C is None else weighed


def _silu(gate: Row) -> Row:
    """Return gate times its logistic function, which is taken from the tangent: no overflow."""
    half = gate * np.float32(0.5)
    return half * (np.tanh(half) + 1)
