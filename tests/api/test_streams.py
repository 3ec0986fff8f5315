"""Streams, read by OpenAI's client and as plain HTTP (conformance 17 to 27)."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from cascade.errors import ExpertUnavailable, Internal, Overloaded

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext
    from cascade.types import Request

HI: Any = [{"role": "user", "content": "hi"}]

CHAT: dict[str, Any] = {"messages": HI, "seed": 7, "stream": True}

TEXT: dict[str, Any] = {"prompt": "Buzz", "seed": 7, "stream": True, "max_tokens": 30}


async def stream_events(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]], path: str, **fields: Any
) -> list[Any]:
    body = (CHAT if path == "chat/completions" else TEXT) | fields
    response = await http.post(f"/v1/{path}", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    return events(response.text)


@pytest.mark.parametrize("blocks", [(1,), (3, 1, 4), (60,)])
async def test_deltas_join_to_the_text_of_the_response(
    client: AsyncOpenAI, generator: ScriptedGenerator, blocks: tuple[int, ...]
) -> None:
    """Conformance 17."""
    generator.blocks = blocks
    whole = await client.chat.completions.create(model="pair", messages=HI, seed=7)
    stream = await client.chat.completions.create(model="pair", messages=HI, seed=7, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(parts) >= 3


async def test_each_choice_has_its_role_once_and_choices_are_in_order(client: AsyncOpenAI) -> None:
    """Conformance 18."""
    stream = await client.chat.completions.create(model="pair", messages=HI, n=3, stream=True)
    chunks = [chunk async for chunk in stream]
    roles = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role]
    assert roles == [0, 1, 2]
    assert [chunk.choices[0].index for chunk in chunks][:3] == [0, 1, 2]
    ends = [chunk for chunk in chunks if chunk.choices[0].finish_reason]
    assert sorted(chunk.choices[0].index for chunk in ends) == [0, 1, 2]
    assert all(chunk.choices[0].delta.content is None for chunk in ends)


async def test_text_choices_are_in_order(lenient: AsyncOpenAI) -> None:
    """Conformance 18."""
    stream = await lenient.completions.create(model="pair", prompt="Buzz", n=3, stream=True)
    indexes = [chunk.choices[0].index async for chunk in stream]
    assert list(dict.fromkeys(indexes)) == [0, 1, 2]


async def test_the_stream_helper_of_openais_client_works(client: AsyncOpenAI) -> None:
    """Conformance 19."""
    whole = await client.chat.completions.create(
        model="pair", messages=HI, seed=7, n=3, logprobs=True, top_logprobs=2
    )
    async with client.chat.completions.stream(
        model="pair",
        messages=HI,
        seed=7,
        n=3,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    ) as stream:
        final = await stream.get_final_completion()
    for ours, theirs in zip(final.choices, whole.choices, strict=True):
        assert ours.message.content == theirs.message.content
        assert ours.message.role == "assistant"
        assert ours.logprobs == theirs.logprobs
    assert final.usage == whole.usage


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_usage_is_the_last_chunk_if_requested(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]], path: str
) -> None:
    """Conformance 20, 24: then only `[DONE]` follows."""
    *chunks, last, done = await stream_events(
        http, events, path, stream_options={"include_usage": True}
    )
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], done) == ([], "[DONE]")
    assert last["usage"]["completion_tokens"] > 0
    *chunks, done = await stream_events(http, events, path)
    assert not any("usage" in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)
    assert done == "[DONE]"


async def test_continuous_usage_grows_with_the_completion(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]]
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = await stream_events(http, events, "completions", stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


async def test_stream_options_need_stream(client: AsyncOpenAI) -> None:
    """Conformance 21."""
    options: Any = {"include_usage": True}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="pair", messages=HI, stream_options=options, stream=False
        )
    assert caught.value.param == "stream_options"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_all_chunks_have_the_same_id_and_time(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]], path: str
) -> None:
    """Conformance 22."""
    *chunks, _ = await stream_events(http, events, path, n=2)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["created"] == 1_800_000_000


async def test_a_character_is_sent_when_all_its_tokens_are_there(
    lenient: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    """Conformance 23: one token per block, so that characters are split."""
    generator.blocks = (1,)
    body: dict[str, Any] = TEXT | {"model": "pair"}
    stream = await lenient.completions.create(**body)
    parts = [chunk.choices[0].text async for chunk in stream]
    assert not any("\ufffd" in part for part in parts)
    assert any("\N{ROCKET}" in part for part in parts)


def after(count: int, error: Exception) -> Callable[[Request, int], Awaitable[None]]:
    async def pause(_request: Request, position: int) -> None:
        if position >= count:
            raise error

    return pause


async def test_an_error_in_mid_stream_is_an_event_without_done(
    client: AsyncOpenAI,
    http: httpx2.AsyncClient,
    generator: ScriptedGenerator,
    events: Callable[[str], list[Any]],
) -> None:
    """Conformance 25: the client raises our code; `[DONE]` would mean success."""
    generator.pause = after(3, ExpertUnavailable("no expert"))
    stream = await client.chat.completions.create(model="pair", messages=HI, stream=True)
    with pytest.raises(openai.APIError) as caught:
        assert [chunk async for chunk in stream]
    assert (caught.value.code, caught.value.type) == ("expert_unavailable", "server_error")
    assert caught.value.message == "no expert"
    received = await stream_events(http, events, "chat/completions")
    assert "error" in received[-1]
    assert generator.open == 0


@pytest.mark.parametrize("kind", [ZeroDivisionError, Internal])
async def test_an_internal_error_in_mid_stream_hides_its_text(
    client: AsyncOpenAI,
    generator: ScriptedGenerator,
    caplog: pytest.LogCaptureFixture,
    kind: type[Exception],
) -> None:
    generator.pause = after(3, kind("a secret"))
    stream = await client.chat.completions.create(model="pair", messages=HI, stream=True)
    with pytest.raises(openai.APIError) as caught:
        assert [chunk async for chunk in stream]
    assert caught.value.code == "internal_error"
    assert "secret" not in caught.value.message
    assert "a secret" in caplog.text


@pytest.mark.parametrize("n", [1, 3])
async def test_an_error_before_the_first_token_has_its_status(
    client: AsyncOpenAI, generator: ScriptedGenerator, n: int
) -> None:
    generator.pause = after(0, Overloaded("no room"))
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="pair", messages=HI, stream=True, n=n)
    assert generator.open == 0


async def test_an_error_after_the_echo_has_its_status(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    """The echoed prompt is no sign that the generation can begin."""
    generator.pause = after(0, Overloaded("no room"))
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="pair", prompt="Buzz", stream=True, echo=True)


async def test_comments_are_sent_before_a_slow_first_token(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]]
) -> None:
    """Conformance 26."""
    gate = asyncio.Event()

    async def wait(_request: Request, _position: int) -> None:
        await gate.wait()

    generator.pause = wait
    url = await listen(keep_alive_s=0.01)
    lines: list[str] = []
    async with (
        httpx2.AsyncClient(base_url=url) as http,
        http.stream("POST", "/v1/completions", json=TEXT) as response,
    ):
        async for line in response.aiter_lines():
            lines.append(line)
            if line == ": keep-alive":
                gate.set()
    assert lines[0] == ": keep-alive"
    data = [line for line in lines if line.startswith("data: {")]
    assert json.loads(data[-1][6:])["choices"][0]["finish_reason"] == "stop"


async def test_openais_client_ignores_comments(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]]
) -> None:
    """Conformance 26."""
    gate = asyncio.Event()

    async def wait(_request: Request, _position: int) -> None:
        await gate.wait()

    generator.pause = wait
    url = await listen(keep_alive_s=0.01)
    async with AsyncOpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0) as client:
        stream = await client.chat.completions.create(model="pair", messages=HI, stream=True)
        gate.set()
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "Moon" in "".join(parts)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("place", [0, 3])
async def test_a_client_that_disconnects_ends_its_stream(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]], n: int, place: int
) -> None:
    """Conformance 27: while it waits for the first token, and in the middle."""
    started = asyncio.Event()

    async def forever(_request: Request, position: int) -> None:
        if position >= place:
            started.set()
            await asyncio.Event().wait()

    generator.pause = forever
    async with httpx2.AsyncClient(base_url=await listen()) as http:

        async def read() -> None:
            async with http.stream("POST", "/v1/completions", json=TEXT | {"n": n}) as response:
                async for _ in response.aiter_bytes():
                    pass

        reading = asyncio.create_task(read())
        await started.wait()
        reading.cancel()
        async with asyncio.timeout(10):
            await generator.idle.wait()
        await asyncio.gather(reading, return_exceptions=True)


async def test_a_client_that_disconnects_ends_its_completions(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]]
) -> None:
    started = asyncio.Event()

    async def forever(_request: Request, _position: int) -> None:
        started.set()
        await asyncio.Event().wait()

    generator.pause = forever
    async with httpx2.AsyncClient(base_url=await listen()) as http:
        body = {"prompt": "Buzz", "n": 2}
        reading = asyncio.create_task(http.post("/v1/completions", json=body))
        await started.wait()
        reading.cancel()
        async with asyncio.timeout(10):
            await generator.idle.wait()
        await asyncio.gather(reading, return_exceptions=True)


async def test_a_long_stream_is_complete(
    generator: ScriptedGenerator, service: ServingContext, listen: Callable[..., Awaitable[str]]
) -> None:
    moon = service.tokenizer.encode(" Moon")
    generator.script = lambda _: [*moon * 400]
    async with AsyncOpenAI(api_key="any", base_url=f"{await listen()}/v1") as client:
        stream = await client.completions.create(
            model="pair", prompt="x", max_tokens=400 * len(moon), stream=True
        )
        parts = [chunk.choices[0].text async for chunk in stream]
    assert "".join(parts) == " Moon" * 400
