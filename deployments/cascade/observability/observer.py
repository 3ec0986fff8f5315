"""A generator whose answers are measured, logged and traced, however they end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cascade.observability.request_record import RequestRecord
from cascade.observability.tracing import RequestSpan

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from cascade.types import Caller, Generator, OutputChunk, Request, TokenLogprob


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

    async def score(
        self, tokens: Sequence[int], *, top: int, caller: Caller | None = None
    ) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token but the first."""
        return await self._generator.score(tokens, top=top, caller=caller)
