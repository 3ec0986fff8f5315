"""Routes, models and health."""

from __future__ import annotations

from typing import TYPE_CHECKING

import httpx2
import openai
import pytest

from cascade.api.http import create_app

if TYPE_CHECKING:
    from collections.abc import Callable

    from openai import AsyncOpenAI

    from cascade.api.context import ServingContext


def door(service: ServingContext | None) -> httpx2.AsyncClient:
    transport = httpx2.ASGITransport(app=create_app(service))
    return httpx2.AsyncClient(transport=transport, base_url="http://door")


async def test_models_are_listed_and_one_with_a_slash_is_found(client: AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == ["pair", "org/pair"]
    assert (await client.models.retrieve("org/pair")).id == "org/pair"


async def test_an_unknown_model_is_not_found(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/healthz"])
async def test_health_follows_readiness(service: ServingContext, path: str) -> None:
    async with door(service) as http:
        assert (await http.get(path)).json() == {"status": "ok"}


async def test_a_door_without_its_service_says_that_it_is_starting(service: ServingContext) -> None:
    """The app can be built before the service; until it is set, everything is 503."""
    app = create_app()
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://door") as http:
        early = await http.get("/v1/models")
        app.state.service = service
        late = await http.get("/v1/models")
    assert (early.status_code, early.json()["error"]["code"]) == (503, "unavailable")
    assert "retry-after-ms" in early.headers
    assert late.status_code == 200


async def test_a_layer_in_front_may_name_the_answers_instead(service: ServingContext) -> None:
    """The name that the layer gave the request is the one in the answer's id."""
    transport = httpx2.ASGITransport(app=create_app(service, add_request_id=False))
    async with httpx2.AsyncClient(transport=transport, base_url="http://door") as http:
        headers = {"x-request-id": "by-serve"}
        answer = await http.post("/v1/completions", json={"prompt": "x"}, headers=headers)
    assert "x-request-id" not in answer.headers
    assert answer.json()["id"] == "cmpl-by-serve"


async def test_keys_are_asked_for_where_there_are_some(
    connect: Callable[..., AsyncOpenAI],
) -> None:
    with pytest.raises(openai.AuthenticationError) as caught:
        await connect(api_keys=frozenset({"secret"})).models.list()
    assert caught.value.code == "invalid_api_key"
    listed = await connect(api_keys=frozenset({"other", "any"})).models.list()
    assert len(listed.data) == 2
