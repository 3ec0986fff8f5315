"""The lean path: our own forward pass over the weights of a Llama-like model on a CPU.

A model of a few million parameters spends most of a step between operators, not in them. This pass
has a third of them: fewer matrices, rotation in place, one view of the pool for all layers. Large
models gain from the packed matrices (see `packing`).

Shapes: `T` tokens of a pass, `C` hidden size, `H` query heads, `J` key heads, `D` head size,
`E` pairs of it that turn together, `L` layers, `R` rows of the pool, `N` sessions, `Q` queries and
`K` keys of each, `X` heads of any kind.
"""

from __future__ import annotations

from functools import cached_property, partial
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import linear, scaled_dot_product_attention

from cascade.engine.attention import Form, grouped
from cascade.engine.backends import llama_weights, mask_probe, prepacked_linear
from cascade.engine.backends.base import BaseRunner
from cascade.engine.backends.numpy_llama import FEW, NumpyLlama
from cascade.engine.batch import SHORT_QUERIES, RaggedBatch
from cascade.engine.kv_allocator import SMALLEST
from cascade.engine.kv_pool import StackedPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.backends.llama_weights import Layer, Matrix
    from cascade.engine.backends.prepacked_linear import Linear
    from cascade.engine.batch import Group, Segment

_POSITIONS = 1024  # of the first table of rotations; it doubles when outgrown


class CpuLlamaRunner(BaseRunner):
    """A Llama-like model on a CPU.

    Raises:
        Unsuited: if the model is not one.
    """

    def __init__(
        self, model: PreTrainedModel, *, packed: bool = True, deterministic: bool = False
    ) -> None:
        super().__init__(model)
        self._deterministic = deterministic
        self._weights = llama_weights.read(
            model, partial(_map, packed=packed, deterministic=deterministic)
        )
        self._forms = [
            Form(scale=self._weights.scale, window=window, deterministic=deterministic)
            for _, window in sorted(mask_probe.windows(model).items())
        ]
        self.solo = (
            NumpyLlama(model, windows=[form.window for form in self._forms])
            if packed and not deterministic and NumpyLlama.suits(model)
            else None
        )
        self._turns = llama_weights.rotations(self._weights, positions=_POSITIONS)
        self._pool = self._empty(0)

    def resize(self, *, rows: int) -> None:
        """Replace the pool by an empty one of `rows` rows, and some scratch."""
        self._pool = self._empty(rows + SMALLEST)
        self._scratch = rows

    @property
    def pool(self) -> StackedPool:
        """Return the keys and values."""
        return self._pool

    def free_hf_weights(self) -> None:
        """Free the weights that the model itself has: this runner has its own."""
        llama_weights.drop(self.model)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' rows and return the wanted logits `[N, V]`, in segment order."""
        turns_P1E = self._turned(max(segment.length for segment in segments))
        if (
            self.solo
            and len(segments) <= FEW
            and all(one.count == one.rows == 1 for one in segments)
        ):
            return self.solo.forward(segments, pool=self.pool, turns_P1E=turns_P1E)
        batch = RaggedBatch(
            segments,
            device=self.device,
            rows=self.pool.rows,
            deterministic=self._deterministic,
        )
        weights, reading = self._weights, _Reading(batch, self.pool)
        turn_T1E = turns_P1E.index_select(0, batch.positions_T)
        hidden_TC = weights.embedding_VC.index_select(0, batch.ids_T)
        for place, layer in enumerate(weights.layers):
            mixed_TX = self._attention(place, layer, hidden_TC, turn_T1E, reading)
            hidden_TC = layer.out(mixed_TX).add_(hidden_TC)
            gate, up = layer.gates(layer.between(hidden_TC)).chunk(2, dim=-1)
            hidden_TC = layer.down(layer.activation(gate).mul_(up)).add_(hidden_TC)
        if not batch.all_wanted:
            hidden_TC = hidden_TC.index_select(0, batch.wanted())
        return weights.head(weights.norm(hidden_TC))

    def _attention(
        self,
        place: int,
        layer: Layer[Linear],
        hidden_TC: Tensor,
        turn_T1E: Tensor,
        reading: _Reading,
    ) -> Tensor:
        """Store the layer's keys and values and return what its heads read, `[T, H * D]`."""
        weights, tokens = self._weights, len(hidden_TC)
        heads, keyed = weights.query_heads, weights.query_heads + weights.key_heads
        # Float32 as the pool is: see `StackedPool`.
        states_TXD = layer.heads(layer.before(hidden_TC)).float().view(tokens, -1, weights.size)
        if layer.query_norm and layer.key_norm:
            states_TXD[:, :heads] = layer.query_norm(states_TXD[:, :heads])
            states_TXD[:, heads:keyed] = layer.key_norm(states_TXD[:, heads:keyed])
        pairs_TXE2 = states_TXD[:, :keyed].view(tokens, keyed, -1, 2)
        torch.view_as_complex(pairs_TXE2).mul_(turn_T1E)
        stored = states_TXD[:, heads:].view(tokens, 2, -1, weights.size).permute(1, 2, 0, 3)
        self.pool.layers[place].index_copy_(2, reading.batch.rows_T, stored)
        out_TX = reading.attend(states_TXD[:, :heads], layer=place, form=self._forms[place])
        return out_TX.to(hidden_TC.dtype)

    def _turned(self, positions: int) -> Tensor:
        """Return the rotations of so many positions or more, complex `[P, 1, E]`."""
        held = len(self._turns)
        if positions > held:
            self._turns = llama_weights.rotations(self._weights, positions=max(positions, 2 * held))
        return self._turns

    def _empty(self, rows: int) -> StackedPool:
        weights = self._weights
        return StackedPool(
            layers=len(weights.layers), heads=weights.key_heads, rows=rows, size=weights.size
        )


