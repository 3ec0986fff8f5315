"""Streams faster than the models here: recorded answers, replayed through the server's own API."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

from cascade.types import FinishReason, OutputChunk, Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from cascade.api.context import ServingContext
    from cascade.types import Request


class Replay:
    """Repeats the answer to each request, a token a chunk, as fast as they are read.

    Args:
        service: Whose answers are recorded.
        tokens: Of each answer.
    """

    def __init__(self, service: ServingContext, *, tokens: int) -> None:
        self._service = service
        self._tokens = tokens
        self.score = service.generator.score

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield the chunks, none before the whole answer has been recorded."""
        recorded = [chunk async for chunk in self._service.generator.generate(request)]
        singles = [one for chunk in recorded for one in split(chunk)]
        ends = {*request.policy.stop_ids, *self._service.tokenizer.stop_ids}
        kept = [one for one in singles if not ends.intersection(one.tokens)]
        statistics = Statistics()
        for at, one in enumerate(islice(cycle(kept), self._tokens)):
            statistics.expert_passes += 1
            finish = FinishReason.LENGTH if at + 1 == self._tokens else None
            yield replace(one, finish=finish, statistics=statistics)
            await asyncio.sleep(0)


def split(chunk: OutputChunk) -> Iterator[OutputChunk]:
    """Yield a chunk for each of the tokens."""
    for at, (token, origin) in enumerate(zip(chunk.tokens, chunk.origins, strict=True)):
        logprobs, drafts = chunk.logprobs[at : at + 1], chunk.drafts[at : at + 1]
        yield OutputChunk(tokens=(token,), origins=(origin,), logprobs=logprobs, drafts=drafts)


class Paced:
    """An ASGI app whose streams are recorded whole, then sent an event at a time, all together.

    Args:
        app: What answers.
        streams: How many start together.
        events_per_s: Of each stream.
    """

    def __init__(self, app: ASGIApp, *, streams: int, events_per_s: float) -> None:
        self._app = app
        self._together = asyncio.Barrier(streams)
        self._rate = events_per_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a POST is a stream."""
        if scope.get("method") != "POST":
            await self._app(scope, receive, send)
            return
        recorded: list[Message] = []

        async def record(message: Message) -> None:
            recorded.append(message)

        await self._app(scope, receive, record)
        await self._together.wait()
        clock = asyncio.get_running_loop().time
        began_s = clock()
        for at, message in enumerate(recorded):
            await asyncio.sleep(began_s + at / self._rate - clock())
            await send(message)
