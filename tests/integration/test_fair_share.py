"""One caller does not keep the others waiting, through either door; readiness follows the tiers."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from cascade.api.grpc import GenerationServicer
from cascade.api.http import create_app
from cascade.api.keys import Keys
from cascade.engine.scheduler import Scheduler
from cascade.expert.expert import Expert
from cascade.local import local_server
from cascade.protocol import services
from cascade.protocol.client import ReplicaClients
from cascade.router.leases import FixedLease, FixedLeases
from cascade.router.tier_session import TierClient
from cascade.types import Caller, DecodingParams, Mode, Request, SamplingParams
from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    import grpc
    from tests.conftest import Pair

    from cascade.api.context import ServingContext
    from cascade.engine.request import ForwardRequest
    from cascade.local import LocalServer
    from cascade.router.router import Router

ANSWERS = 12
NOISY = ("10.0.0.1", 1)
OTHERS = {"another host": ("10.0.0.2", 1), "another connection": ("10.0.0.1", 2)}


class OneSlot:
    """Leases on a tier that holds one session."""

    def __init__(self, address: str, token: str) -> None:
        self._fixed = FixedLeases([address], token=token)
        self._free = asyncio.Lock()

    async def take(self) -> FixedLease:
        await self._free.acquire()
        lease, closed = await self._fixed.take(), False

        class Slot(FixedLease):
            def close(self) -> None:
                nonlocal closed
                if not closed:
                    closed = True
                    free.release()

        free = self._free
        return Slot(lease.address, lease.token)


@pytest.fixture
async def crowded(toy: Pair) -> AsyncIterator[tuple[ServingContext, TierClient]]:
    """A server whose expert has room for one answer at a time, and that tier."""
    settings = toy.settings(router={"lease_timeout_s": 120, "entry_deadline_s": 120})
    async with local_server(settings) as server:
        drafters, experts = ReplicaClients(services.DRAFTER), ReplicaClients(services.EXPERT)
        leases = FixedLeases([server.drafter.address], token=server.token)
        tier = TierClient(leases=OneSlot(server.expert.address, server.token), clients=experts)
        loop = settings.router.loop(
            drafters=TierClient(leases=leases, clients=drafters), experts=tier
        )
        yield replace(server.service, generator=loop), tier
        await drafters.close()
        await experts.close()


async def over_http(service: ServingContext, peer: tuple[str, int], n: int, key: str) -> None:
    transport = httpx2.ASGITransport(app=create_app(service), client=peer)
    headers = {"authorization": f"Bearer {key}"}
    body = {"prompt": [1, 2], "n": n, "max_tokens": 8}
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        response = await client.post("/v1/completions", json=body, headers=headers, timeout=300)
    assert response.status_code == 200, response.text


async def over_grpc(service: ServingContext, peer: tuple[str, int], n: int, key: str) -> None:
    generation = pb.Generation(tokens=pb.TokenIds(token_ids=[1, 2]), choice_count=n, max_tokens=8)
    context = Context(peer, key)
    request = pb.GenerateRequest(generation=generation)
    response = await GenerationServicer(lambda: service).Generate(request, context)
    assert len(response.choices) == n


class Context:
    """The context of a gRPC call from some peer."""

    def __init__(self, peer: tuple[str, int], key: str) -> None:
        self._peer, self._key = peer, key

    def peer(self) -> str:
        return f"ipv4:{self._peer[0]}:{self._peer[1]}"

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {self._key}"),)

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return ()

    def set_code(self, code: grpc.StatusCode) -> None:
        raise AssertionError(code)

    def set_details(self, details: str) -> None:
        raise AssertionError(details)

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        del trailing_metadata


async def waiting(tier: TierClient, count: int) -> None:
    """Return when so many sessions wait."""
    async with asyncio.timeout(60):
        while len(tier.leases._waiters) < count:  # noqa: ASYNC110 - untold # pyright: ignore[reportPrivateUsage] - nothing else knows
            await asyncio.sleep(0)


@pytest.mark.parametrize("door", [over_http, over_grpc])
@pytest.mark.parametrize("other", [*OTHERS, "another key"])
async def test_one_call_does_not_starve_another_caller(
    crowded: tuple[ServingContext, TierClient], door: Callable[..., Any], other: str
) -> None:
    """The other's one answer comes while the large call still waits for most of its own."""
    service, tier = crowded
    if other == "another key":
        service = replace(service, keys=Keys(["noisy", "quiet"]))
    large = asyncio.create_task(door(service, NOISY, ANSWERS, "noisy"))
    await waiting(tier, ANSWERS - 1)
    await door(service, OTHERS.get(other, NOISY), 1, "quiet")
    assert len(tier.leases._waiters) >= ANSWERS - 4  # pyright: ignore[reportPrivateUsage] - as above
    await large


