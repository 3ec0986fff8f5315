"""The `lean` path: our own forward pass over the weights of a Llama-like model on a CPU.

A model of a few million parameters spends most of a step between operators, not in them. This pass
has a third of the operators: fewer matrices, rotation in place, one view of the pool for all
layers. Large models gain from the prepacked matrices (see `prepacked_linear`).

Shapes: `T` tokens of a pass, `C` hidden size, `H` query heads, `J` key heads, `D` head size,
`E` pairs of it that rotate together, `L` layers, `R` slots of the pool, `P` positions, `N`
sessions, `Q` queries and `K` keys of each, `X` heads of any kind.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear

from cascade.engine.attention import AttentionParams, attend_folded, attend_groups
from cascade.engine.backends import (
    compiled_layer,
    llama_weights,
    mask_probe,
    prepacked_linear,
    widened_linear,
)
from cascade.engine.backends.base import Runner
from cascade.engine.backends.compiled_layer import CompiledLayers
from cascade.engine.backends.numpy_llama import NumpyLlama
from cascade.engine.backends.widened_linear import WidenedLinear
from cascade.engine.batch import SHORT_QUERIES, RaggedBatch
from cascade.engine.kv_pool import StackedKVPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.backends.llama_weights import Layer
    from cascade.engine.backends.prepacked_linear import Linear
    from cascade.engine.batch import Group, Segment

_POSITIONS = 1024  # of the first table of rotations; it doubles when outgrown


class CpuLlamaRunner(Runner[StackedKVPool]):
    """A Llama-like model on a CPU.

    Args:
        model: The model; its weights are copied.
        packed: Use prepacked matrices, and numpy for single tokens of small models.
        deterministic: Logits of a token do not depend on the batch.
        consume: Free the model's matrices as they are copied.

    Raises:
        PathUnsupported: The model is not Llama-like.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        packed: bool = True,
        deterministic: bool = False,
        consume: bool = False,
    ) -> None:
        super().__init__(model)
        self._deterministic = deterministic
        windows = mask_probe.windows(model)
        in_numpy = packed and not deterministic and NumpyLlama.supports(model)
        self.numpy_llama = (
            NumpyLlama(model, windows=[window for _, window in sorted(windows.items())])
            if in_numpy
            else None
        )
        widened = packed and not deterministic and widened_linear.helps(next(model.parameters()))
        compiled = widened and compiled_layer.helps(model)
        make = (
            partial(WidenedLinear, compiled=not compiled)
            if widened
            else partial(_linear, packed=packed, deterministic=deterministic)
        )
        self._weights = llama_weights.read(model, make, consume=consume)
        self._compiled = CompiledLayers(self._weights) if compiled else None
        if self._compiled and not self._compiled.pay(self._after_attention):
            self._compiled = None
        # What the compiled layers compute is not rounded, so nothing else is.
        self._dtype = torch.float32 if self._compiled else model.dtype
        self._params = [
            AttentionParams(scale=self._weights.scale, window=window)
            for _, window in sorted(windows.items())
        ]
        self._rotations = llama_weights.rotations(self._weights, positions=_POSITIONS)

    def make_pool(self, *, num_slots: int) -> StackedKVPool:
        """Return an empty pool."""
        weights = self._weights
        return StackedKVPool(
            layers=len(weights.layers),
            heads=weights.key_heads,
            num_slots=num_slots,
            size=weights.head_size,
        )

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order."""
        rotations_P1E = self._rotation_table(max(one.positions.stop for one in segments))
        if self.numpy_llama and self.numpy_llama.pays(segments):
            return self.numpy_llama.forward(segments, pool=self.pool, rotations_P1E=rotations_P1E)
        batch = RaggedBatch(
            segments,
            device=self.device,
            num_slots=self.pool.num_slots,
            deterministic=self._deterministic,
        )
        weights = self._weights
        share = weights.query_heads // weights.key_heads
        reader = _PoolReader(batch, self.pool, share=share)
        rotation_T1E = rotations_P1E.index_select(0, batch.positions_T)
        hidden_TC = weights.embedding_VC.index_select(0, batch.ids_T).to(self._dtype)
        few = len(hidden_TC) <= compiled_layer.MOST_ROWS
        after_attention = self._compiled if self._compiled and few else self._after_attention
        states_TX = weights.layers[0].qkv(weights.layers[0].attention_norm(hidden_TC))
        for index, layer in enumerate(weights.layers):
            mixed_TX = self._attention(index, layer, states_TX, rotation_T1E, reader)
            if index == len(weights.layers) - 1 and not batch.all_logits:
                wanted_N = batch.logit_indices()
                mixed_TX = mixed_TX.index_select(0, wanted_N)
                hidden_TC = hidden_TC.index_select(0, wanted_N)
            hidden_TC, states_TX = after_attention(index, mixed_TX.to(self._dtype), hidden_TC)
        return states_TX

    def _after_attention(
        self, index: int, mixed_TX: Tensor, hidden_TC: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return a layer's output, and what the next one's attention, or the head, reads of it."""
        layer = self._weights.layers[index]
        norm, read = self._weights.reader(index)
        hidden_TC = layer.output(mixed_TX).add_(hidden_TC)
        gate, up = layer.gate_up(layer.mlp_norm(hidden_TC)).chunk(2, dim=-1)
        hidden_TC = layer.down(layer.activation(gate).mul_(up)).add_(hidden_TC)
        return hidden_TC, read(norm(hidden_TC))

    def _attention(
        self,
        index: int,
        layer: Layer[Linear],
        qkv_TX: Tensor,
        rotation_T1E: Tensor,
        reader: _PoolReader,
    ) -> Tensor:
        """Store the layer's keys and values and return its attention, `[T, H * D]`."""
        weights, tokens = self._weights, len(rotation_T1E)
        heads, rotated = weights.query_heads, weights.query_heads + weights.key_heads
        # Float32 as the pool is: see `StackedKVPool`.
        states_TXD = qkv_TX.float().view(tokens, -1, weights.head_size)
        if layer.query_norm and layer.key_norm:
            states_TXD[:, :heads] = layer.query_norm(states_TXD[:, :heads])
            states_TXD[:, heads:rotated] = layer.key_norm(states_TXD[:, heads:rotated])
        pairs_TXE2 = states_TXD[:, :rotated].view(tokens, rotated, -1, 2)
        torch.view_as_complex(pairs_TXE2).mul_(rotation_T1E)
        stored = states_TXD[:, heads:].view(tokens, 2, -1, weights.head_size).permute(1, 2, 0, 3)
        self.pool.layers[index].index_copy_(2, reader.batch.slots_T, stored)
        return reader.attend(states_TXD[:, :heads], layer=index, params=self._params[index])

    def _rotation_table(self, positions: int) -> Tensor:
        """Return the rotations of at least so many positions, complex `[P, 1, E]`."""
        held = len(self._rotations)
        if positions > held:
            self._rotations = llama_weights.rotations(
                self._weights, positions=max(positions, 2 * held)
            )
        return self._rotations


