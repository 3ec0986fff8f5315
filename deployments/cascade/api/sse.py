"""The events of one streamed call."""

from __future__ import annotations

import asyncio
import json
import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from starlette.responses import Response

from cascade.api import responses
from cascade.api.middleware import defect, told
from cascade.errors import Cancelled, CascadeError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine, Iterable, Iterator

    from starlette.types import Receive, Scope, Send

    from cascade.api.completion import Completion, Completions
    from cascade.api.output_processor import Delta
    from cascade.api.responses import Json, ResponseFormat

T = TypeVar("T")

KEEP_ALIVE = b": keep-alive\n\n"

DONE = b"data: [DONE]\n\n"


def encode_event(value: dict[str, Any]) -> bytes:
    """Return the bytes of one event."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it, and await its end, as soon as the client leaves.

    Raises:
        Cancelled: The client left first.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise Cancelled("The client left")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventResponse(Response):
    """Streams events. However it ends, the generator is closed before it returns."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes]) -> None:
        # Proxies that buffer answers, nginx first of all, would hold the tokens back.
        super().__init__(headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events, unless the client leaves."""
        del scope
        try:
            await while_connected(receive, self._send(send))
        except (Cancelled, OSError):
            return  # nobody is left to tell
        finally:
            await self._events.aclose()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for data in self._events:
            await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


logger = logging.getLogger(__name__)

Item: TypeAlias = "tuple[Completion, Delta] | None"


class CompletionStream:
    """A streamed call: its first words, and then the bytes of everything."""

    def __init__(
        self,
        answers: Completions,
        shape: ResponseFormat,
        *,
        request_id: str,
        created: int,
        tick_s: float,
    ) -> None:
        self._answers = answers
        self._shape = shape
        self._request_id = request_id
        self._frame = {
            "id": f"{shape.prefix}-{request_id}",
            "object": shape.names[1],
            "created": created,
            "model": answers.call.model,
        }
        self._deltas = answers.stream(keep_alive_s=tick_s)
        self._heard: list[Item] = []

    async def begin(self) -> None:
        """Wait until each answer has begun, or one tick: so a refusal still gets its own status.

        Raises:
            CascadeError: An answer cannot begin.
        """
        silent = {answer.index for answer in self._answers.all}
        try:
            async for item in self._deltas:
                self._heard.append(item)
                if item is None:
                    return
                if item[1].finish or any(entry.origin for entry in item[1].tokens):
                    silent.discard(item[0].index)
                if not silent:
                    return
        except BaseException:
            await self._deltas.aclose()
            raise

    async def events(self) -> AsyncGenerator[bytes]:
        """Yield all events. A failure is an event too, and then there is no `[DONE]`."""
        async with aclosing(self._deltas):
            try:
                for answer in self._answers.all:
                    for data in self._events(self._shape.opening(answer)):
                        yield data
                async for item in self._items():
                    for data in self._event(item):
                        yield data
                for data in self._end():
                    yield data
            except CascadeError as error:
                yield encode_event(responses.error(told(error, self._request_id)))
            except Exception:
                logger.exception("Request %s failed while it streamed", self._request_id)
                yield encode_event(responses.error(defect(self._request_id)))

    async def _items(self) -> AsyncGenerator[Item]:
        for item in self._heard:
            yield item
        async for item in self._deltas:
            yield item

    def _event(self, item: Item) -> Iterator[bytes]:
        if item is None:
            return iter((KEEP_ALIVE,))
        answer, delta = item
        return self._events(self._shape.chunks(answer, delta))

    def _events(self, choices: Iterable[Json]) -> Iterator[bytes]:
        for choice in choices:
            yield encode_event(self._frame | {"choices": [choice]} | self._usage_so_far())

    def _usage_so_far(self) -> Json:
        call = self._answers.call
        if not call.include_usage:
            return {}
        if not call.continuous_usage:
            return {"usage": None}
        return {"usage": responses.usage_object(self._answers.usage)}

    def _end(self) -> Iterator[bytes]:
        if self._answers.call.include_usage:
            usage = self._answers.usage
            last = {
                "choices": [],
                "usage": responses.usage_object(usage),
                **responses.measures(usage),
            }
            yield encode_event(self._frame | last)
        yield DONE