def _map(matrix: Matrix, *, packed: bool, deterministic: bool) -> Linear:
    """Return a matrix as a function of rows."""
    weight, bias = matrix.weight_OC, matrix.bias_O
    if packed and prepacked_linear.supported(weight):
        return prepacked_linear.packed(weight, bias, deterministic=deterministic)
    return lambda rows: linear(rows, weight, bias)


class _Reading:
    """How one pass reads the pool."""

    def __init__(self, batch: RaggedBatch, pool: StackedPool) -> None:
        self.batch = batch
        self._pool = pool

    def attend(self, query_THD: Tensor, *, layer: int, form: Form) -> Tensor:
        """Return the attention of every token, `[T, H * D]`."""
        if form.window is None and self._even:
            return self._evenly(query_THD, layer=layer, scale=form.scale)
        keys_JRD, values_JRD = self._pool.layers[layer]
        return grouped(self.batch, query_THD, keys_JRD, values_JRD, form).flatten(1)

    @cached_property
    def _even(self) -> Group | None:
        """The only group, if every session of it has as many queries and these are few."""
        groups = self.batch.groups(None)
        alone = groups[0] if len(groups) == 1 else None
        return alone if alone and alone.even and alone.queries[0] <= SHORT_QUERIES else None

    def _evenly(self, query_THD: Tensor, *, layer: int, scale: float) -> Tensor:
        keys_NJKD, values_NJKD = self._views[2 * layer], self._views[2 * layer + 1]
        count, key_heads = keys_NJKD.shape[:2]
        tokens, heads, size = query_THD.shape
        queries, share = tokens // count, heads // key_heads
        if queries == 1:
            alone = query_THD.reshape(count, key_heads, share, size)
            mask = self._mask(share)
            read = scaled_dot_product_attention(
                alone, keys_NJKD, values_NJKD, attn_mask=mask, scale=scale
            )
            return read.reshape(tokens, heads * size)
        folded = query_THD.reshape(count, queries, key_heads, share, size).permute(0, 2, 3, 1, 4)
        out = scaled_dot_product_attention(
            folded.reshape(count, key_heads, share * queries, size),
            keys_NJKD,
            values_NJKD,
            attn_mask=self._mask(share),
            scale=scale,
        )
        unfolded = out.unflatten(2, (share, queries)).permute(0, 3, 1, 2, 4)
        return unfolded.reshape(tokens, heads * size)

    @cached_property
    def _views(self) -> tuple[Tensor, ...]:
        """Keys and values of every layer in turn, `[N, J, K, D]` each, in place."""
        group, states = self._even, self._pool.states_L2JRD
        assert group is not None, "asked for an even group"
        layers, _, heads, _, size = states.shape
        across, down = states.stride()[2:4]
        return states.as_strided(
            (2 * layers, group.size, heads, max(group.keys), size),
            (heads * across, group.stride * down, across, down, 1),
            group.start * down,
        ).unbind()

    def _mask(self, share: int) -> Tensor | None:
        if self._folded is None and self._even is not None:
            mask = self.batch.mask(self._even, None, torch.float32)
            self._folded = () if mask is None else (mask[:, 0].repeat(1, 1, share, 1),)
        return self._folded[0] if self._folded else None

    _folded: tuple[()] | tuple[Tensor] | None = None
