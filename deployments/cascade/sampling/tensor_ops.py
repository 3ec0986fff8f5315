"""The way from the device to Python: every read waits for the device, so reads are few and counted.

What decides on a device's numbers without reading them costs nothing; so nothing else in this
folder may read a tensor that may live on a device.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 2**20  # numbers of one piece: enough for all cores, and they stay in the last cache


def widen(logits_NV: Tensor) -> Tensor:
    """Return the logits in float32, or as they are in float64."""
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def pieces(rows_NV: Tensor) -> list[slice]:
    """Return the rows that are worked on together: all of them but on a CPU."""
    count, vocab = rows_NV.shape
    step = max(1, count if rows_NV.device.type != "cpu" else PIECE // max(vocab, 1))
    return [slice(first, min(first + step, count)) for first in range(0, max(count, 1), step)]


def peak_and_norm(logits_NV: Tensor, inverse_N1: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return each row's largest logit and log sum exp((logit - peak) / temperature), [N, 1] each.

    Args:
        logits_NV: Widened.
        inverse_N1: 1 / temperature; None where all are 1.
    """
    best_N1 = argmax(logits_NV)[:, None]
    peak_N1 = logits_NV.gather(1, best_N1)
    scaled_NV = logits_NV if inverse_N1 is None else (logits_NV - peak_N1).mul_(inverse_N1)
    # The likeliest token's share is 1 / sum, and softmax is one pass.
    return peak_N1, scaled_NV.softmax(dim=1).gather(1, best_N1).log_().neg_()


def argmax(rows_NV: Tensor) -> Tensor:
    """Return the place of the largest number of each row, the lowest of equals, int64 [N].

    numpy's search takes all lanes of a CPU; torch's takes five to ten times as long.
    """
    if rows_NV.device.type != "cpu":
        return widen(rows_NV).argmax(dim=1)
    parts = [widen(rows_NV[some]).numpy().argmax(axis=1) for some in pieces(rows_NV)]
    return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


class _Tally(threading.local):
    reads = 0


_tally = _Tally()


def to_list(tensor: Tensor) -> Any:
    """Return a tensor's numbers as nested lists, or one number."""
    _tally.reads += 1
    return tensor.tolist()


def to_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor in the memory of the host."""
    _tally.reads += 1
    return tensor.cpu()


def reads() -> int:
    """Return how many reads this thread has made."""
    return _tally.reads
