"""A generator that is watched: every answer is measured, logged and traced, whatever its end."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cascade.errors import CascadeError
from cascade.observability.tracing import RequestSpan
from cascade.types import Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from cascade.types import Generator, OutputChunk, Request, TokenLogprob

CLOSED = "closed"  # by the door: a stop string, or a client that left


@dataclass(slots=True, kw_only=True, eq=False)
class RequestRecord:
    """Grows piece by piece; times are seconds of one clock."""

    request: Request
    began_s: float
    last_s: float = 0.0  # when the last piece came
    first_s: float | None = None  # when the first came
    tokens: int = 0
    finish: str = CLOSED
    error: BaseException | None = None
    statistics: Statistics = field(default_factory=Statistics)
    reasons: dict[str, int] = field(default_factory=dict)  # rounds by what decided their length

    def add(self, piece: OutputChunk, *, now_s: float) -> None:
        """Take in a piece; the statistics it has go on growing."""
        self.last_s = now_s
        if self.first_s is None and piece.tokens:
            self.first_s = now_s
        self.tokens += len(piece.tokens)
        if piece.finish is not None:
            self.finish = piece.finish
        if piece.statistics is not None:
            self.statistics = piece.statistics
            reason = piece.statistics.draft_length_reason
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def fail(self, error: BaseException) -> None:
        """Take in what ended the answer early."""
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            return
        self.error = error
        self.finish = error.grpc.lower() if isinstance(error, CascadeError) else "internal"

    @property
    def rule(self) -> str:
        """Return the rule's name."""
        return self.request.policy.rule.kind

    @property
    def drafts(self) -> int:
        """Return the number of blocks that had tokens."""
        return sum(self.statistics.accepted_lengths)

    def accepted_at(self) -> list[int]:
        """Return for each place in a block how many blocks' token there was accepted."""
        counts = self.statistics.accepted_lengths
        return [sum(counts[place + 1 :]) for place in range(len(counts) - 1)]


class Observer(Protocol):
    """Hears of answers; called on the event loop, so it must not wait."""

    def begin(self, account: RequestRecord) -> None:
        """Hear that an answer begins."""
        ...

    def progress(self, account: RequestRecord) -> None:
        """Hear that the account has grown by a piece."""
        ...

    def end(self, account: RequestRecord) -> None:
        """Hear that the answer has ended; its statistics are complete."""
        ...


class Observed:
    """Passes on what another generator writes."""

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
        """Yield the pieces of one answer; raises what the generator raises."""
        account = RequestRecord(request=request, began_s=self._clock())
        span = RequestSpan(request)
        for observer in self._observers:
            observer.begin(account)
        pieces = self._generator.generate(request)
        try:
            while (piece := await span.within(anext(pieces, None))) is not None:
                self._hear(account, piece)
                span.round(account)
                yield piece
        except BaseException as error:
            account.fail(error)
            raise
        finally:
            await span.within(pieces.aclose())
            span.end(account)
            for observer in self._observers:
                observer.end(account)

    async def score(self, tokens: Sequence[int], *, top: int) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token but the first."""
        return await self._generator.score(tokens, top=top)

    def _hear(self, account: RequestRecord, piece: OutputChunk) -> None:
        account.add(piece, now_s=self._clock())
        for observer in self._observers:
            observer.progress(account)
