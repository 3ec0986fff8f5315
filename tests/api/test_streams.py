"""Streams, as OpenAI's client and as plain ears hear them (conformance 17 to 27)."""

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


async def hear(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]], path: str, **fields: Any
) -> list[Any]:
    body = (CHAT if path == "chat/completions" else TEXT) | fields
    answer = await http.post(f"/v1/{path}", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    return events(answer.text)


@pytest.mark.parametrize("blocks", [(1,), (3, 1, 4), (60,)])
async def test_deltas_join_to_the_text_of_the_whole_answer(
    client: AsyncOpenAI, generator: ScriptedGenerator, blocks: tuple[int, ...]
) -> None:
    """Conformance 17."""
    generator.blocks = blocks
    whole = await client.chat.completions.create(model="pair", messages=HI, seed=7)
    stream = await client.chat.completions.create(model="pair", messages=HI, seed=7, stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(parts) == whole.choices[0].message.content
    assert len(parts) >= 3


async def test_each_choice_has_its_role_once_and_choices_come_in_order(
    client: AsyncOpenAI,
) -> None:
    """Conformance 18."""
    stream = await client.chat.completions.create(model="pair", messages=HI, n=3, stream=True)
    chunks = [chunk async for chunk in stream]
    roles = [chunk.choices[0].index for chunk in chunks if chunk.choices[0].delta.role]
    assert roles == [0, 1, 2]
    assert [chunk.choices[0].index for chunk in chunks][:3] == [0, 1, 2]
    ends = [chunk for chunk in chunks if chunk.choices[0].finish_reason]
    assert sorted(chunk.choices[0].index for chunk in ends) == [0, 1, 2]
    assert all(chunk.choices[0].delta.content is None for chunk in ends)


async def test_texts_come_in_order_too(loose: AsyncOpenAI) -> None:
    """Conformance 18."""
    stream = await loose.completions.create(model="pair", prompt="Buzz", n=3, stream=True)
    indexes = [chunk.choices[0].index async for chunk in stream]
    assert list(dict.fromkeys(indexes)) == [0, 1, 2]


async def test_the_stream_helper_runs_to_its_end(client: AsyncOpenAI) -> None:
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
async def test_usage_comes_last_and_only_if_asked_for(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]], path: str
) -> None:
    """Conformance 20, 24: then only `[DONE]` follows."""
    *chunks, last, done = await hear(http, events, path, stream_options={"include_usage": True})
    assert all(chunk["usage"] is None for chunk in chunks)
    assert (last["choices"], done) == ([], "[DONE]")
    assert last["usage"]["completion_tokens"] > 0
    *chunks, done = await hear(http, events, path)
    assert not any("usage" in chunk for chunk in chunks)
    assert all(chunk["choices"] for chunk in chunks)
    assert done == "[DONE]"


async def test_usage_so_far_grows_with_the_answer(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]]
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    *chunks, _ = await hear(http, events, "completions", stream_options=options)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


async def test_stream_options_are_for_streams(client: AsyncOpenAI) -> None:
    """Conformance 21."""
    options: Any = {"include_usage": True}
    with pytest.raises(openai.BadRequestError) as caught:
        await client.chat.completions.create(
            model="pair", messages=HI, stream_options=options, stream=False
        )
    assert caught.value.param == "stream_options"


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_all_chunks_have_one_name_and_one_time(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]], path: str
) -> None:
    """Conformance 22."""
    *chunks, _ = await hear(http, events, path, n=2)
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["created"] == 1_800_000_000


