"""What every way of running a model shares: pools, passes and length-dependent RoPE.

Dynamic NTK and LongRoPE take their frequencies from the largest position in a batch, so a short
session beside a long one would be computed wrongly. Each session therefore has a *RoPE length*, the
length that its frequencies are computed for, 0 for the usual ones. A pass never mixes RoPE lengths,
and states of one are dropped when a session gets another. If all positions of a pass are below its
RoPE length, it also runs *RoPE padding*: one token in a scratch slot, at the last position of that
length.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

import torch

from cascade.engine.batch import Segment, partition
from cascade.engine.kv_pool import MIN_RANGE, KVPool, LayeredKVPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

Pool = TypeVar("Pool", bound=KVPool)


class PathUnsupported(Exception):
    """This path cannot serve the model; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeLengths:
    """Which sequence lengths share their RoPE frequencies."""

    original: int = 0  # tokens up to which the usual frequencies hold; 0 for always
    dynamic: bool = False  # beyond them, every length has its own

    def of(self, length: int) -> int:
        """Return the RoPE length of a session of `length` tokens."""
        if not self.original or length <= self.original:
            return 0
        return length if self.dynamic else self.original + 1


def find_rope_lengths(model: torch.nn.Module) -> RopeLengths:
    """Return the RoPE lengths of `model`, read from its rotary modules."""
    for module in model.modules():
        types: Any = getattr(module, "rope_type", "")
        names = set(types.values()) if isinstance(types, dict) else {types}
        dynamic = any("dynamic" in str(name) for name in names)
        if dynamic or "longrope" in names:
            return RopeLengths(original=_original_length(module), dynamic=dynamic)
    return RopeLengths()


def _original_length(module: Any) -> int:
    parameters: Any = getattr(module.config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    for candidate in (parameters, *nested):
        if "original_max_position_embeddings" in candidate:
            return int(candidate["original_max_position_embeddings"])
    return int(module.original_max_seq_len)


def _reset_rope(model: torch.nn.Module) -> None:
    """Make dynamic RoPE modules recompute their frequencies in the next pass."""
    for module in model.modules():
        for name in [name for name in vars(module) if name.endswith("max_seq_len_cached")]:
            setattr(module, name, 0)


class Runner(ABC, Generic[Pool]):
    """A model with a pool of KV slots, which `resize` allocates.

    Raises:
        PathUnsupported: This path cannot serve the model.
    """

    isolate_long: ClassVar[bool] = False  # see `partition`
    pool: Pool

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        self.rope_lengths = find_rope_lengths(model)
        self._scratch = 0  # first slot that no session has

    @abstractmethod
    def make_pool(self, *, num_slots: int) -> Pool:
        """Return an empty pool."""

    @abstractmethod
    def free_hf_weights(self) -> None:
        """Free the weights of the model that this runner does not need."""

    @abstractmethod
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order."""

    def resize(self, *, num_slots: int) -> None:
        """Replace the pool by an empty one of `num_slots` slots and some scratch slots."""
        self.pool = self.make_pool(num_slots=num_slots + MIN_RANGE)
        self._scratch = num_slots

    def warm_up(self) -> None:
        """Run one token, so that the pool takes its memory now."""
        with torch.inference_mode():
            self.forward([Segment(start=self._scratch, past=0, tokens=(0,))])

    def split(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Return the indices of segments that run together, pass by pass."""
        return partition(segments, isolate_long=self.isolate_long)

    def _with_rope_padding(self, segments: Sequence[Segment]) -> list[Segment]:
        rope_length = segments[0].rope_length
        if self.rope_lengths.dynamic:
            _reset_rope(self.model)
        if all(segment.length < rope_length for segment in segments):
            padding = Segment(
                start=self._scratch, past=0, tokens=(0,), first_position=rope_length - 1
            )
            return [*segments, padding]
        return list(segments)


class ModelRunner(Runner[LayeredKVPool]):
    """A runner that calls the model's own forward pass."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters

    def make_pool(self, *, num_slots: int) -> LayeredKVPool:
        """Return an empty pool."""
        return LayeredKVPool(num_slots=num_slots)

    def free_hf_weights(self) -> None:
        """Free nothing: the model itself runs."""
