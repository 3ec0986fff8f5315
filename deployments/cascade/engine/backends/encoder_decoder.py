"""The `padded` path of encoder-decoders: each source is encoded once, and read by every pass.

The encoder reads a whole source alone. The decoder's cross-attention reads keys and values of the
source, which do not change: the decoder makes them in one pass of one token, and they stay in slots
of a pool of their own. From then on the decoder runs like any padded batch, over those columns and
its own.

Shapes: as in `padded`; also `S` tokens of the longest source.
"""

from __future__ import annotations

import inspect
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from cascade.engine.backends.base import PathUnsupported, RopeLengths, Runner
from cascade.engine.backends.padded import PaddedBatch, padded_cache
from cascade.engine.batch import Segment
from cascade.engine.kv_pool import MIN_RANGE, LayeredKVPool

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

_PAST = "past_key_values_length"  # of modules that embed positions


class EncoderDecoderRunner(Runner[LayeredKVPool]):
    """The model's own attention over columns gathered from two pools.

    Args:
        model: The model.
        alone: Run one session at a time, for models that take a token's position from its column.

    Raises:
        PathUnsupported: The model does not take what this path gives it.
    """

    isolate_long: ClassVar[bool] = True

    def __init__(self, model: PreTrainedModel, *, alone: bool = False) -> None:
        super().__init__(model)
        if self.rope_lengths != RopeLengths():
            raise PathUnsupported("its RoPE frequencies depend on lengths")
        self._alone = alone
        self._encoder: Any = model.get_encoder()
        self._head: Any = model.get_output_embeddings()
        parameters = inspect.signature(model.forward).parameters
        self._takes_positions = "decoder_position_ids" in parameters
        decoder: Any = model.get_decoder()
        self._position_modules: list[Any] = [
            module
            for module in decoder.modules()
            if _PAST in inspect.signature(module.forward).parameters
        ]
        self.source_pool = LayeredKVPool(num_slots=0)
        self._source_scratch = range(0)  # slots that no session has
        self._output: tuple[type[Any], int] = BaseModelOutput, 0  # the encoder's, and its width
        self._gathered: tuple[tuple[range, ...], Cache] = ((), Cache(layers=[]))

    def make_pool(self, *, num_slots: int) -> LayeredKVPool:
        """Return an empty pool."""
        return LayeredKVPool(num_slots=num_slots)

    def resize(self, *, num_slots: int, source_slots: int = MIN_RANGE) -> None:
        """Replace both pools by empty ones.

        Args:
            num_slots: Tokens of all answers.
            source_slots: Tokens of all sources.
        """
        super().resize(num_slots=num_slots)
        self.source_pool = LayeredKVPool(num_slots=source_slots + MIN_RANGE)
        self._source_scratch = range(source_slots, source_slots + 1)
        self._gathered = ((), Cache(layers=[]))

    def warm_up(self) -> None:
        """Encode a token and run one, so that the pools take their memory now."""
        with torch.inference_mode():
            self.encode((0,), slots=self._source_scratch)
            self.forward([Segment(start=self._scratch, past=0, tokens=(0,))])

    def split(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Return the indices of segments that run together, pass by pass."""
        return [[i] for i in range(len(segments))] if self._alone else super().split(segments)

    def encode(self, tokens: Sequence[int], *, slots: range) -> None:
        """Run the encoder over a source, and store what cross-attention reads of it.

        Args:
            tokens: The source.
            slots: Where, in the pool of sources; one slot for each token.
        """
        ids_1S = torch.tensor([list(tokens)], device=self.device)
        states = self._encoder(input_ids=ids_1S, attention_mask=torch.ones_like(ids_1S))
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        self.model(
            decoder_input_ids=ids_1S.new_zeros((1, 1)),
            attention_mask=torch.ones_like(ids_1S),
            encoder_outputs=states,
            past_key_values=cache,
            use_cache=True,
        )
        layers: Any = cache.cross_attention_cache.layers
        if not layers or any(layer.keys.shape[2] != len(tokens) for layer in layers):
            raise PathUnsupported("its cross-attention does not keep the states of its source")
        self._output = type(states), states.last_hidden_state.shape[-1]
        slots_S = torch.arange(slots.start, slots.start + len(tokens), device=self.device)
        for index, layer in enumerate(layers):
            self.source_pool.write(
                index, key_HTD=layer.keys[0], value_HTD=layer.values[0], slots_T=slots_S
            )
        if any(slots.start < kept.stop and kept.start < slots.stop for kept in self._gathered[0]):
            self._gathered = ((), Cache(layers=[]))

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order."""
        sources = [segment.source or self._source_scratch for segment in segments]
        batch = PaddedBatch(segments, device=self.device)
        longest = max(map(len, sources))
        mask_BS = torch.tensor(
            [[1] * len(one) + [0] * (longest - len(one)) for one in sources], device=self.device
        )
        cross = self._cross_attention(tuple(sources))
        own = padded_cache(batch, pool=self.pool, layers=self.source_pool.num_layers)
        extra: dict[str, Any] = {}
        if self._takes_positions:
            extra["decoder_position_ids"] = batch.positions_BQ
        kept = max(1, *(segment.num_logits for segment in segments))
        # Nothing is projected from them: cross-attention takes what is cached.
        output, width = self._output
        unread = torch.zeros((1, 1, 1), dtype=self.model.dtype, device=self.device)
        with self._running(batch, kept=kept):
            logits_BQV: Tensor = self.model(
                decoder_input_ids=batch.ids_BQ,
                decoder_attention_mask=batch.mask_BK,
                attention_mask=mask_BS,
                encoder_outputs=output(
                    last_hidden_state=unread.expand(len(sources), longest, width)
                ),
                past_key_values=EncoderDecoderCache(own, cross),
                use_cache=True,
                **extra,
            ).logits
        return logits_BQV.flatten(0, 1)[batch.logit_indices(kept)]

    def _cross_attention(self, sources: tuple[range, ...]) -> Cache:
        """Return the states of sources as a batch, padded on the right.

        They are kept for the next pass: a drafter runs several with the same sessions.
        """
        if self._gathered[0] != sources:
            longest = max(map(len, sources))
            # Padding reads the session's own states, which are finite if it can be served at all.
            columns = [[*one, *[one.start] * (longest - len(one))] for one in sources]
            columns_BS = torch.tensor(columns, device=self.device).view(-1)
            first = sources[0]

            def gather(states_HRD: Tensor) -> Tensor:
                if len(sources) == 1:
                    return states_HRD[None, :, first.start : first.stop]
                columns = states_HRD.index_select(1, columns_BS)
                return columns.unflatten(1, (len(sources), longest)).transpose(0, 1).contiguous()

            layers: list[Any] = []
            for index in range(self.source_pool.num_layers):
                layer = DynamicLayer()
                layer.keys, layer.values = map(gather, self.source_pool.layer(index))
                layer.is_initialized = True
                layers.append(layer)
            self._gathered = sources, Cache(layers=layers)
        return self._gathered[1]

    @property
    def source_slots(self) -> int:
        """Return how many tokens of sources the pool holds."""
        return self._source_scratch.start

    @contextmanager
    def _running(self, batch: PaddedBatch, *, kept: int) -> Generator[None]:
        """Let the model compute what few of these models can be asked for.

        Args:
            batch: Its sessions, each of which has positions of its own.
            kept: Columns at the end whose logits are computed.
        """

        def last_columns(_: Any, given: tuple[Tensor, ...]) -> tuple[Tensor]:
            return (given[0][:, -kept:],)

        hooks: list[Any] = [self._head.register_forward_pre_hook(last_columns)]
        if any((s.past, s.count) != (batch.past, batch.queries) for s in batch.segments):
            positions = partial(_own_positions, batch)
            hooks += [
                module.register_forward_hook(positions, with_kwargs=True)
                for module in self._position_modules
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _own_positions(
    batch: PaddedBatch, module: Any, args: tuple[Any, ...], given: dict[str, Any], _: Tensor
) -> Tensor:
    """Return what a module embeds of positions, `[B, Q, D]`, session by session.

    Args:
        batch: The sessions.
        module: Takes the position of the first column, one for all.
        args: What the decoder gave it.
        given: The same by name.
    """
    forward = module.forward
    whole = inspect.signature(forward).bind(*args, **given).arguments
    rows: list[Tensor] = []
    for index, segment in enumerate(batch.segments):
        own = {
            name: value[index : index + 1, -segment.count :]
            if isinstance(value, torch.Tensor)
            else (1, segment.count)
            for name, value in whole.items()
            if name not in {_PAST, "position_ids"} and value is not None
        }
        embedded: Tensor = forward(**own, **{_PAST: segment.past})
        padding = batch.queries - segment.count
        row_QD = embedded.reshape(segment.count, -1)
        rows.append(torch.nn.functional.pad(row_QD, (0, 0, padding, 0)))
    return torch.stack(rows)
