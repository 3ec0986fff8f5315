"""Threads and memory of one replica's process.

Two OpenMP teams that spin on the same cores slow each other tenfold; passive waiting costs a few
percent alone. The policy is read when torch is imported, so it must be in the environment by then.
numpy's own team, which knows no such policy, has one member.

What a pass frees, the next one takes again. glibc may give blocks of megabytes back to the system
in between, and then every page of them faults: that can take longer than the work on them.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

_LOOK_S = 0.5  # between two looks: a shorter time tells of single passes

_WHOLE_CORE = 0.9


class IdleCores:
    """How many cores no process has used of late.

    Args:
        clock: Seconds.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._looked_s = -math.inf
        self._idle = 0.0
        psutil.cpu_percent()  # what it returns is the time since the call before

    def leave_one(self, *, busy: float) -> bool:
        """Return whether a whole core is left to a thread that has itself been busy for a share."""
        return self() + busy >= _WHOLE_CORE

    def __call__(self) -> float:
        """Return the number; costs a look at the system twice a second at most."""
        now_s = self._clock()
        if now_s - self._looked_s >= _LOOK_S:
            self._looked_s = now_s
            self._idle = (os.cpu_count() or 1) * (1 - psutil.cpu_percent() / 100)
        return self._idle


# The default of 5 ms lets a Python thread hold up the engine's for longer than a decode step.
_SWITCH_INTERVAL_S = 0.0005

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h

_KEPT_BYTES = 2**30


def environment(*, threads: int = 0) -> dict[str, str]:
    """Return the variables a replica's process must start with.

    Args:
        threads: OpenMP threads of the process; 0 leaves torch its default.
    """
    variables = {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    return variables


def apply(*, threads: int = 0) -> None:
    """Set what can still be set in a running process, for the thread that calls.

    Args:
        threads: OpenMP threads behind it, whatever other threads have; 0 for torch's default.
    """
    import torch  # noqa: PLC0415 - `environment` is asked for by processes without torch

    usual = _usual()
    torch.set_num_threads(threads or usual)
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    _keep_memory()


@cache
def _keep_memory() -> None:
    """Let the process keep what it frees, up to a limit, where the C library is glibc."""
    with suppress(AttributeError, OSError, TypeError):
        tune = ctypes.CDLL(None).mallopt
        tune(_M_TRIM_THRESHOLD, _KEPT_BYTES)
        tune(_M_MMAP_THRESHOLD, _KEPT_BYTES)


@cache
def _usual() -> int:
    """Return torch's default: what threads have before anyone sets a number."""
    import torch  # noqa: PLC0415 - as above

    return torch.get_num_threads()
