"""Routes, models, health, request ids and API keys."""

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


async def test_models_are_listed_and_one_with_a_slash_is_found(client: AsyncOpenAI) -> None:
    listed = [model.id async for model in client.models.list()]
    assert listed == ["pair", "org/pair"]
    assert (await client.models.retrieve("org/pair")).id == "org/pair"


async def test_an_unknown_model_is_a_404(client: AsyncOpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        await client.models.retrieve("org/other")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize("path", ["/health", "/healthz"])
async def test_health_is_readiness(raw: Callable[..., httpx2.AsyncClient], path: str) -> None:
    assert (await raw().get(path)).json() == {"status": "ok"}
    starting = await raw(ready=lambda: False).get(path)
    assert (starting.status_code, starting.json()["error"]["code"]) == (503, "unavailable")


async def test_a_router_without_models_is_alive(raw: Callable[..., httpx2.AsyncClient]) -> None:
    """A restart would not help it, so the check that restarts must not fail."""
    assert (await raw(ready=lambda: False).get("/livez")).json() == {"status": "ok"}


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
        await connect(api_keys=frozenset({"secret"})).models.list()
    assert caught.value.code == "invalid_api_key"
    listed = await connect(api_keys=frozenset({"other", "any"})).models.list()
    assert len(listed.data) == 2
