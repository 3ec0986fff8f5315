"""`cascade router`: the loop and the HTTP door over tiers on given addresses, without Ray."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from cascade.cli.tier import Config, Token, application

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from fastapi import FastAPI

    from cascade.settings import Application


def router(  # noqa: PLR0913 - one parameter an option
    *,
    drafter: Annotated[list[str], typer.Option(help="Address of a drafter; repeat for more")],
    expert: Annotated[list[str], typer.Option(help="Address of an expert; repeat for more")],
    token: Token,
    host: Annotated[str, typer.Option(help="Where HTTP listens")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Where HTTP listens")] = 8000,
    config: Config = None,
) -> None:
    """Serve HTTP over tiers that were started with `cascade tier`."""
    import uvicorn  # noqa: PLC0415 - `cascade ask` need not wait for a server's libraries

    settings = application(config)
    door = _door(settings, drafters=drafter, experts=expert, token=token)
    uvicorn.run(door, host=host, port=port, log_level="warning")


def _door(settings: Application, *, drafters: list[str], experts: list[str], token: str) -> FastAPI:
    from fastapi.responses import PlainTextResponse  # noqa: PLC0415 - as above
    from prometheus_client import CONTENT_TYPE_LATEST, generate_latest  # noqa: PLC0415 - as above

    from cascade.api.http import create_app  # noqa: PLC0415 - as above
    from cascade.observability.metric_specs import ROUTER  # noqa: PLC0415 - as above
    from cascade.observability.metrics import PrometheusMetrics  # noqa: PLC0415 - as above
    from cascade.observability.request_log import to_stderr  # noqa: PLC0415 - as above
    from cascade.protocol import services  # noqa: PLC0415 - as above
    from cascade.protocol.client import ReplicaClients  # noqa: PLC0415 - as above
    from cascade.router.leases import FixedLeases  # noqa: PLC0415 - as above
    from cascade.router.tier_session import TierClient  # noqa: PLC0415 - as above

    pair, sink = settings.pair(), PrometheusMetrics(ROUTER)
    to_stderr()

    @asynccontextmanager
    async def serving(app: FastAPI) -> AsyncGenerator[None]:
        drafting, judging = (
            TierClient(leases=FixedLeases(addresses, token=token), clients=ReplicaClients(kind))
            for addresses, kind in ((drafters, services.DRAFTER), (experts, services.EXPERT))
        )
        loop = settings.router.loop(drafters=drafting, experts=judging)
        app.state.service = settings.serving_context(settings.observe(loop, sink), pair)
        yield
        await drafting.clients.close()
        await judging.clients.close()

    door = create_app()

    @door.get("/metrics", include_in_schema=False)
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(generate_latest(sink.registry), media_type=CONTENT_TYPE_LATEST)

    door.router.lifespan_context = serving
    return door
