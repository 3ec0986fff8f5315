"""Products of a bfloat16 matrix with a few vectors, compiled for the CPU that runs them.

Where a CPU has no instructions for bfloat16, torch's operators convert each number of the matrix
once for every vector, or write a converted copy. The loop that `torch.compile` makes of
`_product_of` converts a number once, in a register: a block of six vectors then takes little longer
than the memory needs for the matrix. It needs a C++ compiler, and a few seconds for each of a few
kernels, which torch keeps on disk for the next start.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import pad

from cascade.engine.progress import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

log = logging.getLogger(__name__)

MAX_ROWS = 12  # with more, the sums of one row of the matrix leave the registers
MIN_WEIGHTS = 2**19  # a smaller matrix stays in the caches
_STEP = 2  # kernels for 2, 4, ... vectors
_TRIED = (1024, 1024 + 32)  # not square, or one variable would stand for both sides
_TRIES = 5


def multiply(inputs_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return the product `[M, N]` of up to `MAX_ROWS` vectors, in float32.

    Args:
        inputs_MK: The vectors, of any type.
        weight_NK: The matrix.
    """
    count, size = len(inputs_MK), len(weight_NK)
    wide_MK = pad(inputs_MK.float(), (0, 0, 0, count % _STEP))
    products = _kernels()[len(wide_MK)](wide_MK, halves(weight_NK))[:count]
    return products if size % 2 == 0 else without_repeated(products)


def halves(weight_NK: Tensor) -> Tensor:
    """Return both halves of a contiguous matrix, in place; a row in the middle belongs to both."""
    count, size = weight_NK.shape
    half = -(-count // 2)
    return weight_NK.as_strided((2, half, size), ((count - half) * size, size, 1))


def without_repeated(products_MN: Tensor) -> Tensor:
    """Return products with `halves` of an odd number of rows, each once."""
    half = products_MN.shape[1] // 2
    return torch.cat([products_MN[:, :half], products_MN[:, half + 1 :]], dim=1)


def pays(plain: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Return whether kernels can be compiled here, and are faster than `plain` at the same product.

    Args:
        plain: Multiplies `[M, K]` by a matrix `[N, K]`.
    """
    weight_NK = torch.rand(_TRIED).bfloat16()
    try:
        for rows in counted(_kernels(), "Kernels compiled"):
            multiply(torch.rand(rows, _TRIED[1]), weight_NK)
    # Whatever torch finds wrong with the compiler or its cache: nothing depends on it.
    except Exception as error:  # noqa: BLE001 - as above
        reason = str(error).strip().partition("\n")[0]
        log.warning(
            "Blocks of a few tokens are slower than need be: no kernel compiles: %s", reason
        )
        return False
    inputs_MK = torch.rand(4, _TRIED[1]).bfloat16()
    compiled_s = min(_seconds(multiply, inputs_MK, weight_NK) for _ in range(_TRIES))
    return compiled_s < min(_seconds(plain, inputs_MK, weight_NK) for _ in range(_TRIES))


def _product_of(rows: int) -> Callable[[Tensor, Tensor], Tensor]:
    def product(wide_MK: Tensor, halves_2NK: Tensor) -> Tensor:
        # Two streams: a core that computes asks the memory for too little of one.
        wide = [half_NK.float() for half_NK in halves_2NK.unbind()]
        sums = [(half_NK * wide_MK[row]).sum(-1) for row in range(rows) for half_NK in wide]
        return torch.cat(sums).view(rows, -1)

    # torch compiles one code object for a limited number of signatures only.
    code = product.__code__.replace(co_name=f"product_of_{rows}")
    return FunctionType(code, globals(), closure=product.__closure__)


@cache
def _kernels() -> Mapping[int, Callable[..., Tensor]]:
    """Return the kernel for each number of vectors; it is compiled at its first call."""
    return {rows: _kernel(rows) for rows in range(_STEP, MAX_ROWS + 1, _STEP)}


def _kernel(rows: int) -> Callable[..., Tensor]:
    return torch.compile(
        _product_of(rows),
        dynamic=True,
        options={
            "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum at once
            "cpp.dynamic_threads": True,
            "cpp.max_horizontal_fusion_size": 2 * MAX_ROWS,  # all sums in one loop
            "compile_threads": 1,  # no processes of its own
        },
    )


def _seconds(
    product: Callable[[Tensor, Tensor], Tensor], inputs_MK: Tensor, weight_NK: Tensor
) -> float:
    started_s = time.perf_counter()
    product(inputs_MK, weight_NK)
    return time.perf_counter() - started_s
