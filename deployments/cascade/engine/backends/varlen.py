"""One forward pass over segments of many sessions: the flat path and the padded one.

The lean one and the captured one have files of their own.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from cascade.engine.attention import FLAT, Pass, grouped, running
from cascade.engine.backends import mask_probe
from cascade.engine.backends.base import ModelRunner
from cascade.engine.batch import RaggedBatch, Segment

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor
    from transformers import PreTrainedModel

    from cascade.engine.attention import Batch, Form


class VarlenRunner(ModelRunner):
    """Tokens of all sessions in one row; attention reads each session's rows where they are.

    Raises:
        Unsuited: if the model's attention is not ours to replace.
    """

    def __init__(self, model: PreTrainedModel, *, deterministic: bool = False) -> None:
        super().__init__(model)
        self._windows = mask_probe.windows(model)
        self._deterministic = deterministic
        model.set_attn_implementation(FLAT)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Store the segments' rows and return the wanted logits `[N, V]`, in segment order."""
        segments = self._with_rope_padding(segments)
        batch = RaggedBatch(
            segments,
            device=self.device,
            rows=self.pool.rows,
            deterministic=self._deterministic,
        )
        wanted_N = batch.wanted()
        # Some models cannot slice to nothing.
        kept = wanted_N if len(wanted_N) else torch.zeros_like(batch.ids_T[:1])
        narrowed = {"logits_to_keep": kept} if self._slices_logits else {}
        current = self._reading(batch, partial(grouped, batch))
        with running(current):
            logits: Tensor = self.model(
                input_ids=batch.ids_T[None],
                position_ids=batch.positions_T[None],
                use_cache=False,
                **narrowed,
            ).logits[0]
        if not self._slices_logits:
            return logits[wanted_N]
        return logits[: len(wanted_N)]

    def _reading(
        self, batch: Batch, attend: Callable[[Tensor, Tensor, Tensor, Form], Tensor]
    ) -> Pass:
        """Return a pass over this runner's pool."""
        return Pass(
            batch=batch,
            attend=attend,
            pool=self.pool,
            windows=self._windows,
            deterministic=self._deterministic,
        )
