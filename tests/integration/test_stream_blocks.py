"""A stream has one event per committed block, and an error status if a tier is full."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest

from cascade.api.http import create_app
from cascade.demo import DRAFTER, EXPERT
from cascade.errors import Overloaded
from cascade.local import local_server
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.router.tier_session import TierClient
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cascade.api.context import ServingContext
    from cascade.local import LocalServer
    from cascade.router.leases import Lease

QUESTION = "Felix fills 9 boxes with 7 coins each and has 7 more. How many coins does he have?"

BODY = {
    "model": "cascade",
    "messages": [{"role": "user", "content": QUESTION}],
    "temperature": 0,
    "max_tokens": 60,
    "stream": True,
    "cascade": {"draft_tokens": 3, "trace": True},
}


class FullTier:
    """A lease source without free replicas."""

    async def take(self) -> Lease:
        raise Overloaded("every replica is in use")


@pytest.fixture(scope="module")
async def running() -> AsyncIterator[LocalServer]:
    """The shipped pair, whose drafter never times out."""
    engine = {"threads": 1}
    settings = Application.model_validate(
        {
            "drafter": {"model": str(DRAFTER), "engine": engine},
            "expert": {"model": str(EXPERT), "engine": engine},
            "router": {"draft_deadline_s": 120},
        }
    )
    async with local_server(settings) as started:
        yield started


async def post(service: ServingContext) -> httpx.Response:
    transport = httpx.ASGITransport(app=create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post("/v1/chat/completions", json=BODY, timeout=120)


def choices(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the choices of a stream's events."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if "data: " in line]
    assert data[-1] == "[DONE]"
    events = [json.loads(event) for event in data[:-1]]
    return [choice for event in events for choice in event["choices"]]


async def test_a_stream_has_one_event_for_each_committed_block(running: LocalServer) -> None:
    response = await post(running.service)
    received = choices(response)
    trace = received[-1]["cascade"]["trace"]
    assert len(trace) > 3, "several rounds are needed"
    sizes = [len(choice.get("cascade", {}).get("tokens", ())) for choice in received]
    assert [size for size in sizes if size] == [entry["tokens"] for entry in trace]
    assert sizes.count(0) == 2, "the role and the finish reason"


async def test_a_full_tier_is_a_429_without_events() -> None:
    """Leases are taken before the response begins, so that the client can retry elsewhere."""
    settings = Application()
    router = settings.router.loop(
        drafters=TierClient(leases=FullTier(), clients=ReplicaClients(services.DRAFTER)),
        experts=TierClient(leases=FullTier(), clients=ReplicaClients(services.EXPERT)),
    )
    service = settings.serving_context(router, settings.pair())
    response = await post(service)
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "overloaded"
    assert "data:" not in response.text
