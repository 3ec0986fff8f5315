"""A generator whose answers are measured, logged and traced, however they end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.errors import CascadeError
from cascade.observability.tracing import RequestSpan
from cascade.types import Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from cascade.types import Generator, OutputChunk, Request, TokenLogprob

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
    reasons: dict[str, int] = field(default_factory=dict)  # rounds by what decided their length

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
            reason = chunk.statistics.draft_length_reason
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

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


class Observer:
    """Is called for every answer, on the event loop, so it must not block. Does nothing itself."""

    def begin(self, record: RequestRecord) -> None:
        """An answer begins."""

    def progress(self, record: RequestRecord) -> None:
        """The record has grown by a chunk."""

    def end(self, record: RequestRecord) -> None:
        """The answer has ended; its statistics are complete."""


class ObservedGenerator:
    """Passes on another generator's answers and tells observers of them."""

    def __init__(
        self,
        generator: Generator,
        *,
        observers: Sequence[Observer],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._generator = generator
        self._observers = observers
        self._clock = clock

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield the chunks of one answer; raises what the generator raises."""
        record = RequestRecord(request=request, began_s=self._clock())
        span = RequestSpan(request)
        for observer in self._observers:
            observer.begin(record)
        chunks = self._generator.generate(request)
        try:
            while (chunk := await span.run(anext(chunks, None))) is not None:
                record.add(chunk, now_s=self._clock())
                for observer in self._observers:
                    observer.progress(record)
                span.record_round(record)
                yield chunk
        except BaseException as error:
            record.fail(error)
            raise
        finally:
            await span.run(chunks.aclose())
            span.end(record)
            for observer in self._observers:
                observer.end(record)

    async def score(self, tokens: Sequence[int], *, top: int) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token but the first."""
        return await self._generator.score(tokens, top=top)
