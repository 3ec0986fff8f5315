"""What a stream is made of: an event a committed block, and nothing before both tiers are held."""

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


class Taken:
    """Leases on a tier that is full."""

    async def take(self) -> Lease:
        raise Overloaded("every replica is taken")


@pytest.fixture(scope="module")
async def running() -> AsyncIterator[LocalServer]:
    """The pair that ships, whose drafter is never too late."""
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


async def posted(service: ServingContext) -> httpx.Response:
    transport = httpx.ASGITransport(app=create_app(service))
    async with httpx.AsyncClient(transport=transport, base_url="http://door") as client:
        return await client.post("/v1/chat/completions", json=BODY, timeout=120)


def choices(response: httpx.Response) -> list[dict[str, Any]]:
    """Return the choices of a stream's events."""
    data = [line.removeprefix("data: ") for line in response.text.splitlines() if "data: " in line]
    assert data[-1] == "[DONE]"
    events = [json.loads(event) for event in data[:-1]]
    return [choice for event in events for choice in event["choices"]]


async def test_a_stream_has_one_event_for_each_committed_block(running: LocalServer) -> None:
    response = await posted(running.service)
    heard = choices(response)
    trace = heard[-1]["cascade"]["trace"]
    assert len(trace) > 3, "an answer of several rounds"
    sizes = [len(choice.get("cascade", {}).get("tokens", ())) for choice in heard]
    assert [size for size in sizes if size] == [found["tokens"] for found in trace]
    assert sizes.count(0) == 2, "who speaks, and why it ended"


async def test_a_tier_that_is_full_is_an_answers_status_and_no_event() -> None:
    """Leases are taken before a response begins: a client may still go elsewhere."""
    settings = Application()
    router = settings.router.loop(
        drafters=TierClient(leases=Taken(), clients=ReplicaClients(services.DRAFTER)),
        experts=TierClient(leases=Taken(), clients=ReplicaClients(services.EXPERT)),
    )
    service = settings.serving_context(router, settings.pair())
    response = await posted(service)
    assert response.status_code == 429
    assert response.json()["error"]["code"] == "overloaded"
    assert "data:" not in response.text
