"""All three parts in one process without Ray: for tests, benchmarks and `cascade evaluate`.

By default router and tiers talk over gRPC. `direct` replaces gRPC by calls: verdicts, queues and
refusals are those of gRPC, only encoding, network and processes are missing.
"""

from __future__ import annotations

import secrets
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.drafter.drafter import Drafter
from cascade.errors import CascadeError, Unavailable
from cascade.expert.expert import Expert
from cascade.protocol import grpc_status, services
from cascade.protocol.client import ReplicaClient, ReplicaClients, SessionStream
from cascade.protocol.messages import Close, Refusal
from cascade.protocol.server import Connection
from cascade.protocol.tls import credentials_of
from cascade.router.leases import FixedLeases
from cascade.router.tier_session import TierClient

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from cascade.api.context import ServingContext
    from cascade.protocol.codec import ClientMessage, ServerMessage
    from cascade.protocol.server import TierServicer
    from cascade.protocol.services import Description, TierKind
    from cascade.router.router import Router
    from cascade.settings import Application
    from cascade.types import SessionId

ANY_PORT = "127.0.0.1:0"


class DirectConnection(Connection):
    """Both ends of one session's stream; messages are handed over by calls."""

    def __init__(
        self, tier: TierServicer, kind: TierKind, session_id: SessionId, epoch: int
    ) -> None:
        """Connect a session to a tier of this process.

        Args:
            tier: The replica.
            kind: Drafter or expert.
            session_id: The session.
            epoch: Its epoch.
        """
        super().__init__(kind)
        self.stream = SessionStream(_CallingSide(self), session_id, epoch)
        self._tier = tier
        self._open = True

    def receive(self, message: ClientMessage) -> None:
        """Hand a message to the tier; an error refuses the session, which then gets no more."""
        if not self._open:
            return
        try:
            self._tier.receive(self, message)
        except CascadeError as error:
            self.send(grpc_status.refusal(self.stream.session_id, self.stream.epoch, error))

    def send(self, message: ServerMessage) -> None:
        """Hand a message to the router."""
        self._open = self._open and not isinstance(message, Refusal)
        self.stream.deliver(message, 0)

    def leave(self) -> None:
        """Close the session in the tier."""
        self.stream.end()
        if self._open:
            self._open = False
            close = Close(session_id=self.stream.session_id, epoch=self.stream.epoch)
            self._tier.receive(self, close)

    def lost(self) -> Unavailable:
        """Return the error of a stream that was closed or refused."""
        return self.kind.unavailable(f"the stream to the {self.kind.name} was closed")


class _CallingSide:
    """The router's end."""

    frames_received = 0  # nothing is encoded
    silent = False

    def __init__(self, connection: DirectConnection) -> None:
        self._connection = connection

    def send(self, message: ClientMessage) -> int:
        self._connection.receive(message)
        return 0

    def close_session(self, stream: SessionStream) -> None:
        del stream
        self._connection.leave()

    def lost_error(self) -> Unavailable:
        return self._connection.lost()


class DirectClient(ReplicaClient):
    """A replica of this process."""

    def __init__(self, tier: TierServicer, kind: TierKind) -> None:
        super().__init__("here", kind)
        self._tier = tier
        self.description = tier.describe()

    @property
    def connected(self) -> bool:
        """Return true."""
        return True

    def open_stream(self, session_id: SessionId, epoch: int, *, lease: str) -> SessionStream:
        """Return a stream for the session."""
        del lease  # the tier looks at the one in its `Open`
        return DirectConnection(self._tier, self.kind, session_id, epoch).stream

    async def describe(self, *, timeout_s: float = 5.0) -> Description:
        """Return what the tier serves."""
        del timeout_s
        return self._tier.describe()


class DirectClients(ReplicaClients):
    """The one replica of a tier in this process, whatever the address."""

    def __init__(self, tier: TierServicer, kind: TierKind) -> None:
        super().__init__(kind)
        self._client = DirectClient(tier, kind)

    @property
    def connected(self) -> list[ReplicaClient]:
        """Return the one replica."""
        return [self._client]

    def __getitem__(self, address: str) -> ReplicaClient:
        return self._client


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalServer:
    """The parts of a server without Ray."""

    drafter: Drafter
    expert: Expert
    router: Router
    service: ServingContext
    token: str  # a lease token that both tiers accept


@asynccontextmanager
async def local_server(
    settings: Application, *, delay_s: float = 0.0, direct: bool = False
) -> AsyncGenerator[LocalServer]:
    """Start one replica of each tier and a router; stop all at the end.

    Args:
        settings: What `cascade.app:build` takes; replica counts and placement are not read.
        delay_s: Added to every message between router and tiers, each way, to emulate a network.
        direct: Call the tiers instead of going over gRPC.

    Raises:
        StartupError: The pair cannot be served.
    """
    token = secrets.token_urlsafe()
    pair, credentials = settings.pair(), credentials_of(settings.tls_files)
    shared: dict[str, Any] = {"address": ANY_PORT, "token": token, "credentials": credentials}
    async with AsyncExitStack() as cleanup:
        drafter = await Drafter.start(settings.drafter_options(), **shared)
        cleanup.push_async_callback(drafter.stop)
        expert = await Expert.start(settings.expert.options(), **shared)
        cleanup.push_async_callback(expert.stop)
        tiers: list[TierClient] = []
        for kind, replica in ((services.DRAFTER, drafter), (services.EXPERT, expert)):
            remote = ReplicaClients(kind, credentials=credentials, delay_s=delay_s)
            clients = DirectClients(replica, kind) if direct else remote
            cleanup.push_async_callback(clients.close)
            leases = FixedLeases([replica.address], token=token)
            tiers.append(TierClient(leases=leases, clients=clients))
            await tiers[-1].connect()
        router = settings.router.loop(drafters=tiers[0], experts=tiers[1])
        service = settings.serving_context(
            router,
            pair,
            ready=router.ready,
            tier_context=router.context_tokens,
            warnings=router.warnings,
        )
        if service.grammars is not None:
            cleanup.push_async_callback(service.grammars.close)
        yield LocalServer(
            drafter=drafter, expert=expert, router=router, service=service, token=token
        )
