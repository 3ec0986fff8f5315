"""Both tiers and the loop in one process without Ray, over real gRPC on loopback or by calls."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascade.drafter import Drafter
from cascade.expert import Expert
from cascade.lab.direct import DirectPeers
from cascade.operations.leases import FixedLeases
from cascade.operations.places import Tier
from cascade.wire import tiers
from cascade.wire.channel import Peers

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cascade.ingress.service import Service
    from cascade.router import Router
    from cascade.settings import Application

ANY_PORT = "127.0.0.1:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """A server without Ray: its parts, each reachable."""

    drafter: Drafter
    expert: Expert
    router: Router
    service: Service
    token: str  # of both tiers' leases


@asynccontextmanager
async def stack(
    settings: Application, *, delay_s: float = 0.0, direct: bool = False
) -> AsyncGenerator[Stack]:
    """Start one replica of each tier and a router over them; stop all at the end.

    Args:
        settings: What `cascade.app:build` takes; replica counts and placement are not read.
        delay_s: Added to every item between router and tiers each way, to emulate a network.
        direct: Call the tiers instead of going over gRPC: a loop in one process.

    Raises:
        StartupError: The pair cannot be served.
    """
    token = secrets.token_urlsafe()
    pair = settings.pair()
    async with AsyncExitStack() as cleanup:
        drafter = await Drafter.start(settings.drafter.options(), address=ANY_PORT, token=token)
        cleanup.push_async_callback(drafter.stop)
        expert = await Expert.start(settings.expert.options(), address=ANY_PORT, token=token)
        cleanup.push_async_callback(expert.stop)
        reached = {
            kind.name: Tier(
                leases=FixedLeases([replica.address], token=token),
                peers=DirectPeers(replica, kind) if direct else Peers(kind, delay_s=delay_s),
            )
            for kind, replica in ((tiers.DRAFTER, drafter), (tiers.EXPERT, expert))
        }
        for tier in reached.values():
            cleanup.push_async_callback(tier.peers.close)
        router = settings.router.loop(drafters=reached["drafter"], experts=reached["expert"])
        yield Stack(
            drafter=drafter,
            expert=expert,
            router=router,
            service=settings.service(router, pair),
            token=token,
        )
