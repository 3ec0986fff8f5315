"""Linear layers whose weights are laid out once for the CPU's bfloat16 kernels.

A block of a few rows then costs little more than one row, which is what judging a block needs. The
operators are those that torch's own compiler emits; they are private, so their absence is no error.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

# The kernels give equal rows in batches of up to 32, whatever the other rows are.
_INVARIANT_ROWS = 32
_LEAST_WEIGHTS = 2**14  # below, a call costs more than the layout saves


def pack(model: nn.Module) -> int:
    """Pack the linear layers of a bfloat16 model on a CPU; return how many there are.

    The model computes what it did, within bfloat16's rounding, and every row of a layer is the same
    in any batch. Takes the memory of the weights once more.
    """
    if not _supported(model):
        log.warning("Linear layers stay as they are: packing needs bfloat16 weights on a CPU")
        return 0
    layouts: dict[int, Any] = {}
    layers = [layer for layer in model.modules() if _fits(layer)]
    for layer in layers:
        _replace(layer, layouts)
    return len(layers)


def _supported(model: nn.Module) -> bool:
    weight = next(model.parameters())
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - there is no public one
    except (AttributeError, RuntimeError):
        return False


def _fits(layer: nn.Module) -> bool:
    return type(layer) in {nn.Linear, Conv1D} and layer.weight.numel() >= _LEAST_WEIGHTS  # pyright: ignore[reportCallIssue] - both kinds have a tensor there


def _replace(layer: Any, layouts: dict[int, Any]) -> None:
    kind: type = type(layer)
    weight: Tensor = layer.weight.detach()
    matrix = weight.t() if kind is Conv1D else weight
    # Tied weights share one layout.
    packed = layouts.get(weight.data_ptr())
    if packed is None:
        packed = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), None)  # noqa: SLF001 - as above
        layouts[weight.data_ptr()] = packed
    layer.forward = _forward(packed, layer.bias)


def _forward(packed: Any, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    linear: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - as above

    def forward(inputs: Tensor) -> Tensor:
        rows = inputs.flatten(0, -2)
        parts = [linear(part, packed, bias, "none", [], "") for part in rows.split(_INVARIANT_ROWS)]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined.unflatten(0, inputs.shape[:-1])

    return forward
