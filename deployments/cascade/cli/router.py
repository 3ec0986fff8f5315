"""`cascade router`: the loop and the HTTP door over tiers on given addresses, without Ray."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Annotated

import typer
import uvicorn

from cascade.cli.tier import Config, Token, application
from cascade.decoding.draft_length import Fixed
from cascade.ingress.http import create_app
from cascade.operations.leases import FixedLeases
from cascade.operations.places import Tier
from cascade.router import Router
from cascade.wire import tiers
from cascade.wire.channel import Peers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from fastapi import FastAPI


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
    settings = application(config)
    pair = settings.pair()

    @asynccontextmanager
    async def serving(app: FastAPI) -> AsyncGenerator[None]:
        drafting, judging = Peers(tiers.DRAFTER), Peers(tiers.EXPERT)
        loop = Router(
            drafters=Tier(leases=FixedLeases(drafter, token=token), peers=drafting),
            experts=Tier(leases=FixedLeases(expert, token=token), peers=judging),
            automatic=lambda: Fixed(tokens=settings.router.draft_tokens),
            options=settings.router.options(),
        )
        app.state.service = settings.service(loop, pair)
        yield
        await drafting.close()
        await judging.close()

    door = create_app()
    door.router.lifespan_context = serving
    uvicorn.run(door, host=host, port=port, log_level="warning")