async def test_a_call_for_more_answers_than_half_a_replica_is_refused(toy: Pair) -> None:
    """By default; the operator's own number counts otherwise."""
    for limits, allowed in (({}, 5), ({"answers": 8}, 8)):
        expert = {"model": str(toy.expert.path), "deployment": {"max_ongoing_requests": 10}}
        settings = toy.settings(expert=expert, limits=limits)
        async with local_server(settings) as server:
            transport = httpx2.ASGITransport(app=create_app(server.service))
            async with httpx2.AsyncClient(transport=transport, base_url="http://s") as client:
                for n, prompts in ((allowed, 1), (1, allowed), (allowed + 1, 1), (1, allowed + 1)):
                    body = {"prompt": [[1, 2]] * prompts, "n": n, "max_tokens": 1}
                    response = await client.post("/v1/completions", json=body)
                    fits = n * prompts <= allowed
                    assert response.status_code == (200 if fits else 400)
                    if not fits:
                        error = response.json()["error"]
                        assert error["param"] == ("n" if n > 1 else "prompt")
                        assert f"at most {allowed} answers" in error["message"]


async def until(router: Router, *, ready: bool) -> None:
    async with asyncio.timeout(60):
        while router.ready() is not ready:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.01)


async def test_readiness_follows_the_experts_and_not_the_drafters(
    toy: Pair, caplog: pytest.LogCaptureFixture
) -> None:
    """The log says when it begins, and what each tier does until it serves."""
    settings = toy.settings()
    caplog.set_level(logging.INFO, logger="cascade")
    async with local_server(settings) as server:
        watch = asyncio.create_task(server.router.watch())
        await until(server.router, ready=True)
        async with asyncio.timeout(60):
            while "The router answers requests" not in caplog.messages:  # noqa: ASYNC110 - untold
                await asyncio.sleep(0.01)
        for tier, options in (("drafter", settings.drafter), ("expert", settings.expert)):
            address = getattr(server, tier).address
            begin = f"The {tier} serves {options.model} on {address}, "
            assert sum(one.startswith(begin) for one in caplog.messages) == 1
        await server.drafter.stop()
        assert server.router.ready()
        await server.expert.stop()
        await until(server.router, ready=False)
        options, address = settings.expert.options(), server.expert.address
        reborn = await Expert.start(options, address=address, token=server.token)
        await until(server.router, ready=True)
        watch.cancel()
        await reborn.stop()


@pytest.mark.parametrize("mode", [Mode.SPECULATIVE, Mode.EXPERT_ONLY, Mode.DRAFTER_ONLY])
async def test_every_forward_request_of_an_answer_says_whose_it_is(
    shipped_server: LocalServer, monkeypatch: pytest.MonkeyPatch, mode: Mode
) -> None:
    """Blocks that are drafted or decoded ahead, too: or one caller would count as two."""
    seen: list[ForwardRequest] = []
    add = Scheduler.add

    def added(scheduler: Scheduler, request: ForwardRequest, **more: Any) -> Any:
        seen.append(request)
        return add(scheduler, request, **more)

    monkeypatch.setattr(Scheduler, "add", added)
    service = shipped_server.service
    prompt = tuple(service.tokenizer.encode("Question: Who is Buzz Aldrin?"))
    caller = Caller(name="somebody", has_key=True)
    policy = DecodingParams(sampling=SamplingParams(temperature=0))
    request = Request(prompt=prompt, policy=policy, mode=mode, max_tokens=24, caller=caller)
    assert [chunk async for chunk in service.generator.generate(request)]
    assert len(seen) > 2
    assert {one.share.caller for one in seen} == {"somebody"}
