"""Thread and memory settings of one replica's process.

Two OpenMP thread pools that spin on the same cores slow each other down tenfold; passive waiting
costs up to a quarter, since an operator takes no longer than it takes to wake a thread. So threads
spin for a moment, and not at all where a replica has reserved fewer cores than it has threads. The
wait policy is read when torch is imported, so it must be in the environment by then. numpy's own
pool has no such policy, so it gets one thread.

Each thread that runs a large operator keeps an OpenMP pool until it ends, and while a process has
more threads in pools than its machine has cores, none of them waits actively, not even briefly. So
a model is loaded, checked and warmed up by threads that end (`run_in_own_thread`), and only the
engine's thread keeps a pool.

Weights that are packed lie in anonymous memory, of which Linux gives huge pages only to who asks
for them. glibc asks if its environment says so when the process starts; without them passes over
large weights take longer, and not always equally long.

Each pass allocates what the one before freed. If glibc returns blocks of megabytes to the system in
between, every page of them faults, which can take longer than the work on them.

oneDNN keeps the kernels of the last shapes, and torch their descriptions, a quarter of a MiB each.
By default both keep 1024.
"""

from __future__ import annotations

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable

ParamsP = ParamSpec("ParamsP")
ResultT = TypeVar("ResultT")

# With the default of 5 ms a Python thread can delay the engine's for longer than a decode step.
_SWITCH_INTERVAL_S = 0.0005

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # from malloc.h
_KEPT_BYTES = 2**30
# Of libgomp, a fraction of a millisecond: longer than the gaps between operators.
_SPIN_COUNT = 10_000
_KEPT_KERNELS = 512  # more than the shapes of a model (see `prepacked_linear.kernel_rows`)


def environment(*, threads: int = 0, crowded: bool = False) -> dict[str, str]:
    """Return the environment of a replica's process.

    Args:
        threads: OpenMP threads; 0: default.
        crowded: The process has not as many cores as threads to itself.
    """
    variables = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": str(0 if crowded else _SPIN_COUNT),
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(_KEPT_KERNELS),
        "LRU_CACHE_CAPACITY": str(_KEPT_KERNELS),
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",  # by madvise
    }
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    return variables


def apply(*, threads: int = 0) -> None:
    """Set what a running process can set, and the calling thread's OpenMP threads; 0: default."""
    import torch  # noqa: PLC0415 - processes without torch call `environment`

    default = _default_threads()
    torch.set_num_threads(threads or default)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    _keep_memory()


def run_in_own_thread(
    function: Callable[ParamsP, ResultT], *args: ParamsP.args, **kwargs: ParamsP.kwargs
) -> ResultT:
    """Return what a function returns in a thread that ends with it, and its OpenMP pool too."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function, *args, **kwargs).result()


@cache
def _keep_memory() -> None:
    """Keep freed memory in the process, up to a limit, if the C library is glibc."""
    with suppress(AttributeError, OSError, TypeError):
        tune = ctypes.CDLL(None).mallopt
        tune(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        tune(_M_MMAP_THRESHOLD, _KEPT_BYTES)


def trim_memory() -> None:
    """Return memory that was freed to the system, if the C library is glibc."""
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@cache
def _default_threads() -> int:
    """Return torch's default number of threads, as it is before the first change."""
    import torch  # noqa: PLC0415 - as above

    return torch.get_num_threads()
