"""What the cores of this machine do, for an engine that shares them with others."""

from __future__ import annotations

import math
import os
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
