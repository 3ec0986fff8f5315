"""The pool of KV slots, each for one token in every layer: storage, allocation and capacity.

Shapes: `L` layers, `H` or `J` heads, `T` tokens, `R` slots, `D` head size.
"""

from __future__ import annotations

import bisect
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor

    from cascade.engine.settings import EngineSettings

MIN_RANGE = 128
_UNIT = 1024
_CPU_BYTES = 2**30
_CPU_SHARE = 0.25  # of the free memory
_UNBOUNDED_CONTEXT = 8192


class KVPool(ABC):
    """Keys and values of `num_slots` tokens."""

    def __init__(self, *, num_slots: int) -> None:
        self.num_slots = num_slots

    @abstractmethod
    def tensors(self) -> Iterable[Tensor]:
        """Return all storage that exists, each tensor `[..., R, D]`."""

    @property
    def bytes_per_token(self) -> int:
        """Return the memory of one token in all layers that exist."""
        return sum(t.numel() * t.element_size() for t in self.tensors()) // max(self.num_slots, 1)

    def copy(self, *, source: int, target: int, count: int) -> None:
        """Copy slots in every layer; the two ranges may overlap.

        Args:
            source: First slot to read.
            target: First slot to write.
            count: Number of slots.
        """
        for states_RD in self.tensors():
            copied = states_RD[..., source : source + count, :].clone()
            states_RD[..., target : target + count, :] = copied

    def clear(self, *, start: int, count: int) -> None:
        """Write zeros to `count` slots from `start`: masked NaN would still spoil what reads it."""
        for states_RD in self.tensors():
            states_RD[..., start : start + count, :] = 0


class LayeredKVPool(KVPool):
    """Head-major storage `[H, R, D]` per layer, shaped by the first states that a layer writes.

    So head sizes may differ by layer and between K and V, without configuration.
    """

    def __init__(self, *, num_slots: int) -> None:
        super().__init__(num_slots=num_slots)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def num_layers(self) -> int:
        """Return how many layers have been written."""
        return len(self._layers)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Return all keys and values of a layer that has been written, `[H, R, D]` each."""
        return self._layers[index]

    def tensors(self) -> Iterable[Tensor]:
        """Return keys and values of each layer that has been written."""
        return (states for pair in self._layers.values() for states in pair)

    def write(
        self, layer: int, *, key_HTD: Tensor, value_HTD: Tensor, slots_T: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store the states of `T` tokens and return the layer's whole K and V.

        Args:
            layer: Index of the layer.
            key_HTD: Keys `[H, T, D]`.
            value_HTD: Values `[H, T, D]`.
            slots_T: Slot of each token, int64.
        """
        if layer not in self._layers:
            shape = (len(key_HTD), self.num_slots)
            self._layers[layer] = (
                _zeros((*shape, key_HTD.shape[-1]), key_HTD),
                _zeros((*shape, value_HTD.shape[-1]), value_HTD),
            )
        key_HRD, value_HRD = self._layers[layer]
        key_HRD.index_copy_(1, slots_T, key_HTD)
        value_HRD.index_copy_(1, slots_T, value_HTD)
        return key_HRD, value_HRD


