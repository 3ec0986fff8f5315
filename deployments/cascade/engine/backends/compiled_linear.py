"""Products of a bfloat16 matrix with a few vectors, compiled for the CPU that runs them.

Where a CPU has no instructions for bfloat16, torch's operators convert each number of the matrix
once for every vector, or write a converted copy. The loop that `torch.compile` makes of `products`
converts a number once, in a register: a block of six vectors then takes little longer than the
memory needs for the matrix. It needs a C++ compiler, and a few seconds for each of a few kernels,
which torch keeps on disk for the next start.
"""

from __future__ import annotations

import logging
import time
from functools import cache
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from cascade.engine.progress import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

log = logging.getLogger(__name__)

MAX_ROWS = 12  # with more, the sums of one row of the matrix leave the registers
MIN_WEIGHTS = 2**19  # a smaller matrix stays in the caches
OPTIONS: dict[str, Any] = {
    "cpp.enable_floating_point_contract_flag": "fast",  # a product and a sum at once
    "cpp.dynamic_threads": True,
    "cpp.max_horizontal_fusion_size": 2 * MAX_ROWS,  # all sums of `products` in one loop
    "compile_threads": 1,  # no processes of its own
}
_STEP = 2  # kernels for 2, 4, ... vectors
_TRIED = (1024, 1024 + 32)  # not square, or one variable would stand for both sides
_TRIES = 5


def multiply(inputs_MK: Tensor, weight_NK: Tensor) -> Tensor:
    """Return the product `[M, N]` of up to `MAX_ROWS` vectors, in float32.

    Args:
        inputs_MK: The vectors, of any type.
        weight_NK: The matrix, contiguous.
    """
    count = len(inputs_MK)
    wide_MK = pad(inputs_MK.float(), (0, 0, 0, count % _STEP))
    result = _kernels()[len(wide_MK)](wide_MK, *halves(weight_NK))[:count]
    return joined(result, len(weight_NK))


def products(wide_MK: Tensor, parts_NK: Sequence[Tensor], *, rows: int) -> Tensor:
    """Return the products of vectors with a matrix in parts, `[M, parts * N]`, to be compiled.

    It reads all parts at once: a core that computes asks the memory for too little of one.

    Args:
        wide_MK: The vectors, in float32.
        parts_NK: The parts.
        rows: M.
    """
    wide = [part_NK.float() for part_NK in parts_NK]
    sums = [(part_NK * wide_MK[row]).sum(-1) for row in range(rows) for part_NK in wide]
    return torch.cat(sums).view(rows, -1)


def halves(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return both halves of a matrix or its bias; of an odd number, both have the middle row."""
    half = -(-len(weight) // 2)
    return weight[:half], weight[-half:]


def joined(products_MN: Tensor, count: int) -> Tensor:
    """Return the products with the `count` rows of a matrix, given those with its halves."""
    half = products_MN.shape[1] // 2
    if 2 * half == count:
        return products_MN
    return torch.cat([products_MN[:, :half], products_MN[:, half + 1 :]], dim=1)


def pays(plain: Callable[[Tensor, Tensor], Tensor]) -> bool:
    """Return whether kernels can be compiled here, and are faster than `plain` at the same product.

    Args:
        plain: Multiplies `[M, K]` by a matrix `[N, K]`.
    """
    weight_NK = torch.rand(_TRIED).bfloat16()
    inputs_MK = torch.rand(4, _TRIED[1]).bfloat16()
    return compiles(
        _kernels(), lambda rows: multiply(torch.rand(rows, _TRIED[1]), weight_NK)
    ) and faster(lambda: multiply(inputs_MK, weight_NK), lambda: plain(inputs_MK, weight_NK))


def compiles(rows: Collection[int], run: Callable[[int], object]) -> bool:
    """Return whether kernels for so many vectors compile, and warn if not.

    Args:
        rows: The numbers of vectors.
        run: Runs the kernel for a number of vectors.
    """
    try:
        for count in counted(rows, "Kernels compiled"):
            run(count)
    # Whatever torch finds wrong with the compiler or its cache: nothing depends on it.
    except Exception as error:  # noqa: BLE001 - as above
        reason = str(error).strip().partition("\n")[0]
        log.warning(
            "Blocks of a few tokens are slower than need be: no kernel compiles: %s", reason
        )
        return False
    return True


def faster(one: Callable[[], object], other: Callable[[], object]) -> bool:
    """Return whether the best of a few calls takes less time than that of another function."""
    return min(_seconds(one) for _ in range(_TRIES)) < min(_seconds(other) for _ in range(_TRIES))


def renamed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Return a copy of a function; torch compiles one for a limited number of signatures only."""
    assert isinstance(function, FunctionType), "a function in Python"
    code = function.__code__.replace(co_name=name)
    copy = FunctionType(code, function.__globals__, closure=function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


@cache
def _kernels() -> Mapping[int, Callable[..., Tensor]]:
    """Return the kernel for each number of vectors; it is compiled at its first call."""
    return {rows: _kernel(rows) for rows in range(_STEP, MAX_ROWS + 1, _STEP)}


def _kernel(rows: int) -> Callable[..., Tensor]:
    def product(wide_MK: Tensor, first_NK: Tensor, second_NK: Tensor) -> Tensor:
        return products(wide_MK, (first_NK, second_NK), rows=rows)

    return torch.compile(renamed(product, f"product_of_{rows}"), dynamic=True, options=OPTIONS)


def _seconds(function: Callable[[], object]) -> float:
    started_s = time.perf_counter()
    function()
    return time.perf_counter() - started_s
