"""The `padded` path: ragged sessions as a left-padded batch for the model's own attention.

It is the fallback for models whose attention cannot be replaced. Sessions are aligned on the right,
so the distance between a query and a key column is the true one: causal, sliding and chunked masks
and ALiBi come out right for any model.

Shapes: `B` sessions, `Q` new and `K` cached and new columns of the longest, `J` heads, `D` head
size, `R` slots of the pool.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from cascade.engine.backends.base import ModelRunner, PathUnsupported

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.batch import Segment
    from cascade.engine.kv_pool import LayeredKVPool


_CACHE_ARGUMENTS = ("past_key_values", "cache")  # until transformers 5.23, and since 5.24


class PaddedRunner(ModelRunner):
    """The model's own attention over columns gathered from the pool.

    Args:
        model: The model.
        alone: Run one session at a time. Some models (Llama 4 in layers without RoPE) take a
            token's position from its column, which is right only without padding.

    Raises:
        PathUnsupported: The model takes no cache.
    """

    isolate_long = True

    def __init__(self, model: PreTrainedModel, *, alone: bool = False) -> None:
        super().__init__(model)
        self._alone = alone
        parameters = inspect.signature(model.forward).parameters
        names = [name for name in _CACHE_ARGUMENTS if name in parameters]
        if not names:
            raise PathUnsupported("its forward pass takes no cache")
        self._cache_argument = names[0]
        self._takes_positions = "position_ids" in parameters
        config: Any = model.config.get_text_config(decoder=True)
        self._layers = int(config.num_hidden_layers)

    def split(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Return the indices of segments that run together, pass by pass."""
        return [[i] for i in range(len(segments))] if self._alone else super().split(segments)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order."""
        batch = PaddedBatch(self._with_rope_padding(segments), device=self.device)
        cache = padded_cache(batch, pool=self.pool, layers=self._layers)
        extra: dict[str, Any] = {self._cache_argument: cache}
        if self._takes_positions:
            extra["position_ids"] = batch.positions_BQ
        kept = batch.queries
        if self._slices_logits:
            kept = max(1, *(segment.num_logits for segment in segments))
            extra["logits_to_keep"] = torch.arange(
                batch.queries - kept, batch.queries, device=self.device
            )
        logits_BQV: Tensor = self.model(
            input_ids=batch.ids_BQ,
            attention_mask=batch.mask_BK,
            use_cache=True,
            **extra,
        ).logits
        return logits_BQV.flatten(0, 1)[batch.logit_indices(kept)]


class PaddedBatch:
    """Segments as sequences of equal length, and the slots of their columns."""

    def __init__(self, segments: Sequence[Segment], *, device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self.queries = max(segment.count for segment in segments)
        self.past = max(segment.length for segment in segments) - self.queries
        self.keys = self.past + self.queries
        self.ids_BQ = self._tensor([_pad(s.tokens, self.queries) for s in segments])
        self.positions_BQ = self._tensor([_pad(s.positions, self.queries) for s in segments])
        self.mask_BK = self._tensor([_pad([1] * s.length, self.keys) for s in segments])
        columns = [_pad(range(s.start, s.start + s.length), self.keys) for s in segments]
        self.columns_BK = self._tensor(columns).view(-1)
        self.slots_T = self._tensor([slot for s in segments for slot in s.new_slots])
        self.valid_T = self._last([s.count for s in segments], self.queries)

    def logit_indices(self, kept: int) -> Tensor:
        """Return `[N]`, where in `[B * kept]` the requested logits of the last columns are."""
        return self._last([segment.num_logits for segment in self.segments], kept)

    def _last(self, counts: Sequence[int], width: int) -> Tensor:
        """Return the indices of each session's last columns in a flat `[B * width]`."""
        ends = range(width, width * (len(counts) + 1), width)
        pairs = zip(ends, counts, strict=True)
        return self._tensor([i for end, count in pairs for i in range(end - count, end)])

    def _tensor(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _pad(values: Sequence[int], width: int) -> list[int]:
    return [0] * (width - len(values)) + list(values)


def padded_cache(batch: PaddedBatch, *, pool: LayeredKVPool, layers: int) -> Cache:
    """Return a transformers cache of a batch over a pool, for one forward pass.

    Args:
        batch: The sessions.
        pool: Their states.
        layers: How many layers the model has.
    """
    return Cache(layers=[_PaddedLayer(batch=batch, pool=pool, layer=i) for i in range(layers)])


class _PaddedLayer(CacheLayerMixin):
    """One layer of a transformers cache over the pool, for one forward pass."""

    is_sliding = False
    is_compileable = False

    def __init__(self, *, batch: PaddedBatch, pool: LayeredKVPool, layer: int) -> None:
        super().__init__()
        self._batch = batch
        self._pool = pool
        self._layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the pool allocates its own storage."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new `[B, J, Q, D]` states and return all of them, `[B, J, K, D]`."""
        keys, values = self._pool.write(
            self._layer,
            key_HTD=self._without_padding(key_states),
            value_HTD=self._without_padding(value_states),
            slots_T=self._batch.slots_T,
        )
        return self._gather(keys), self._gather(values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of key columns and the first one's offset."""
        return self._batch.past + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of cached columns."""
        return self._batch.past

    def get_max_length(self) -> int:
        """Return -1: there is no limit."""
        return -1

    def _without_padding(self, states_BJQD: Tensor) -> Tensor:
        flat = states_BJQD.transpose(0, 1).flatten(1, 2)
        return flat.index_select(1, self._batch.valid_T)

    def _gather(self, states_JRD: Tensor) -> Tensor:
        columns = states_JRD.index_select(1, self._batch.columns_BK)
        shape = (len(self._batch.segments), self._batch.keys)
        # Models call `view` on what a cache returns, so it must be contiguous.
        return columns.unflatten(1, shape).transpose(0, 1).contiguous()