class StackedKVPool(KVPool):
    """Keys and values of equally shaped layers in one tensor `[L, 2, J, R, D]` on the CPU.

    One view reads all layers, and one copy writes keys and values. The arguments are L, J, R and D.
    """

    def __init__(self, *, layers: int, heads: int, num_slots: int, size: int) -> None:
        super().__init__(num_slots=num_slots)
        # On a CPU attention is fastest in float32, whatever the type of the weights.
        like = torch.empty(0, dtype=torch.float32, device="cpu")
        self.states_L2JRD = _zeros((layers, 2, heads, num_slots, size), like)
        self.layers = self.states_L2JRD.unbind()

    def tensors(self) -> Iterable[Tensor]:
        """Return the one tensor."""
        return (self.states_L2JRD,)


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    # Inference tensors refuse updates outside inference mode; zeros are mapped when first used.
    with torch.inference_mode(mode=False):
        return torch.zeros(shape, dtype=like.dtype, device=like.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class KVRange:
    """Slots `start .. start + size` of the pool."""

    start: int
    size: int

    @property
    def end(self) -> int:
        """Return the slot after the last."""
        return self.start + self.size


def size_class(tokens: int) -> int:
    """Return the slots of a range for `tokens`: 128, 256, 512, then multiples of 1024.

    With few sizes, sessions often lie at equal distances, and attention reads a run of such
    sessions as one strided view.
    """
    if tokens <= _UNIT:
        return max(MIN_RANGE, 1 << (tokens - 1).bit_length())
    return -(-tokens // _UNIT) * _UNIT


class KVRangeAllocator:
    """First-fit allocation from a sorted list of free ranges; free neighbours are merged."""

    def __init__(self, *, capacity: int) -> None:
        self.capacity = capacity
        self._free = [(0, capacity)] if capacity else []  # (start, size), ascending, never adjacent

    @property
    def used(self) -> int:
        """Return the number of allocated slots."""
        return self.capacity - sum(size for _, size in self._free)

    def allocate(self, tokens: int) -> KVRange | None:
        """Return a range of at least `tokens` slots, or None if no free range is long enough."""
        needed = size_class(tokens)
        for index, (start, size) in enumerate(self._free):
            if size >= needed:
                self._take(index, needed)
                return KVRange(start=start, size=needed)
        return None

    def extend(self, kv_range: KVRange, tokens: int) -> KVRange | None:
        """Return the range grown in place to `tokens` slots, or None if the next are not free."""
        more = size_class(tokens) - kv_range.size
        index = bisect.bisect_left(self._free, (kv_range.end, 0))
        start, size = self._free[index] if index < len(self._free) else (-1, 0)
        if start != kv_range.end or size < more:
            return None
        self._take(index, more)
        return KVRange(start=kv_range.start, size=kv_range.size + more)

    def release(self, kv_range: KVRange) -> None:
        """Free `kv_range`."""
        start, size = kv_range.start, kv_range.size
        index = bisect.bisect_left(self._free, (start, 0))
        if index < len(self._free) and self._free[index][0] == kv_range.end:
            size += self._free.pop(index)[1]
        if index and sum(self._free[index - 1]) == start:
            index -= 1
            start, before = self._free.pop(index)
            size += before
        self._free.insert(index, (start, size))

    def _take(self, index: int, count: int) -> None:
        start, size = self._free.pop(index)
        if size > count:
            self._free.insert(index, (start + count, size - count))


def capacity_tokens(
    settings: EngineSettings,
    *,
    device: torch.device,
    bytes_per_token: int,
    context_length: int | None,
) -> int:
    """Return the cache's size in tokens: as set, else what fits memory and sessions can use.

    Args:
        settings: The engine's settings.
        device: The device that holds the cache.
        bytes_per_token: Memory of one token in all layers.
        context_length: The model's limit in tokens; None if unknown.
    """
    if settings.cache_tokens:
        return size_class(settings.cache_tokens)
    budget = settings.cache_bytes or free_bytes(device, utilization=settings.gpu_memory_utilization)
    useful = settings.session_limit * size_class(context_length or _UNBOUNDED_CONTEXT)
    return size_class(max(1, min(budget // max(bytes_per_token, 1), useful)))


def free_bytes(device: torch.device, *, utilization: float) -> int:
    """Return the memory of a device that a cache may take.

    Args:
        device: The device.
        utilization: Share of a GPU's memory for weights and cache together.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used = torch.cuda.memory_reserved(device)
        budget = accelerator_budget(total=total, used=used, utilization=utilization)
        return min(budget, int(free * utilization))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_BYTES, int(free * _CPU_SHARE))


def accelerator_budget(*, total: int, used: int, utilization: float) -> int:
    """Return the memory that is left for a cache, in bytes.

    Args:
        total: Memory of the device.
        used: What this process takes of it by now.
        utilization: Share of the device for weights and cache together.
    """
    return max(0, int(total * utilization) - used)
