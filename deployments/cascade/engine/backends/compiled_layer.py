"""A Llama-like layer after its attention, compiled for passes of a few tokens.

Such a pass over bfloat16 weights takes as long as the memory needs for them if nothing stands in
between. So everything from the attention of one layer to that of the next is one function with one
parallel region: see `compiled_linear` for its products. It is compiled for the shapes of a model
and a few numbers of tokens.

Shapes as in `cpu_llama`.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, silu

from cascade.engine.backends import compiled_linear, widened_linear
from cascade.engine.backends.compiled_linear import OPTIONS, halves, joined, products, renamed

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from cascade.engine.backends.llama_weights import Norm, Weights
    from cascade.engine.backends.widened_linear import WidenedLinear

ROWS = (1, 2, 4, 6, 8, 12)  # that functions are compiled for; more run in several calls
MOST_ROWS = 24  # with more, the matrices are better widened
_QUARTERS_ROWS = 4  # up to which four streams of a matrix are faster than two


class _Matrix(NamedTuple):
    """A linear layer in two halves, `[N, K]` each, and its bias `[2 * N]`."""

    first_NK: Tensor
    second_NK: Tensor
    bias_N: Tensor | None


def helps(model: PreTrainedModel) -> bool:
    """Return whether the layers of a Llama-like model are large and of the usual kind."""
    config: Any = model.config
    large = config.hidden_size * config.intermediate_size >= compiled_linear.MIN_WEIGHTS
    usual = config.hidden_act in {"silu", "swish"} and config.hidden_size % 2 == 0
    return large and usual and widened_linear.helps(next(model.parameters()))


class CompiledLayers:
    """All layers of a model, after their attention.

    Args:
        weights: The model's, with widened linear layers; the matrices are used in place.
    """

    def __init__(self, weights: Weights[Any]) -> None:
        readers = [weights.reader(index) for index in range(len(weights.layers))]
        self._sizes = [len(linear.weight) for _, linear in readers]
        self._arguments = [
            (
                _matrix(layer.output),
                *_normed(layer.mlp_norm, layer.gate_up),
                _matrix(layer.down),
                *_normed(*reader, reader=True),
            )
            for layer, reader in zip(weights.layers, readers, strict=True)
        ]
        output = weights.layers[0].output.weight
        self._hidden, self._mixed = output.shape
        _, _, gate_up, *_ = self._arguments[0]
        biases = [
            matrix.bias_N is not None
            for matrix in self._arguments[0]
            if isinstance(matrix, _Matrix)
        ]
        self._functions = {
            rows: _function(rows, self._mixed, self._hidden, len(gate_up.first_NK), *biases)
            for rows in ROWS
        }

    def pay(self, plain: Callable[[int, Tensor, Tensor], object]) -> bool:
        """Return whether the functions compile and are faster than `plain`, called like this."""

        def run(rows: int, call: Callable[[int, Tensor, Tensor], object] = self) -> None:
            for index in (0, -1):
                call(index, torch.ones(rows, self._mixed), torch.ones(rows, self._hidden))

        with torch.inference_mode():
            return compiled_linear.compiles(ROWS, run) and compiled_linear.faster(
                lambda: run(4), lambda: run(4, plain)
            )

    def __call__(self, index: int, mixed_TX: Tensor, hidden_TC: Tensor) -> tuple[Tensor, Tensor]:
        """Return a layer's output, and what the next layer's attention, or the head, reads of it.

        Args:
            index: Of the layer.
            mixed_TX: What its attention returned, in float32.
            hidden_TC: The hidden states before it, in float32.
        """
        count = len(hidden_TC)
        fewest = -(-count // ROWS[-1])
        size = next(rows for rows in ROWS if rows * fewest >= count)
        both = zip(mixed_TX.split(size), hidden_TC.split(size), strict=True)
        parts = [self._chunk(index, *part) for part in both]
        if len(parts) > 1:
            hidden_TC, states_TX = (torch.cat(part) for part in zip(*parts, strict=True))
        else:
            hidden_TC, states_TX = parts[0]
        return hidden_TC, joined(states_TX, self._sizes[index])

    def _chunk(self, index: int, mixed_TX: Tensor, hidden_TC: Tensor) -> tuple[Tensor, Tensor]:
        count = len(hidden_TC)
        rows = next(rows for rows in ROWS if rows >= count)
        padded = [
            pad(one, (0, 0, 0, rows - count)) if rows > count else one.contiguous()
            for one in (mixed_TX, hidden_TC)
        ]
        hidden_TC, states_TX = self._functions[rows](*padded, *self._arguments[index])
        return hidden_TC[:count], states_TX[:count]


@cache
def _function(rows: int, *shape: int) -> Callable[..., tuple[Tensor, Tensor]]:
    """Return the function for a number of tokens; it is compiled at its first call.

    Args:
        rows: The number.
        shape: What the arguments' shapes depend on: nothing else tells one function from another.
    """

    def after_attention(  # noqa: PLR0913, PLR0917 - a whole layer
        mixed_TX: Tensor,
        hidden_TC: Tensor,
        output: _Matrix,
        mlp_norm: tuple[Tensor, Tensor],
        gate_up: _Matrix,
        down: _Matrix,
        next_norm: tuple[Tensor, Tensor],
        reader: _Matrix,
    ) -> tuple[Tensor, Tensor]:
        split = 2 if rows <= _QUARTERS_ROWS else 1
        hidden_TC = hidden_TC + _apply(output, mixed_TX, rows=rows, split=split)
        gated = _apply(gate_up, _normalised(hidden_TC, *mlp_norm), rows=rows, split=split)
        gate, up = gated.chunk(2, dim=-1)
        hidden_TC = hidden_TC + _apply(down, silu(gate) * up, rows=rows, split=split)
        return hidden_TC, _apply(reader, _normalised(hidden_TC, *next_norm), rows=rows)

    return torch.compile(
        renamed(after_attention, "_".join(["after_attention", *map(str, (rows, *shape))])),
        dynamic=False,
        options={
            **OPTIONS,
            # Normalised states are computed once, not for each row of the matrix.
            "realize_reads_threshold": 2,
            # They take as long as ten operators, and would find no more than `shape`.
            "guard_filter_fn": torch.compiler.skip_all_guards_unsafe,
        },
    )


def _apply(matrix: _Matrix, inputs: Tensor, *, rows: int, split: int = 1) -> Tensor:
    halves_NK = matrix.first_NK, matrix.second_NK
    parts = [part_NK for half_NK in halves_NK for part_NK in half_NK.chunk(split)]
    result = products(inputs, parts, rows=rows)
    return result if matrix.bias_N is None else result + matrix.bias_N


def _normalised(hidden_TC: Tensor, weight_C: Tensor, floor: Tensor) -> Tensor:
    length_T1 = hidden_TC.square().sum(-1, keepdim=True) + floor.square()
    return hidden_TC * length_T1.rsqrt() * weight_C


def _normed(
    norm: Norm, linear: WidenedLinear, *, reader: bool = False
) -> tuple[tuple[Tensor, Tensor], _Matrix]:
    return (norm.weight_C, torch.tensor(norm.floor)), _matrix(linear, reader=reader)


def _matrix(linear: WidenedLinear, *, reader: bool = False) -> _Matrix:
    """Return a layer's argument; the functions take a `reader` of any number of outputs."""
    first_NK, second_NK = halves(linear.weight)
    bias_N = linear.bias
    if reader and bias_N is None:  # or the head would be another kind than the layers
        bias_N = linear.weight.new_zeros(len(linear.weight))
    if bias_N is not None:
        bias_N = torch.cat(halves(bias_N.float()))
    if reader:
        for one in (first_NK, second_NK, bias_N):
            torch._dynamo.mark_dynamic(one, 0)  # noqa: SLF001  # pyright: ignore[reportPrivateUsage] - its documented name
    return _Matrix(first_NK, second_NK, bias_N)
