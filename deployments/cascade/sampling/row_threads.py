"""Rows of a large vocabulary, shared among the threads of a CPU.

An operator that torch runs on several cores ends with the slowest of them, and takes about as long
to begin and end as to work on one row. So each thread takes rows of its own, as soon as it is free,
and runs its operators alone: rows stay in its core's cache, and a core that others use takes fewer.

Shapes: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, TypeVar

import torch

from cascade.sampling.tensor_ops import row_chunks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

ResultT = TypeVar("ResultT")


def map_rows(
    function: Callable[[slice], ResultT], shape: Sequence[int], device: torch.device
) -> list[ResultT]:
    """Return what a function returns for slices of rows, all rows in order.

    On a CPU the slices are cache-sized, and of large rows each is the work of one thread, of as
    many as torch has in this one. Elsewhere there is one slice.

    Args:
        function: Called with slices, at the same time in several threads.
        shape: Of what the slices are of, [N, V].
        device: Where it is.
    """
    slices, threads = row_chunks(shape, device), torch.get_num_threads()
    if len(slices) == 1 or threads == 1:
        return [function(rows) for rows in slices]
    inference = torch.is_inference_mode_enabled()

    def run(rows: slice) -> ResultT:
        with torch.inference_mode(inference):  # which each thread has for itself
            return function(rows)

    return list(_pool(threads).map(run, slices))


@cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Return threads whose operators run on one core each."""
    begun = threading.Barrier(count + 1)

    def begin() -> None:
        torch.get_num_threads()  # the first call in a thread sets the default
        torch.set_num_threads(1)
        begun.wait()

    pool = ThreadPoolExecutor(count, thread_name_prefix="rows", initializer=begin)
    for _ in range(count):
        pool.submit(int)
    begun.wait()
    torch.set_num_threads(count)  # the last call is also the default of threads to come
    return pool
