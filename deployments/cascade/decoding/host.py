"""The way from the device to Python: every read waits for the device, so reads are few and counted.

What decides on a device's numbers without reading them costs nothing; so nothing else in this
folder may read a tensor that may live on a device.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


class _Tally(threading.local):
    reads = 0


_tally = _Tally()


def fetch(tensor: Tensor) -> Any:
    """Return a tensor's numbers as nested lists, or one number."""
    _tally.reads += 1
    return tensor.tolist()


def bring(tensor: Tensor) -> Tensor:
    """Return a tensor in the memory of the host."""
    _tally.reads += 1
    return tensor.cpu()


def reads() -> int:
    """Return how many reads this thread has made."""
    return _tally.reads
