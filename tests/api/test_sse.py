"""Events as bytes, and work that is cancelled when its client disconnects."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.api.sse import EventResponse, encode_event, while_connected
from cascade.errors import Cancelled

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, MutableMapping


async def stay() -> dict[str, Any]:
    await asyncio.Event().wait()
    return {"type": "http.disconnect"}


async def leave() -> dict[str, Any]:
    return {"type": "http.disconnect"}


def test_an_event_is_one_line_of_utf_8() -> None:
    assert encode_event({"text": "a\nb \N{ROCKET}"}) == 'data: {"text":"a\\nb 🚀"}\n\n'.encode()


@given(text=st.text() | st.text("a\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"))
def test_an_event_is_one_line_for_every_client(text: str) -> None:
    line, empty = encode_event({"text": text}).decode().splitlines()
    assert json.loads(line.removeprefix("data: ")) == {"text": text}
    assert not empty


def test_an_event_never_has_numbers_that_are_not_json() -> None:
    with pytest.raises(ValueError, match="JSON"):
        encode_event({"logprob": float("-inf")})


async def test_work_returns_while_the_client_is_connected() -> None:
    async def work() -> int:
        await asyncio.sleep(0)
        return 7

    assert await while_connected(stay, work()) == 7


async def test_work_has_ended_before_cancelled_is_raised() -> None:
    ended = False

    async def work() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            ended = True

    with pytest.raises(Cancelled):
        await while_connected(leave, work())
    assert ended


async def test_an_error_of_the_work_is_raised() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_connected(stay, work())


class EndlessEvents:
    """Events without end; records whether they were closed."""

    closed = False

    async def events(self) -> AsyncGenerator[bytes]:
        try:
            while True:
                yield b"data: x\n\n"
                await asyncio.sleep(0)
        finally:
            self.closed = True


@pytest.mark.parametrize("how", ["disconnect", "broken pipe"])
async def test_a_response_closes_its_events_however_it_ends(how: str) -> None:
    endless, streaming = EndlessEvents(), asyncio.Event()
    sent: list[MutableMapping[str, Any]] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)
        if len(sent) > 2:
            streaming.set()
        if how == "broken pipe" and len(sent) > 3:
            raise OSError("connection reset")

    async def receive() -> dict[str, Any]:
        if how == "broken pipe":
            return await stay()
        await streaming.wait()
        return await leave()

    await EventResponse(endless.events())({"type": "http"}, receive, send)
    assert endless.closed
    assert sent[0]["status"] == 200
    headers = dict(sent[0]["headers"])
    assert headers[b"content-type"].startswith(b"text/event-stream")
    assert b"content-length" not in headers
