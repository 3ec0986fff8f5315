"""Server-sent events: a streamed call as bytes, sent until the client disconnects."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.responses import Response

from cascade.api import responses
from cascade.api.middleware import public_error
from cascade.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Iterable

    from starlette.types import Receive, Scope, Send

    from cascade.api.completion import Completion, Completions
    from cascade.api.output_processor import Delta
    from cascade.api.responses import ResponseFormat

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"data: [DONE]\n\n"


def encode_event(value: dict[str, Any]) -> bytes:
    """Return the bytes of one event; one with a `type` is named by it."""
    name = f"event: {value['type']}\n" if "type" in value else ""
    return name.encode() + b"data: " + responses.encode(value) + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`; cancel it and wait for its end if the client disconnects.

    Raises:
        Cancelled: The client disconnected first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("The client disconnected")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventResponse(Response):
    """Sends events. However it ends, the generator is closed before it returns."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        # nginx and other proxies buffer responses by default, which would delay the tokens.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events until the client disconnects."""
        del scope
        try:
            await while_connected(receive, self._send(send))
        except (Cancelled, OSError):
            return  # there is no client to report to
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


class CompletionStream:
    """A streamed call: `begin` waits for the first tokens, `events` yields the bytes."""

    def __init__(
        self, completions: Completions, response_format: ResponseFormat, *, keep_alive_s: float
    ) -> None:
        """Prepare the stream.

        Args:
            completions: What to generate.
            response_format: Turns deltas into chunks.
            keep_alive_s: Send a comment after so many seconds without an event.
        """
        self._completions = completions
        self._format = response_format
        self._deltas = completions.stream(keep_alive_s=keep_alive_s)
        self._first: list[tuple[Completion, Delta] | None] = []  # received by `begin`

    async def begin(self) -> None:
        """Wait until every completion has a generated token, for one keep-alive interval at most.

        An error until then is raised, so that the response can have its status.

        Raises:
            CascadeError: A completion cannot begin.
        """
        waiting = {completion.index for completion in self._completions.all}
        try:
            async for item in self._deltas:
                self._first.append(item)
                if item is None:
                    return
                completion, delta = item
                if delta.finish or any(token.origin for token in delta.tokens):
                    waiting.discard(completion.index)
                if not waiting:
                    return
        except BaseException:
            await self._deltas.aclose()
            raise

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield all events; an error is the last event, without `[DONE]`."""
        completions = self._completions
        async with aclosing(self._deltas):
            try:
                for event in self._format.begin(completions):
                    yield encode_event(event)
                for item in self._first:
                    for data in self._encode(item):
                        yield data
                async for item in self._deltas:
                    for data in self._encode(item):
                        yield data
                for event in self._format.end(completions):
                    yield encode_event(event)
                if self._format.sends_done:
                    yield DONE
            except Exception as error:  # noqa: BLE001 - `public_error` logs what is not ours
                problem = public_error(error, completions.request_id)
                yield encode_event(self._format.failed(completions, problem))

    def _encode(self, item: tuple[Completion, Delta] | None) -> Iterable[bytes]:
        if item is None:
            return (KEEP_ALIVE,)
        return map(encode_event, self._format.added(self._completions, *item))