def _linear(weight: Tensor, bias: Tensor | None, *, packed: bool, deterministic: bool) -> Linear:
    """Return a linear layer as a function of `[T, C]`."""
    if packed and prepacked_linear.supported(weight, deterministic=deterministic):
        return prepacked_linear.packed(weight, bias, deterministic=deterministic)
    return lambda hidden: linear(hidden, weight, bias)


class _PoolReader:
    """Attention of one pass over the pool; `share` query heads have a key head."""

    def __init__(self, batch: RaggedBatch, pool: StackedKVPool, *, share: int) -> None:
        self.batch = batch
        self._pool = pool
        self._share = share

    def attend(self, query_THD: Tensor, *, layer: int, params: AttentionParams) -> Tensor:
        """Return the attention of every token in a layer, `[T, H * D]`."""
        if params.window is None and self._uniform:
            keys_NJKD, values_NJKD = self._views[2 * layer], self._views[2 * layer + 1]
            return attend_folded(
                query_THD, keys_NJKD, values_NJKD, bias=self._bias, scale=params.scale
            )
        keys_JRD, values_JRD = self._pool.layers[layer]
        return attend_groups(self.batch, query_THD, keys_JRD, values_JRD, params).flatten(1)

    @cached_property
    def _uniform(self) -> Group | None:
        """The only group, if all its sessions have as many queries and these are few."""
        groups = self.batch.groups(None)
        only = groups[0] if len(groups) == 1 else None
        return only if only and only.uniform and only.queries[0] <= SHORT_QUERIES else None

    @cached_property
    def _views(self) -> tuple[Tensor, ...]:
        """Keys and values of every layer in turn, `[N, J, K, D]` each, in place."""
        group, states = self._uniform, self._pool.states_L2JRD
        assert group is not None, "asked for a uniform group"
        layers, _, heads, _, size = states.shape
        head_stride, slot_stride = states.stride()[2:4]
        return states.as_strided(
            (2 * layers, group.size, heads, max(group.keys), size),
            (heads * head_stride, group.stride * slot_stride, head_stride, slot_stride, 1),
            group.start * slot_stride,
        ).unbind()

    @cached_property
    def _bias(self) -> Tensor | None:
        """The group's mask for folded heads, `[N, 1, G * Q, K]`."""
        assert self._uniform is not None, "asked for a uniform group"
        mask = self.batch.mask(self._uniform, None, torch.float32)
        return None if mask is None else mask[:, 0].repeat(1, 1, self._share, 1)
