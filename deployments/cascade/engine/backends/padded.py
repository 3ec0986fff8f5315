"""The fallback path's cache: ragged sessions as left-padded rows for a model's own attention.

Sessions are aligned on the right, so the distance between any query and key column is the true
one: causal, sliding and chunked masks and ALiBi come out right without knowing the model.
Shapes: `B` sessions, `Q` new and `K` cached and new columns of the longest, `J` heads, `D` head
size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.batch import Segment
    from cascade.engine.kv_pool import KVPool


class PaddedBatch:
    """Segments as rows of equal length, and where their columns lie in the pool."""

    def __init__(self, segments: Sequence[Segment], *, device: torch.device) -> None:
        self.segments = segments
        self.device = device
        self.queries = max(segment.count for segment in segments)
        self.past = max(segment.length for segment in segments) - self.queries
        self.keys = self.past + self.queries
        self.ids_BQ = self._rows([self._left(s.tokens, self.queries) for s in segments])
        self.positions_BQ = self._rows([self._left(s.positions, self.queries) for s in segments])
        self.mask_BK = self._rows([self._left([1] * s.length, self.keys) for s in segments])
        columns = [self._left(range(s.start, s.start + s.length), self.keys) for s in segments]
        self.columns_BK = self._rows(columns).view(-1)
        self.rows_T = self._rows([row for s in segments for row in s.new_rows])
        self.valid_T = self._rows(self._valid())

    def wanted(self) -> Tensor:
        """Return `[N]`, the places in `[B * Q]` of the tokens whose logits are wanted."""
        return self._rows(
            [
                (place + 1) * self.queries - segment.rows + row
                for place, segment in enumerate(self.segments)
                for row in range(segment.rows)
            ]
        )

    def _valid(self) -> list[int]:
        ends = ((place + 1) * self.queries for place in range(len(self.segments)))
        pairs = zip(ends, self.segments, strict=True)
        return [i for end, segment in pairs for i in range(end - segment.count, end)]

    @staticmethod
    def _left(values: Sequence[int], width: int) -> list[int]:
        return [0] * (width - len(values)) + list(values)

    def _rows(self, values: list[Any]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


class _PaddedLayer(CacheLayerMixin):
    is_sliding = False
    is_compileable = False

    def __init__(self, *, batch: PaddedBatch, pool: KVPool, layer: int) -> None:
        super().__init__()
        self._batch = batch
        self._pool = pool
        self._layer = layer
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Do nothing: the pool shapes itself."""

    def update(
        self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
    ) -> tuple[Tensor, Tensor]:
        """Store the new `[B, J, Q, D]` states and return all of them, `[B, J, K, D]`."""
        keys, values = self._pool.write(
            self._layer,
            key_HTD=self._flat(key_states),
            value_HTD=self._flat(value_states),
            rows_T=self._batch.rows_T,
        )
        return self._gathered(keys), self._gathered(values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of key columns and the first one's offset."""
        return self._batch.past + query_length, 0

    def get_seq_length(self) -> int:
        """Return the number of cached columns."""
        return self._batch.past

    def get_max_length(self) -> int:
        """Return -1: there is no bound."""
        return -1

    def get_max_cache_shape(self) -> int:
        """Return -1: there is no bound."""
        return -1

    def _flat(self, states_BJQD: Tensor) -> Tensor:
        flat = states_BJQD.transpose(0, 1).flatten(1, 2)
        return flat.index_select(1, self._batch.valid_T)

    def _gathered(self, states_JRD: Tensor) -> Tensor:
        columns = states_JRD.index_select(1, self._batch.columns_BK)
        shape = (len(self._batch.segments), self._batch.keys)
        # Models view what a cache returns, which must then be laid out as if it were new.
        return columns.unflatten(1, shape).transpose(0, 1).contiguous()


class PaddedCache(Cache):
    """A transformers cache over the pool, for one forward pass."""

    def __init__(self, batch: PaddedBatch, *, pool: KVPool, layers: int) -> None:
        super().__init__(
            layers=[_PaddedLayer(batch=batch, pool=pool, layer=i) for i in range(layers)]
        )