async def test_a_character_waits_for_all_of_its_tokens(
    loose: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    """Conformance 23: one token a block, so that characters are cut."""
    generator.blocks = (1,)
    told: dict[str, Any] = TEXT | {"model": "pair"}
    stream = await loose.completions.create(**told)
    parts = [chunk.choices[0].text async for chunk in stream]
    assert not any("\ufffd" in part for part in parts)
    assert any("\N{ROCKET}" in part for part in parts)


def after(count: int, error: Exception) -> Callable[[Request, int], Awaitable[None]]:
    async def pause(_request: Request, position: int) -> None:
        if position >= count:
            raise error

    return pause


async def test_a_failure_on_the_way_is_an_error_event_and_no_end(
    client: AsyncOpenAI,
    http: httpx2.AsyncClient,
    generator: ScriptedGenerator,
    events: Callable[[str], list[Any]],
) -> None:
    """Conformance 25: the client raises our code; `[DONE]` would say that all went well."""
    generator.pause = after(3, ExpertUnavailable("the expert is gone"))
    stream = await client.chat.completions.create(model="pair", messages=HI, stream=True)
    with pytest.raises(openai.APIError) as caught:
        assert [chunk async for chunk in stream]
    assert (caught.value.code, caught.value.type) == ("expert_unavailable", "server_error")
    assert caught.value.message == "the expert is gone"
    heard = await hear(http, events, "chat/completions")
    assert "error" in heard[-1]
    assert generator.open == 0


@pytest.mark.parametrize("kind", [ZeroDivisionError, Internal])
async def test_a_defect_on_the_way_keeps_its_secrets(
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
async def test_a_refusal_before_the_first_words_has_its_own_status(
    client: AsyncOpenAI, generator: ScriptedGenerator, n: int
) -> None:
    generator.pause = after(0, Overloaded("no room"))
    with pytest.raises(openai.RateLimitError):
        await client.chat.completions.create(model="pair", messages=HI, stream=True, n=n)
    assert generator.open == 0


async def test_a_refusal_after_an_echo_has_its_own_status_too(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    """The prompt could be sent at once; but it is no sign that an answer can follow."""
    generator.pause = after(0, Overloaded("no room"))
    with pytest.raises(openai.RateLimitError):
        await client.completions.create(model="pair", prompt="Buzz", stream=True, echo=True)


async def test_a_slow_beginning_is_bridged_by_comments(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]]
) -> None:
    """Conformance 26: they come before the first token and change nothing."""
    gate = asyncio.Event()

    async def wait(_request: Request, _position: int) -> None:
        await gate.wait()

    generator.pause = wait
    url = await listen(keep_alive_s=0.01)
    heard: list[str] = []
    async with (
        httpx2.AsyncClient(base_url=url) as http,
        http.stream("POST", "/v1/completions", json=TEXT) as answer,
    ):
        async for line in answer.aiter_lines():
            heard.append(line)
            if line == ": keep-alive":
                gate.set()
    assert heard[0] == ": keep-alive"
    data = [line for line in heard if line.startswith("data: {")]
    assert json.loads(data[-1][6:])["choices"][0]["finish_reason"] == "stop"


async def test_the_client_steps_over_comments(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]]
) -> None:
    """Conformance 26."""
    told = asyncio.Event()

    async def wait(_request: Request, _position: int) -> None:
        await told.wait()

    generator.pause = wait
    url = await listen(keep_alive_s=0.01)
    async with AsyncOpenAI(api_key="any", base_url=f"{url}/v1", max_retries=0) as client:
        stream = await client.chat.completions.create(model="pair", messages=HI, stream=True)
        told.set()
        parts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "Moon" in "".join(parts)


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("place", [0, 3])
async def test_a_client_that_leaves_a_stream_frees_it(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]], n: int, place: int
) -> None:
    """Conformance 27: while it waits for the first words, and in the middle."""
    started = asyncio.Event()

    async def forever(_request: Request, position: int) -> None:
        if position >= place:
            started.set()
            await asyncio.Event().wait()

    generator.pause = forever
    async with httpx2.AsyncClient(base_url=await listen()) as http:

        async def talk() -> None:
            async with http.stream("POST", "/v1/completions", json=TEXT | {"n": n}) as answer:
                async for _ in answer.aiter_bytes():
                    pass

        talking = asyncio.create_task(talk())
        await started.wait()
        talking.cancel()
        async with asyncio.timeout(10):
            await generator.idle.wait()
        await asyncio.gather(talking, return_exceptions=True)


async def test_a_client_that_leaves_before_a_whole_answer_frees_it(
    generator: ScriptedGenerator, listen: Callable[..., Awaitable[str]]
) -> None:
    started = asyncio.Event()

    async def forever(_request: Request, _position: int) -> None:
        started.set()
        await asyncio.Event().wait()

    generator.pause = forever
    async with httpx2.AsyncClient(base_url=await listen()) as http:
        body = {"prompt": "Buzz", "n": 2}
        talking = asyncio.create_task(http.post("/v1/completions", json=body))
        await started.wait()
        talking.cancel()
        async with asyncio.timeout(10):
            await generator.idle.wait()
        await asyncio.gather(talking, return_exceptions=True)


async def test_a_long_answer_waits_for_a_slow_reader_and_loses_nothing(
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
