"""The events of one streamed call."""

from __future__ import annotations

import logging
from contextlib import aclosing
from typing import TYPE_CHECKING, TypeAlias

from cascade.errors import CascadeError
from cascade.ingress import shapes
from cascade.ingress.rim import defect, told
from cascade.ingress.sse import DONE, KEEP_ALIVE, event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator

    from cascade.ingress.answers import Answer, Answers
    from cascade.ingress.events import Delta
    from cascade.ingress.shapes import Json, Shape

logger = logging.getLogger(__name__)

Item: TypeAlias = "tuple[Answer, Delta] | None"


class Stream:
    """A streamed call: its first words, and then the bytes of everything."""

    def __init__(
        self, answers: Answers, shape: Shape, *, request_id: str, created: int, tick_s: float
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
        self._deltas = answers.write(tick_s=tick_s)
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
                if item[1].finish or any(entry.origin for entry in item[1].entries):
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
                yield event(shapes.error(told(error, self._request_id)))
            except Exception:
                logger.exception("Request %s failed while it streamed", self._request_id)
                yield event(shapes.error(defect(self._request_id)))

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
            yield event(self._frame | {"choices": [choice]} | self._usage_so_far())

    def _usage_so_far(self) -> Json:
        call = self._answers.call
        if not call.usage_chunk:
            return {}
        if not call.usage_always:
            return {"usage": None}
        return {"usage": shapes.usage_object(self._answers.usage)}

    def _end(self) -> Iterator[bytes]:
        if self._answers.call.usage_chunk:
            usage = self._answers.usage
            last = {"choices": [], "usage": shapes.usage_object(usage), **shapes.measures(usage)}
            yield event(self._frame | last)
        yield DONE
