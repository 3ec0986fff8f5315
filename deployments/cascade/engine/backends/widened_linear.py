"""Linear layers of bfloat16 weights on a CPU that has no instructions for that type.

torch's kernels then convert numbers in their innermost loop, so a block of nine tokens takes four
times as long as one. A block of a few tokens is left to `compiled_linear`. For more, a part of the
matrix that fits the caches is converted to float32 and multiplied with all tokens, then the next
part: a prompt takes a third of the time. The weights are held once. For a single vector torch is as
fast as the memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from cascade.engine.backends import compiled_linear

_PART = 2**19  # weights, 2 MiB of float32: about a core's cache
_FEW = 64  # vectors, of which a part is converted and multiplied on the same core


def helps(weight: Tensor) -> bool:
    """Return whether a weight has a type that this machine's CPU has no instructions for."""
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not _in_hardware()


@cache
def _in_hardware() -> bool:
    """Return whether the CPU multiplies bfloat16 numbers, as far as torch can tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict[str, Any])()
    if capabilities.get("architecture") != "x86_64":
        return True
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


class WidenedLinear:
    """The linear layer of a `[out, in]` weight, which it keeps, for inputs `[N, in]`.

    Args:
        weight: The matrix.
        bias: `[out]`.
        compiled: Compile kernels for a few vectors, if they pay.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor | None = None, *, compiled: bool = True
    ) -> None:
        self.weight, self.bias = weight.contiguous(), bias
        large = weight.numel() >= compiled_linear.MIN_WEIGHTS
        self._compiled = compiled and large and _compiled_pays()

    def __call__(self, inputs: Tensor) -> Tensor:
        """Return the layer's outputs, of the inputs' type."""
        if len(inputs) == 1 and inputs.dtype == self.weight.dtype:
            product = torch.mv(self.weight, inputs[0])[None]
            return product if self.bias is None else product + self.bias
        few = self._compiled and 0 < len(inputs) <= compiled_linear.MAX_ROWS
        product = (compiled_linear.multiply if few else in_parts)(inputs, self.weight)
        return (product if self.bias is None else product.add_(self.bias)).to(inputs.dtype)


@cache
def _compiled_pays() -> bool:
    return compiled_linear.pays(in_parts)


def in_parts(inputs: Tensor, matrix: Tensor) -> Tensor:
    """Return the product in float32, part by part of the matrix."""
    if len(inputs) <= _FEW:
        return _by_core(inputs.float(), matrix)
    wide = inputs.float()
    parts = matrix.split(max(1, _PART // matrix.shape[1]))
    wide_part = torch.empty(parts[0].shape)
    products = [
        wide @ wide_part[: len(part)].copy_(part).t()  # copied: one piece of memory for all
        for part in parts
    ]
    return torch.cat(products, dim=1)


def _by_core(wide_MK: Tensor, matrix_NK: Tensor) -> Tensor:
    """Return the product with few vectors: each core converts and multiplies a part of its own."""
    cores, (count, size) = torch.get_num_threads(), matrix_NK.shape
    rows = max(1, min(_PART // 2 // size, count // cores))  # of a part
    step = cores * rows
    wide_KM = wide_MK.t().contiguous()
    inputs = wide_KM.expand(cores, -1, -1)
    parts = torch.empty(cores, rows, size)
    products = [
        torch.bmm(parts.copy_(matrix_NK[start : start + step].view_as(parts)), inputs).flatten(0, 1)
        for start in range(0, count - step + 1, step)
    ]
    rest_NK = matrix_NK[len(products) * step :]
    return torch.cat([*products, rest_NK.float() @ wide_KM]).t().contiguous()
