"""A generator that is watched: every answer is measured, logged and traced, whatever its end."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Protocol

from cascade.operations.account import Account
from cascade.operations.tracing import AnswerSpan

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from cascade.decoding.generation import Generator, Piece, Request
    from cascade.decoding.session import TokenLogprob


class Observer(Protocol):
    """Hears of answers; called on the event loop, so it must not wait."""

    def begin(self, account: Account) -> None:
        """Hear that an answer begins."""
        ...

    def progress(self, account: Account) -> None:
        """Hear that the account has grown by a piece."""
        ...

    def end(self, account: Account) -> None:
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

    async def generate(self, request: Request) -> AsyncGenerator[Piece]:
        """Yield the pieces of one answer; raises what the generator raises."""
        account = Account(request=request, began_s=self._clock())
        span = AnswerSpan(request)
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

    def _hear(self, account: Account, piece: Piece) -> None:
        account.hear(piece, now_s=self._clock())
        for observer in self._observers:
            observer.progress(account)
