"""Both tiers and the loop in one process without Ray, over real gRPC on loopback or by calls."""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascade.drafter.drafter import Drafter
from cascade.errors import CascadeError, Unavailable
from cascade.expert.expert import Expert
from cascade.protocol import grpc_status, services
from cascade.protocol.client import ReplicaClient, ReplicaClients, SessionStream
from cascade.protocol.messages import Close, Refusal
from cascade.protocol.server import Connection
from cascade.router.leases import FixedLeases
from cascade.router.tier_session import TierClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cascade.api.context import ServingContext
    from cascade.protocol.codec import ClientMessage, ServerMessage
    from cascade.protocol.server import TierServicer as TierServer
    from cascade.protocol.services import Description, TierKind
    from cascade.router.router import Router
    from cascade.settings import Application
    from cascade.types import SessionId


class DirectStream(Connection):
    """Both ends of one session's stream: items are handed over by calls."""

    def __init__(self, tier: TierServer, kind: TierKind, session_id: SessionId, epoch: int) -> None:
        super().__init__(kind)
        self.link = SessionStream(_Caller(self), session_id, epoch)
        self._tier = tier
        self._open = True

    def ask(self, item: ClientMessage) -> None:
        """Hand an item to the tier; an error refuses the session."""
        if not self._open:
            raise self.lost()
        try:
            self._tier.receive(self, item)
        except CascadeError as error:
            self.send(grpc_status.refusal(self.link.session_id, self.link.epoch, error))

    def send(self, item: ServerMessage) -> None:
        """Hand an answer to the link."""
        self._open = self._open and not isinstance(item, Refusal)
        self.link.deliver(item, 0)

    def leave(self) -> None:
        """Free the session in the tier."""
        self.link.end()
        if self._open:
            self._open = False
            close = Close(session_id=self.link.session_id, epoch=self.link.epoch)
            self._tier.receive(self, close)

    def lost(self) -> Unavailable:
        """Return the error of a link that was closed or refused."""
        return self.kind.unavailable(f"the link to the {self.kind.name} was closed")


class _Caller:
    """The link's end."""

    frames = 0  # none: items are handed over

    def __init__(self, stream: DirectStream) -> None:
        self._stream = stream

    def send(self, item: ClientMessage) -> int:
        self._stream.ask(item)
        return 0

    def leave(self, link: SessionStream) -> None:
        del link
        self._stream.leave()

    def lost(self) -> Unavailable:
        return self._stream.lost()


class DirectPeer(ReplicaClient):
    """A tier of this process."""

    def __init__(self, tier: TierServer, kind: TierKind) -> None:
        super().__init__("here", kind)
        self._tier = tier

    def link(self, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a link for the session."""
        return DirectStream(self._tier, self.kind, session_id, epoch).link

    async def describe(self, *, timeout_s: float = 5.0) -> Description:
        """Return what the tier serves."""
        del timeout_s
        return self._tier.describe()


class DirectPeers(ReplicaClients):
    """The one replica of a tier, in this process, whatever the address."""

    def __init__(self, tier: TierServer, kind: TierKind) -> None:
        super().__init__(kind)
        self._peer = DirectPeer(tier, kind)

    def __getitem__(self, address: str) -> ReplicaClient:
        return self._peer


ANY_PORT = "127.0.0.1:0"


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """A server without Ray: its parts, each reachable."""

    drafter: Drafter
    expert: Expert
    router: Router
    service: ServingContext
    token: str  # of both tiers' leases


@asynccontextmanager
async def local_server(
    settings: Application, *, delay_s: float = 0.0, direct: bool = False
) -> AsyncGenerator[LocalServer]:
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
            kind.name: TierClient(
                leases=FixedLeases([replica.address], token=token),
                clients=DirectPeers(replica, kind)
                if direct
                else ReplicaClients(kind, delay_s=delay_s),
            )
            for kind, replica in ((services.DRAFTER, drafter), (services.EXPERT, expert))
        }
        for tier in reached.values():
            cleanup.push_async_callback(tier.clients.close)
        router = settings.router.loop(drafters=reached["drafter"], experts=reached["expert"])
        yield LocalServer(
            drafter=drafter,
            expert=expert,
            router=router,
            service=settings.serving_context(router, pair),
            token=token,
        )
