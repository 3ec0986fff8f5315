"""Bodies that are large, slow, compressed, or wrong in a million places are refused cheaply."""

from __future__ import annotations

import asyncio
import gzip
import json
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cascade.api.body import parse
from cascade.api.http import create_app
from cascade.api.schema import ChatBody, CompletionBody, DetokenizeBody
from cascade.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cascade.api.body import Body
    from cascade.api.context import ServingContext

COMPLETION = {"prompt": "ab", "max_tokens": 1}
MANY = 300_000


def client(service: ServingContext, **limits: Any) -> httpx.AsyncClient:
    app = create_app(replace(service, limits=replace(service.limits, **limits)))
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://x")


async def never() -> AsyncIterator[bytes]:
    yield b"{"
    await asyncio.Event().wait()


async def test_a_body_that_does_not_arrive_is_ended(service: ServingContext) -> None:
    async with client(service, body_s=0.05) as http:
        response = await http.post("/v1/completions", content=never())
    assert response.status_code == 408
    assert response.headers["connection"] == "close"
    assert response.json()["error"]["code"] == "body_too_slow"


async def test_slow_bodies_keep_nobody_out(service: ServingContext) -> None:
    """The oldest gives its place to the next, so that one that is there at once is read."""
    async with client(service, bodies=4) as http:
        slow = [
            asyncio.create_task(http.post("/v1/completions", content=never())) for _ in range(4)
        ]
        await asyncio.sleep(0)
        while len(service.bodies) < 4:  # noqa: ASYNC110 - nothing tells when they wait
            await asyncio.sleep(0)
        response = await http.post("/v1/completions", json=COMPLETION)
        assert response.status_code == 200, response.text
        assert (await slow[0]).status_code == 408
        assert not any(one.done() for one in slow[1:])
        for one in slow[1:]:
            one.cancel()
        await asyncio.wait(slow[1:])


async def test_a_body_too_large_is_refused(service: ServingContext) -> None:
    body = COMPLETION | {"prompt": "x" * 1000}
    async with client(service, body_bytes=500) as http:
        response = await http.post("/v1/completions", json=body)
    assert response.status_code == 413
    assert "500 bytes" in response.json()["error"]["message"]


async def test_what_announces_far_more_than_is_read_is_not_read_at_all(
    service: ServingContext,
) -> None:
    headers = {"content-length": str(10**12)}
    async with client(service) as http:
        response = await http.post("/v1/completions", content=never(), headers=headers)
    assert response.status_code == 413


async def test_a_compressed_body_is_refused_as_such(service: ServingContext) -> None:
    data = gzip.compress(json.dumps(COMPLETION).encode())
    async with client(service) as http:
        response = await http.post(
            "/v1/completions", content=data, headers={"content-encoding": "gzip"}
        )
    assert response.status_code == 400
    assert "compressed (gzip)" in response.json()["error"]["message"]


@pytest.mark.timeout(20)  # each took pydantic minutes, and some of them gigabytes
@pytest.mark.parametrize(
    ("kind", "data", "says"),
    [
        (CompletionBody, b'{"prompt":[' + b"1.5," * MANY + b"1.5]}", "`prompt`"),
        (CompletionBody, b'{"prompt":[' + b"[]," * MANY + b"[]]}", "names, objects and lists"),
        (ChatBody, b'{"messages":[' + b"1," * MANY + b"1]}", "`messages[0]` is 1"),
        (ChatBody, b'{"messages":[' + b"{}," * MANY + b"{}]}", "names, objects and lists"),
        (DetokenizeBody, b'{"tokens":[' + b"1.5," * MANY + b"1.5]}", "`tokens[0]`"),
        (CompletionBody, b"{" + b'"a":1,' * MANY + b'"a":1}', "names, objects and lists"),
        (CompletionBody, b'{"prompt":"' + b'\\"' * MANY, "invalid"),
    ],
)
def test_a_body_wrong_in_many_places_is_refused_at_once(
    kind: type[Body], data: bytes, says: str
) -> None:
    with pytest.raises(InvalidRequest, match=re.escape(says)):
        parse(data, kind)


def test_braces_and_colons_in_a_text_are_no_objects() -> None:
    data = json.dumps({"prompt": 'a: {"b": [1]}' * 20_000}).encode()
    assert len(parse(data, CompletionBody).prompt) == 13 * 20_000
