"""What observers know of one answer while it is generated."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.errors import CascadeError
from cascade.types import Statistics

if TYPE_CHECKING:
    from cascade.types import OutputChunk, Request

CLOSED = "closed"  # by the API: a stop string, or a client that disconnected


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRecord:
    """One answer as observers see it; grows chunk by chunk. Times are seconds of one clock."""

    request: Request
    began_s: float
    first_s: float | None = None  # when the first token came
    last_s: float = 0.0  # when the last chunk came
    tokens: int = 0
    finish: str = CLOSED
    error: BaseException | None = None
    statistics: Statistics = field(default_factory=Statistics)

    def add(self, chunk: OutputChunk, *, now_s: float) -> None:
        """Add a chunk; its statistics object goes on growing."""
        self.last_s = now_s
        if self.first_s is None and chunk.tokens:
            self.first_s = now_s
        self.tokens += len(chunk.tokens)
        if chunk.finish is not None:
            self.finish = chunk.finish
        if chunk.statistics is not None:
            self.statistics = chunk.statistics

    def fail(self, error: BaseException) -> None:
        """Record what ended the answer early."""
        if not isinstance(error, GeneratorExit | asyncio.CancelledError):
            self.error = error
            self.finish = error.grpc.lower() if isinstance(error, CascadeError) else "internal"

    @property
    def rule(self) -> str:
        """Return the rule's name."""
        return self.request.policy.rule.kind

    @property
    def drafts(self) -> int:
        """Return the number of drafts that were not empty."""
        return sum(self.statistics.accepted_lengths)

    def accepted_at(self) -> list[int]:
        """Return for each position in a block how many blocks had their token there accepted."""
        counts = self.statistics.accepted_lengths
        return [sum(counts[position + 1 :]) for position in range(len(counts) - 1)]
