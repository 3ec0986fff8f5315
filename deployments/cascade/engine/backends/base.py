"""One forward pass over segments of many sessions: the flat path and the padded one.

The lean one and the captured one have files of their own.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Protocol

import torch

from cascade.engine import rope
from cascade.engine.backends import mask_probe
from cascade.engine.backends.padded import PaddedBatch, PaddedCache
from cascade.engine.batch import Segment, partition
from cascade.engine.kv_allocator import SMALLEST
from cascade.engine.kv_pool import KVPool

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.kv_pool import Pool


class Runner(Protocol):
    """A model with a pool of rows."""

    regimes: rope.RopeLengths

    @property
    def pool(self) -> Pool:
        """Return the keys and values."""
        ...

    def resize(self, *, rows: int) -> None:
        """Replace the pool by an empty one of `rows` rows, and some scratch."""
        ...

    def warm(self) -> None:
        """Run one token, so that the pool takes its memory now."""
        ...

    def free_hf_weights(self) -> None:
        """Free what the model has and this runner does not need; nothing else may use it then."""
        ...

    def split(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Return the places of segments that run together, pass by pass."""
        ...

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' rows and return the wanted logits `[N, V]`, in segment order."""
        ...


class BaseRunner(ABC):
    """What all paths share."""

    by_size = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.device = model.device
        self.regimes = rope.find(model)
        self._scratch = 0

    @abstractmethod
    def resize(self, *, rows: int) -> None:
        """Replace the pool by an empty one of `rows` rows, and some scratch."""

    @abstractmethod
    def free_hf_weights(self) -> None:
        """Free what the model has and this runner does not need."""

    def warm(self) -> None:
        """Run one token, so that the pool takes its memory now."""
        with torch.inference_mode():
            self.forward([Segment(start=self._scratch, past=0, tokens=(0,))])

    @abstractmethod
    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' rows and return the wanted logits `[N, V]`, in segment order."""

    def split(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Return the places of segments that run together, pass by pass."""
        return list(partition(segments, by_size=self.by_size))

    def _with_rope_padding(self, segments: Sequence[Segment]) -> list[Segment]:
        regime = segments[0].regime
        if self.regimes.dynamic:
            rope.forget(self.model)
        if all(segment.length < regime for segment in segments):
            ballast = Segment(
                start=self._scratch, past=0, tokens=(0,), regime=regime, place=regime - 1
            )
            return [*segments, ballast]
        return list(segments)


class ModelRunner(BaseRunner):
    """A runner that calls the model itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._pool = KVPool(rows=0)

    @property
    def pool(self) -> KVPool:
        """Return the keys and values."""
        return self._pool

    def resize(self, *, rows: int) -> None:
        """Replace the pool by an empty one of `rows` rows, and some scratch."""
        self._pool = KVPool(rows=rows + SMALLEST)
        self._scratch = rows

    def free_hf_weights(self) -> None:
        """Free nothing: the model itself runs."""


class PaddedRunner(ModelRunner):
    """Left-padded rows and the model's own attention, over columns gathered from the pool."""

    by_size = True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__(model)
        parameters = inspect.signature(model.forward).parameters
        if "past_key_values" not in parameters:
            raise mask_probe.Unsuited("its forward pass takes no past_key_values")
        self._takes_positions = "position_ids" in parameters
        config: Any = model.config.get_text_config(decoder=True)
        self._layers = int(config.num_hidden_layers)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' rows and return the wanted logits `[N, V]`, in segment order."""
        batch = PaddedBatch(self._with_rope_padding(segments), device=self.device)
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["position_ids"] = batch.positions_BQ
        kept = batch.queries
        if self._slices_logits:
            kept = max(1, *(segment.rows for segment in segments))
            extra["logits_to_keep"] = torch.arange(
                batch.queries - kept, batch.queries, device=self.device
            )
        logits_BQV: Tensor = self.model(
            input_ids=batch.ids_BQ,
            attention_mask=batch.mask_BK,
            past_key_values=PaddedCache(batch, pool=self.pool, layers=self._layers),
            use_cache=True,
            **extra,
        ).logits
        return logits_BQV.flatten(0, 1)[self._kept(batch, kept)]

    @staticmethod
    def _kept(batch: PaddedBatch, kept: int) -> Tensor:
        places_N = batch.wanted()
        rows_N = places_N // batch.queries
        return places_N - (rows_N + 1) * (batch.queries - kept)
