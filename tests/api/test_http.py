"""Routes, models, health, request ids and API keys."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import httpx2
import openai
import pytest
from starlette.routing import Route

from cascade.api.http import create_app
from cascade.api.keys import Keys

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from openai import AsyncOpenAI
    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext


async def test_models_are_listed_and_one_with_a_slash_is_found(client: AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == ["pair", "org/pair"]
    assert (await client.models.retrieve("org/pair")).id == "org/pair"


async def test_an_unknown_model_is_a_404(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/healthz", "/ping", "/health/ready"])
async def test_health_is_readiness(raw: Callable[..., httpx2.AsyncClient], path: str) -> None:
    assert (await raw().get(path)).json() == {"status": "ok"}
    starting = await raw(ready=lambda: False).get(path)
    assert (starting.status_code, starting.json()["error"]["code"]) == (503, "unavailable")


async def test_a_router_without_models_is_alive(raw: Callable[..., httpx2.AsyncClient]) -> None:
    """A restart would not help it, so the check that restarts must not fail."""
    for path in ("/livez", "/health/live"):
        assert (await raw(ready=lambda: False).get(path)).json() == {"status": "ok"}


async def test_every_route_that_answers_get_answers_head(
    listen: Callable[..., Awaitable[str]], service: ServingContext
) -> None:
    """With the same status and length and no body; keys are needed alike."""
    routes = [one for one in create_app(service).routes if isinstance(one, Route)]
    gettable = [route.path for route in routes if "GET" in (route.methods or ())]
    assert {"/health", "/livez", "/ping", "/v1/models", "/openapi.json"} <= set(gettable)
    for changes in ({}, {"keys": Keys(["key"])}, {"ready": lambda: False}):
        async with httpx2.AsyncClient(base_url=await listen(**changes)) as http:
            for path in gettable:
                url = path.replace("{name:path}", "org/pair")
                get, head = await http.get(url), await http.head(url)
                assert (head.status_code, head.content) == (get.status_code, b"")
                assert head.headers.get("content-length") == get.headers.get("content-length"), path


async def test_head_is_refused_where_get_is(http: httpx2.AsyncClient) -> None:
    assert (await http.head("/v1/completions")).status_code == 405
    assert (await http.head("/other")).status_code == 404


async def test_no_page_needs_the_internet(http: httpx2.AsyncClient) -> None:
    """The description of the API is for any viewer; `tests/browser` watches what `/` asks for."""
    for path in ("/docs", "/redoc"):
        refused = await http.get(path)
        assert refused.status_code == 404
        assert "/openapi.json" in refused.json()["error"]["message"]
    assert (await http.get("/openapi.json")).json()["openapi"].startswith("3.")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_any_text_is_one_line_for_clients_that_read_lines(
    http: httpx2.AsyncClient,
    generator: ScriptedGenerator,
    service: ServingContext,
    path: str,
) -> None:
    """Whatever ends a line for Python; in bodies and errors too."""
    ends = [char for char in map(chr, range(0x3000)) if len(f"a{char}a".splitlines()) > 1]
    text = f"a{'a'.join(ends)}a"
    generator.script = lambda _: service.tokenizer.encode(text)
    messages = [{"role": "user", "content": text}]
    prompt = {"prompt": text} if path == "completions" else {"messages": messages}
    body = prompt | {"max_tokens": 100}
    whole = await http.post(f"/v1/{path}", json=body)
    assert len(whole.text.splitlines()) == 1
    (choice,) = whole.json()["choices"]
    assert choice.get("text", choice.get("message", {}).get("content")) == text
    streamed = ""
    async with http.stream("POST", f"/v1/{path}", json=body | {"stream": True}) as response:
        async for line in response.aiter_lines():
            assert line.startswith("data: ") or not line
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                streamed += choice.get("text") or choice.get("delta", {}).get("content") or ""
    assert streamed == text
    refused = await http.post(f"/v1/{path}", json=body | {"model": text})
    assert len(refused.text.splitlines()) == 1
    assert text in refused.json()["error"]["message"]


async def test_without_a_service_every_request_is_a_503(service: ServingContext) -> None:
    """The app can be created before the service."""
    app = create_app()
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as http:
        early = await http.get("/v1/models")
        app.state.service = service
        late = await http.get("/v1/models")
    assert (early.status_code, early.json()["error"]["code"]) == (503, "unavailable")
    assert "retry-after-ms" in early.headers
    assert late.status_code == 200


async def test_a_proxy_can_add_the_request_id_instead(service: ServingContext) -> None:
    """The response's `id` has the request id from the proxy."""
    transport = httpx2.ASGITransport(app=create_app(service, add_request_id=False))
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as http:
        headers = {"x-request-id": "by-serve"}
        response = await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert "x-request-id" not in response.headers
    assert response.json()["id"] == "cmpl-by-serve"


async def test_a_request_needs_an_api_key_if_the_service_has_some(
    connect: Callable[..., AsyncOpenAI],
) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await connect(keys=Keys(["secret"])).models.list()
    assert caught.value.code == "invalid_api_key"
    listed = await connect(keys=Keys(["other", "any"])).models.list()
    assert len(listed.data) == 2
