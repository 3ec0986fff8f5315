"""Passes of one or a few tokens through a small Llama-like model on a CPU, in numpy.

It is a drafter's usual step, whose arithmetic takes less time than torch's overhead between
operators. numpy has less overhead, and less code: a drafter whose core has just run a pass of the
expert finds its caches cold.

Shapes: `C` hidden size, `O` outputs, `J` key heads, `S` query heads of each, `X` heads of any kind,
`D` head size, `E` pairs of it that rotate together, `L` layers, `K` keys, `R` slots of the pool,
`P` positions, `N` sessions, `V` vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch

from cascade.engine.backends import llama_weights

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.backends.llama_weights import Layer, Norm, Weights
    from cascade.engine.batch import Segment
    from cascade.engine.kv_pool import StackedKVPool

    Array: TypeAlias = NDArray[Any]
    ArrayMap: TypeAlias = Callable[[Array], Array]

MAX_SESSIONS = 4  # up to which one session after the other is faster than all together
MAX_TOKENS = 4  # of a pass, up to which one after the other is faster where layers are small:
MAX_REPEATED = 2**20  # weights of a layer, times the tokens after the first, which read them again
MAX_KEYS = 2**13  # of a session; attention to more takes longer than torch's overhead, on one core
MAX_WEIGHTS = 2**20  # of a matrix; for a larger one a second core pays off


class NumpyLlama:
    """A Llama-like model, one token after the other, over the pool of the `lean` path.

    It copies the matrices. `windows` are the tokens that each layer sees back; None for all.
    """

    def __init__(self, model: PreTrainedModel, *, windows: Sequence[int | None]) -> None:
        weights = llama_weights.read(model, _linear)
        self._embedding_VC = weights.embedding_VC.numpy()
        self._layers = [
            _NumpyLayer(layer, weights, window=window)
            for layer, window in zip(weights.layers, windows, strict=True)
        ]
        self._final_norm, self._lm_head = _norm(weights.final_norm), weights.lm_head
        layer = next(iter(model.model.layers))
        self._layer_weights = sum(one.numel() for one in layer.parameters())

    @staticmethod
    def supports(model: PreTrainedModel) -> bool:
        """Return whether the model is small, in float32, and has a SiLU activation."""
        has_silu = getattr(model.config, "hidden_act", None) in {"silu", "swish"}
        small = all(one.numel() <= MAX_WEIGHTS for one in model.parameters())
        return has_silu and small and model.dtype == torch.float32

    def pays(self, segments: Sequence[Segment]) -> bool:
        """Return whether segments have so few tokens and keys that numpy is faster than torch."""
        tokens = sum(one.count for one in segments)
        small = (tokens - 1) * self._layer_weights <= MAX_REPEATED
        few = tokens == len(segments) <= MAX_SESSIONS or (small and tokens <= MAX_TOKENS)
        return few and all(one.num_logits == 1 and one.length <= MAX_KEYS for one in segments)

    # The engine looks for what is infinite or NaN in the logits.
    @np.errstate(over="ignore", invalid="ignore")
    def forward(
        self, segments: Sequence[Segment], *, pool: StackedKVPool, rotations_P1E: Tensor
    ) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order.

        Args:
            segments: Segments of a few tokens.
            pool: The pool.
            rotations_P1E: The rotation of each position, complex.
        """
        states_L2JRD, rotations = pool.states_L2JRD.numpy(), rotations_P1E.numpy()
        logits = [
            logits_V
            for segment in segments
            for logits_V in self._logits(segment, states_L2JRD, rotations)
        ]
        return torch.from_numpy(logits[0][None] if len(logits) == 1 else np.stack(logits))

    def _logits(
        self, segment: Segment, states_L2JRD: Array, rotations_P1E: Array
    ) -> Iterator[Array]:
        """Yield the requested logits of a segment's tokens, which run one after the other."""
        keys = segment.start + segment.past
        first_logit = segment.count - segment.num_logits
        for index, (token, position) in enumerate(
            zip(segment.tokens, segment.positions, strict=True)
        ):
            states_L2JKD = states_L2JRD[..., segment.start : keys + index + 1, :]
            hidden_C = self._embedding_VC[token]
            rotation_1E = rotations_P1E[position]
            for layer, states_2JKD in zip(self._layers, states_L2JKD, strict=True):
                hidden_C = layer.forward(hidden_C, states_2JKD, rotation_1E)
            if index >= first_logit:
                yield self._lm_head(self._final_norm(hidden_C))


