"""What every way of running a model shares: pools, passes and length-dependent RoPE.

Dynamic NTK and LongRoPE take their frequencies from the largest position in a batch, so a token's
logits would depend on its neighbours in the batch and on the drafts after it. Here the logits of a
token are those of a plain forward pass over the tokens up to it. Each state and each row of logits
therefore has a *RoPE length*, the length that its frequencies are computed for, 0 for the usual
ones. A pass never mixes RoPE lengths; where a session's rows pass to another, its states are
computed again. (`generate` of Phi-3 does the same. Of other models it keeps states of the old
frequencies, unless it runs without a cache.) If all positions of a pass are below its RoPE length,
it also runs *RoPE padding*: one token in a scratch slot, at the last position of that length.
"""

from __future__ import annotations

import inspect
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar, cast

import torch

from cascade.engine.batch import Segment, partition
from cascade.engine.kv_pool import MIN_RANGE, KVPool, LayeredKVPool

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

Pool = TypeVar("Pool", bound=KVPool)


class PathUnsupported(Exception):
    """This path cannot serve the model; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeLengths:
    """Which sequence lengths share their RoPE frequencies."""

    switches: frozenset[int] = frozenset()  # longest lengths before other frequencies hold
    dynamic_beyond: int | None = None  # beyond it, every length has its own; None for never

    def of(self, length: int) -> int:
        """Return the RoPE length of the last of `length` tokens."""
        if self.dynamic_beyond is not None and length > self.dynamic_beyond:
            return length
        return max((last + 1 for last in self.switches if last < length), default=0)

    def runs(self, rows: range) -> Iterator[tuple[range, int]]:
        """Split the positions of tokens into runs that share their RoPE length; yield both."""
        ends = sorted(self.switches)
        while rows:
            length = rows.start + 1
            end = min((end for end in ends if end >= length), default=rows.stop)
            if self.dynamic_beyond is not None:
                end = min(end, max(length, self.dynamic_beyond))
            run = rows[: end - rows.start]
            yield run, self.of(length)
            rows = rows[len(run) :]


def find_rope_lengths(model: torch.nn.Module) -> RopeLengths:
    """Return the RoPE lengths of `model`, read from its rotary modules."""
    switches: set[int] = set()
    dynamic: list[int] = []
    modules: Any = model.modules()
    for module in modules:
        types = getattr(module, "rope_type", None)
        for layer_type, rope_type in types.items() if isinstance(types, dict) else [("", types)]:
            if "dynamic" in str(rope_type):
                dynamic.append(module.original_max_seq_len)
            elif rope_type == "longrope":
                parameters = module.config.rope_parameters
                parameters = parameters[layer_type] if layer_type else parameters
                switches.add(parameters["original_max_position_embeddings"])
    return RopeLengths(switches=frozenset(switches), dynamic_beyond=min(dynamic, default=None))


_ATTENTION = re.compile(r"window|chunk|block|top_?k|local_attention|floor_scale|max_distance")
_POSITION = re.compile(r"position|context|length|seq_len|floor")


@dataclass(frozen=True, slots=True, kw_only=True)
class Boundaries:
    """Lengths in tokens at which a model may change what it does, ascending."""

    attention: tuple[int, ...]  # windows and chunks
    position: tuple[int, ...]  # original RoPE lengths


def boundaries(config: PreTrainedConfig, *, below: float) -> Boundaries:
    """Return the lengths that a configuration names, in any part of it; a few name other things.

    Args:
        config: The model's.
        below: Leave out lengths from this on: no session exceeds them.
    """
    text: Any = config.get_text_config(decoder=True)
    named = [(name, value) for name, value in _numbers(text.to_dict()) if 1 < value < below]
    attention = {value for name, value in named if _ATTENTION.search(name)}
    position = {value for name, value in named if _POSITION.search(name)}
    return Boundaries(attention=tuple(sorted(attention)), position=tuple(sorted(position)))


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, int]]:
    """Yield the integers in a configuration, each with the name nearest to it."""
    match value:
        case dict():
            parts = cast("dict[Any, Any]", value).items()
            yield from chain.from_iterable(_numbers(part, str(key)) for key, part in parts)
        case list() | tuple():
            parts = cast("Sequence[Any]", value)
            yield from chain.from_iterable(_numbers(part, name) for part in parts)
        case int() if not isinstance(value, bool):
            yield name, value
        case _:
            pass


def reset_rope(model: torch.nn.Module) -> None:
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
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order."""

    def decode(self, segments: Sequence[Segment], ids_N: Tensor) -> Tensor:
        """Run one token of each session and return the logits `[N, V]`.

        Args:
            segments: Where the tokens are; not which.
            ids_N: The tokens, on the device. Runners for GPUs do not read them.
        """
        tokens = ids_N.tolist()
        return self.forward(
            [replace(one, tokens=(token,)) for one, token in zip(segments, tokens, strict=True)]
        )

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
        if self.rope_lengths.dynamic_beyond is not None:
            reset_rope(self.model)
        if all(segment.positions.stop < rope_length for segment in segments):
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
