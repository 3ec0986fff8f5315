"""The `flat` path: all tokens of a pass in one variable-length batch without padding.

The model runs with our attention function. It is registered with transformers under a name that has
no mask function, so that models build no mask.
"""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import torch
from transformers import AttentionInterface

from cascade.engine import varlen_attn
from cascade.engine.attention import AttentionParams, attend_groups
from cascade.engine.backends import mask_probe
from cascade.engine.backends.base import ModelRunner
from cascade.engine.batch import RaggedBatch, Segment
from cascade.engine.flashinfer_attn import FlashInferAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor, AttentionParams], Tensor]

_VARLEN = "cascade_varlen"


class AttentionBatch(varlen_attn.Batch, Protocol):
    """A batch as attention sees it."""

    @property
    def slots_T(self) -> Tensor:  # noqa: N802 - ends in its shape
        """The KV slot of each token."""
        ...


class VarlenRunner(ModelRunner):
    """The model's forward pass with our attention, which reads each session's states in place.

    Raises:
        PathUnsupported: The model's attention cannot be replaced.
    """

    def __init__(self, model: PreTrainedModel, *, deterministic: bool = False) -> None:
        super().__init__(model)
        self.windows = mask_probe.windows(model)
        self.deterministic = deterministic
        self.flashinfer = FlashInferAttention(enabled=not deterministic)
        model.set_attn_implementation(_VARLEN)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' states; return the requested logits `[N, V]`, in segment order."""
        return self._run_batch(self._batch(self._with_rope_padding(segments)))

    def decode(self, segments: Sequence[Segment], ids_N: Tensor) -> Tensor:
        """Run one token of each session, without reading it; return the logits `[N, V]`."""
        batch = self._batch(segments)
        batch.ids_T = ids_N
        return self._run_batch(batch)

    def _batch(self, segments: Sequence[Segment]) -> RaggedBatch:
        return RaggedBatch(
            segments,
            device=self.device,
            num_slots=self.pool.num_slots,
            deterministic=self.deterministic,
        )

    def _run_batch(self, batch: RaggedBatch) -> Tensor:
        indices_N = batch.logit_indices()
        # Some models cannot slice to nothing.
        kept = indices_N if len(indices_N) else torch.zeros_like(batch.ids_T[:1])
        with self.running(batch, partial(attend_groups, batch)):
            logits: Tensor = self.model(
                input_ids=batch.ids_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                **({"logits_to_keep": kept} if self._slices_logits else {}),
            ).logits[0]
        return logits[: len(indices_N)] if self._slices_logits else logits[indices_N]

    @contextmanager
    def running(self, batch: AttentionBatch, attend: Attend) -> Generator[None]:
        """Let attention on this thread work on a batch, by `varlen_attn` or by `attend`."""
        token = _current.set((self, batch, attend))
        try:
            yield
        finally:
            _current.reset(token)


_current: ContextVar[tuple[VarlenRunner, AttentionBatch, Attend] | None] = ContextVar(
    "current", default=None
)


def _attention(  # noqa: PLR0913 - the signature is transformers'
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Return attention `[1, T, H, D]` of every token to its own session.

    Shapes are `[1, H, T, D]` for the query, `[1, J, T, D]` for key and value, and `[H]` for the
    sinks `s_aux`.
    """
    current = _current.get()
    assert current is not None, "an engine runs this model; use another copy"
    assert attention_mask is None, "masks follow from the batch"
    runner, batch, attend = current
    assert query.shape[2] == len(batch.slots_T), "every token of the pass has a query"
    layer: Any = module.layer_idx
    params = AttentionParams(
        scale=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=runner.windows[layer],
        softcap=softcap,
        sinks_H=s_aux,
    )
    states = runner.pool.write(layer, key_HTD=key[0], value_HTD=value[0], slots_T=batch.slots_T)
    query_THD = query[0].transpose(0, 1)
    if varlen_attn.supported(batch, query_THD, states[1], params):
        exact = runner.deterministic
        attend = partial(varlen_attn.attend, batch.extents, deterministic=exact)
    elif isinstance(batch, RaggedBatch) and runner.flashinfer.supports(
        query_THD, states[1], params
    ):
        attend = partial(runner.flashinfer.attend, batch)
    return attend(query_THD, *states, params)[None], None


AttentionInterface.register(_VARLEN, _attention)