class _NumpyLayer:
    def __init__(
        self, layer: Layer[ArrayMap], weights: Weights[ArrayMap], *, window: int | None
    ) -> None:
        self._layer = layer
        self._attention_norm, self._mlp_norm = _norm(layer.attention_norm), _norm(layer.mlp_norm)
        self._query_norm, self._key_norm = (
            norm and _norm(norm) for norm in (layer.query_norm, layer.key_norm)
        )
        self._heads, self._key_heads = weights.query_heads, weights.key_heads
        self._head_size, self._scale = weights.head_size, weights.scale
        self._window = window

    def forward(self, hidden_C: Array, states_2JKD: Array, rotation_1E: Array) -> Array:
        """Return the hidden state after this layer; write the last of the K keys and values."""
        layer = self._layer
        hidden_C = hidden_C + layer.output(self._attention(hidden_C, states_2JKD, rotation_1E))
        gate_up = layer.gate_up(self._mlp_norm(hidden_C))
        half = len(gate_up) // 2
        return hidden_C + layer.down(_silu(gate_up[:half]) * gate_up[half:])

    def _attention(self, hidden_C: Array, states_2JKD: Array, rotation_1E: Array) -> Array:
        """Return the attention of all heads, `[X * D]`."""
        heads, rotated, size = self._heads, self._heads + self._key_heads, self._head_size
        states_XD = self._layer.qkv(self._attention_norm(hidden_C)).reshape(-1, size)
        if self._query_norm and self._key_norm:
            states_XD[:heads] = self._query_norm(states_XD[:heads])
            states_XD[heads:rotated] = self._key_norm(states_XD[heads:rotated])
        states_XD[:rotated].view(rotation_1E.dtype)[:] *= rotation_1E
        states_2JKD[0, :, -1], states_2JKD[1, :, -1] = states_XD[heads:rotated], states_XD[rotated:]
        keys_JKD, values_JKD = states_2JKD[:, :, -(self._window or 0) :]
        query_JSD = states_XD[:heads].reshape(self._key_heads, -1, size)
        scores_JSK = np.matmul(query_JSD * self._scale, keys_JKD.swapaxes(1, 2))
        scores_JSK -= scores_JSK.max(axis=-1, keepdims=True)
        weights_JSK = np.exp(scores_JSK, out=scores_JSK)
        read_JSD = np.matmul(weights_JSK, values_JKD)
        return (read_JSD / weights_JSK.sum(axis=-1, keepdims=True)).reshape(-1)


def _linear(weight: Tensor, bias: Tensor | None) -> ArrayMap:
    """Return a linear layer as a function of a vector."""
    weight_CO = weight.numpy().T
    if bias is None:
        return lambda hidden: hidden @ weight_CO
    bias_O = bias.numpy()
    return lambda hidden: hidden @ weight_CO + bias_O


def _norm(norm: Norm) -> ArrayMap:
    """Return a norm as a function of a vector, or with a weight, of the vectors of heads."""
    floor, weight_C = norm.floor**2, norm.weight_C.numpy() if norm.has_weight else None

    def unweighted(hidden_C: Array) -> Array:
        return hidden_C * (1 / math.sqrt(hidden_C.dot(hidden_C) + floor))

    def weighted(states_XC: Array) -> Array:
        lengths_X1 = np.sqrt(np.square(states_XC).sum(axis=-1, keepdims=True) + np.float32(floor))
        return states_XC / lengths_X1 * weight_C

    return unweighted if weight_C is None else weighted


def _silu(gate: Array) -> Array:
    """Return SiLU of `gate`; the logistic function as a tangent does not overflow."""
    half = gate * np.float32(0.5)
    return half * (np.tanh(half) + 1)
