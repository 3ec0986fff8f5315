"""Linear layers whose weights are laid out once for the CPU's kernels.

A block of a few rows then costs little more than one row, which is what judging a block needs:
with float32 weights of 6144 x 768 on a core with AVX-512, six rows cost 0.6 ms so and 2.6 ms else.
The operators are those that torch's own compiler emits; they are private, so their absence is no
error.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Callable

    Linear: TypeAlias = Callable[[Tensor], Tensor]

log = logging.getLogger(__name__)

# The kernels give equal rows in batches of 2 to 32, whatever the other rows are; a row alone may be
# summed in another order.
_MOST_ROWS = 32

_LEAST_WEIGHTS = 2**14  # below, a call costs more than the layout saves

_VECTOR_WEIGHTS = 2**20  # of a float32 matrix below which one row is quicker as it is


def pack(model: nn.Module, *, deterministic: bool = False) -> int:
    """Pack the linear layers of a model on a CPU; return how many there are.

    The model computes what it did, within rounding. Takes the memory of the weights once more.

    Args:
        model: any; where it cannot be packed it stays as it is.
        deterministic: make every row the same to the bit in any batch.
    """
    if not supported(next(model.parameters())):
        log.warning("Linear layers stay as they are: packing needs a CPU that has the kernels")
        return 0
    least = 0 if deterministic else _LEAST_WEIGHTS
    layers = [layer for layer in model.modules() if _fits(layer, least=least)]
    for layer in layers:
        _replace(layer, deterministic=deterministic)
    return len(layers)


def supported(weight: Tensor) -> bool:
    """Return whether there are kernels for matrices like this one."""
    if weight.device.type != "cpu":
        return False
    try:
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - there is no public one
        return weight.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except (AttributeError, RuntimeError):
        return False


def packed(weight: Tensor, bias: Tensor | None = None, *, deterministic: bool = False) -> Linear:
    """Return the linear map of a `[out, in]` weight, for rows `[N, in]`.

    Args:
        weight: of a kind that is `supported`; a copy is kept.
        bias: `[out]`.
        deterministic: make every row the same to the bit in any batch.
    """
    layout = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)  # noqa: SLF001 - as above
    kernel: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - as above

    def apply(rows: Tensor) -> Tensor:
        return kernel(rows, layout, bias, "none", [], "")

    if deterministic:
        return _evenly(apply)
    if weight.dtype == torch.float32 and weight.numel() < _VECTOR_WEIGHTS:
        return _by_count(apply, _vector(weight, bias))
    return apply


def _by_count(many: Linear, one: Linear) -> Linear:
    """Return the map that takes a single row another way."""
    return lambda rows: one(rows) if rows.shape[0] == 1 else many(rows)


def _vector(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return the map of one row; numpy's library takes half the time of torch's for that."""
    matrix = weight.detach().numpy().T
    offset = None if bias is None else bias.detach().numpy()

    def linear(row: Tensor) -> Tensor:
        found = row.numpy() @ matrix
        return torch.from_numpy(found if offset is None else found + offset)

    return linear


def _evenly(apply: Linear) -> Linear:
    """Return the map whose rows do not depend on the batch."""

    def linear(rows: Tensor) -> Tensor:
        if rows.shape[0] == 1:
            return apply(rows.expand(2, -1))[:1]
        if rows.shape[0] <= _MOST_ROWS:
            return apply(rows)
        return torch.cat([linear(part) for part in rows.split(_MOST_ROWS)])

    return linear


def _fits(layer: nn.Module, *, least: int) -> bool:
    return type(layer) in {nn.Linear, Conv1D} and layer.weight.numel() >= least  # pyright: ignore[reportCallIssue] - both kinds have a tensor there


def _replace(layer: Any, *, deterministic: bool) -> None:
    kind: type = type(layer)
    weight: Tensor = layer.weight.detach()
    matrix = weight.t() if kind is Conv1D else weight
    linear = packed(matrix, layer.bias, deterministic=deterministic)

    def forward(inputs: Tensor) -> Tensor:
        return linear(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])

    layer.forward = forward
