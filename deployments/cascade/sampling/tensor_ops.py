"""Tensor helpers of sampling and speculation, and the counted reads from a device.

Reading a tensor's values makes Python wait for the device, so reads are few and counted. `sampling`
and `speculation` read tensors that may be on a device through `to_list` and `to_cpu` only.

Shapes: `N` rows, `V` vocabulary.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

ResultT = TypeVar("ResultT")

CHUNK_SIZE = 2**17  # elements: with copies of them they stay in a core's cache
_BLOCK = 128  # elements that are summed before the sum in float64


def widen(logits_NV: Tensor) -> Tensor:
    """Return the logits in float32; float64 logits are returned as they are."""
    return logits_NV if logits_NV.dtype == torch.float64 else logits_NV.float()


def row_chunks(shape: Sequence[int], device: torch.device) -> list[slice]:
    """Return slices of rows to process together: on a CPU cache-sized, elsewhere all rows."""
    count, vocab = shape
    step = max(1, count if device.type != "cpu" else CHUNK_SIZE // max(vocab, 1))
    return [slice(first, min(first + step, count)) for first in range(0, max(count, 1), step)]


def map_rows(
    function: Callable[[slice], ResultT], shape: Sequence[int], device: torch.device
) -> list[ResultT]:
    """Return what a function returns for slices of rows `[N, V]`, all rows in order."""
    return [function(rows) for rows in row_chunks(shape, device)]


def row_sums(values: Tensor) -> Tensor:
    """Return the sum over the last dimension in float64, whose last steps only are slow."""
    count = values.shape[-1] // _BLOCK
    whole, rest = values[..., : count * _BLOCK], values[..., count * _BLOCK :]
    blocks = whole.unflatten(-1, (count, _BLOCK)).sum(dim=-1)
    return blocks.sum(dim=-1, dtype=torch.float64) + rest.sum(dim=-1)


def zero_where_less(weights_NV: Tensor, values_NV: Tensor, least_N1: Tensor) -> None:
    """Set weights to 0 whose values are less than `least_N1`, in place.

    On a CPU a product takes a tenth of the time of torch's `masked_fill_`.
    """
    if values_NV.device.type != "cpu":
        weights_NV.masked_fill_(values_NV < least_N1, 0.0)
        return
    weights_NV.mul_(torch.ge(values_NV, least_N1, out=torch.empty_like(weights_NV)))


def argmax(values_NV: Tensor) -> Tensor:
    """Return the index of each row's largest value, the lowest index of equal ones, int64 [N].

    On a CPU numpy's vectorised argmax is five to ten times as fast as torch's.
    """
    if values_NV.device.type != "cpu":
        return widen(values_NV).argmax(dim=1)
    if values_NV.dtype in {torch.float32, torch.float64}:
        return torch.from_numpy(values_NV.numpy().argmax(axis=1))
    chunks = row_chunks(values_NV.shape, values_NV.device)
    parts = [widen(values_NV[rows]).numpy().argmax(axis=1) for rows in chunks]
    return torch.from_numpy(np.concatenate(parts))


def upload(values: Any, device: torch.device, *, dtype: torch.dtype | None = None) -> Tensor:
    """Return values on a device, without waiting for what it is doing.

    Args:
        values: Numbers, or a tensor in host memory.
        device: The device.
        dtype: Of the result.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return torch.as_tensor(values, dtype=dtype, device=device)
    # torch keeps pinned memory until it has been read.
    return torch.as_tensor(values, dtype=dtype).pin_memory().to(device, non_blocking=True)


class _Counter(threading.local):
    reads = 0


_counter = _Counter()


def to_list(tensor: Tensor) -> Any:
    """Return a tensor's values as nested lists, or one number."""
    _counter.reads += 1
    return tensor.tolist()


def to_cpu(tensor: Tensor) -> Tensor:
    """Return a tensor in host memory."""
    _counter.reads += 1
    return tensor.cpu()


def device_reads() -> int:
    """Return how many reads this thread has made."""
    return _counter.reads
