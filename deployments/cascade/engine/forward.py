"""Passes that follow each other on the device, and the check of what passes yield."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor

from cascade.engine.backends.base import RopeLengths
from cascade.engine.batch import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.engine.backends.base import Runner
    from cascade.engine.kv_cache import CachedSequence

# Returns tokens `[N]`, given the logits `[N, V]` of a pass and its number; None: none runs on.
Draw: TypeAlias = Callable[[Tensor, int], Tensor | None]

# Logits up to here leave room in a float32 for every bias, penalty and temperature that is allowed.
_LARGEST_LOGIT = 1e30


def invalid_rows(logits_NV: Tensor) -> list[bool] | None:
    """Return which rows have no largest logit to choose or sample from; None if all have one."""
    peaks: list[float] = logits_NV.amax(dim=1).tolist() if len(logits_NV) else []
    # A comparison with NaN is false.
    invalid = [not -_LARGEST_LOGIT <= peak <= _LARGEST_LOGIT for peak in peaks]
    return invalid if any(invalid) else None


def decode_ahead(  # noqa: PLR0913 - what a pass needs, and when to end
    runner: Runner[Any],
    sequences: Sequence[CachedSequence],
    ids_N: Tensor,
    draw: Draw,
    *,
    columns: int,
    passes: int,
    go_on: Callable[[], bool],
    source_slots: Callable[[CachedSequence], range | None],
) -> tuple[list[Tensor], list[list[int]]]:
    """Run passes of one token per sequence, and read what they yield after the last.

    Args:
        runner: The model.
        sequences: All their tokens are cached; they get those that run, unless logits are invalid.
        ids_N: The token of each that runs first, on the device.
        draw: Returns the tokens that run next, or None to end.
        columns: Logits that are kept of each token, V.
        passes: How many, at most; fewer where a sequence has no slot for more.
        go_on: Whether another pass may run.
        source_slots: Where the encoded source of a sequence is, if it has one.

    Returns:
        The logits and the N tokens of each pass that has run, maybe none.
    """
    segments: list[Segment] = []
    for sequence in sequences:
        kv_range = sequence.kv_range
        if kv_range is None or runner.rope_lengths != RopeLengths():
            return [], []
        past = len(sequence.tokens)
        assert sequence.cached == past, "the logits of its last token were delivered"
        passes = min(passes, kv_range.size - past)
        segments.append(
            Segment(
                start=kv_range.start,
                past=past,
                tokens=(0,),
                num_logits=1,
                source=source_slots(sequence),
            )
        )
    logits: list[Tensor] = []
    ids: list[Tensor] = []
    while len(logits) < passes and go_on():
        if logits:
            drawn_N = draw(logits[-1], len(logits) - 1)
            if drawn_N is None:
                break
            ids_N = drawn_N
        logits.append(runner.decode(segments, ids_N)[:, :columns])
        ids.append(ids_N)
        segments = [replace(one, past=one.past + 1) for one in segments]
    if not logits or invalid_rows(torch.cat(logits)):
        return [], []
    tokens: list[list[int]] = torch.stack(ids).tolist()
    for sequence, own in zip(sequences, zip(*tokens, strict=True), strict=True):
        sequence.tokens += own
        sequence.cached = len(sequence.tokens)
    return logits, tokens
