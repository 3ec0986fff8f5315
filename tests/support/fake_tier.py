"""A tier without network, replicas or models: leases and streams that a test scripts."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from cascade.protocol import services
from cascade.protocol.messages import (
    Close,
    Judge,
    Judgement,
    Proposal,
    Propose,
)
from cascade.router.tier_session import TierClient
from cascade.types import Block, DecodingParams, Origin, Session, SessionId, Verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from cascade.errors import CascadeError
    from cascade.protocol.client import Lease
    from cascade.router.tier_session import MessageFactory


def session(*tokens: int, prompt: tuple[int, ...] = (1, 2)) -> Session:
    """Return a session that has committed `tokens`."""
    return Session(
        id=SessionId("s"),
        prompt=prompt,
        policy=DecodingParams(),
        tokens=tokens,
        origins=(Origin.EXPERT,) * len(tokens),
    )


@dataclass
class FakeLease:
    """A lease that remembers whether it was released."""

    address: str
    token: str = "token"  # noqa: S105 - no secret
    closed: bool = False

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeLeases:
    """Grants leases, or raises the next of `errors`."""

    errors: list[CascadeError] = field(default_factory=list["CascadeError"])
    granted: list[FakeLease] = field(default_factory=list[FakeLease])
    gate: asyncio.Event | None = None  # if set, a lease is granted only after it

    async def take(self) -> FakeLease:
        if self.gate is not None:
            await self.gate.wait()
        if self.errors:
            raise self.errors.pop(0)
        self.granted.append(FakeLease(f"replica-{len(self.granted)}"))
        return self.granted[-1]


@dataclass
class FakeStream:
    """The router's end of a session's stream; `reply` answers each message."""

    reply: Callable[[object, FakeStream], Sequence[object]]
    address: str
    epoch: int
    sent: list[Any] = field(default_factory=list[Any])
    inbox: asyncio.Queue[object] = field(default_factory=asyncio.Queue)
    sent_bytes: int = 3
    received_bytes: int = 5
    replica_active: bool = False
    replica_silent: bool = False
    closed: bool = False

    def send(self, message: object) -> None:
        self.sent.append(message)
        for one in self.reply(message, self):
            self.inbox.put_nowait(one)

    async def receive(self) -> object:
        message = await self.inbox.get()
        if isinstance(message, Exception):
            raise message
        return message

    @property
    def has_message(self) -> bool:
        return not self.inbox.empty()

    def close(self) -> None:
        self.sent.append(Close(session_id=SessionId("s"), epoch=self.epoch))
        self.closed = True


@dataclass
class FakeClients:
    """Opens streams whose messages `reply` answers."""

    reply: Callable[[object, FakeStream], Sequence[object]]
    kind: services.TierKind = services.DRAFTER
    streams: list[FakeStream] = field(default_factory=list[FakeStream])
    connected: list[object] = field(default_factory=list[object])
    silent: bool = False  # no stream hears anything

    def open_stream(self, lease: Lease, session_id: SessionId, epoch: int) -> FakeStream:
        del session_id
        stream = FakeStream(reply=self.reply, address=lease.address, epoch=epoch)
        stream.replica_silent = self.silent
        self.streams.append(stream)
        return self.streams[-1]


@dataclass
class FakeTier:
    """A tier whose replies a test scripts."""

    reply: Callable[[object, FakeStream], Sequence[object]]
    kind: services.TierKind = services.DRAFTER
    leases: FakeLeases = field(default_factory=FakeLeases)
    clients: FakeClients = field(init=False)

    def __post_init__(self) -> None:
        self.clients = FakeClients(self.reply, self.kind)

    @property
    def client(self) -> TierClient:
        """Return the tier as a router takes it."""
        leases: Any = self.leases
        clients: Any = self.clients
        return TierClient(leases=leases, clients=clients)

    @property
    def messages(self) -> list[Any]:
        """Return every message sent on any stream."""
        return [message for stream in self.clients.streams for message in stream.sent]


def asking(after: Session) -> MessageFactory:
    """Return what builds a message that asks for two tokens after a session."""

    def propose(epoch: int, digest: int, missing: tuple[int, ...]) -> Propose:
        return Propose(
            session_id=after.id,
            epoch=epoch,
            position=after.position,
            digest=digest,
            count=2,
            tokens=missing,
        )

    return propose


def proposal(message: Propose, *tokens: int, deferred: bool = False, passes: int = 1) -> Proposal:
    """Return the reply to a Propose."""
    return Proposal(
        session_id=message.session_id,
        epoch=message.epoch,
        position=message.position,
        digest=message.digest,
        block=Block(tokens=tokens),
        deferred=deferred,
        passes=passes,
    )


def judgement(message: Judge, *tokens: int, accepted: int = 0) -> Judgement:
    """Return the reply to a Judge: `tokens`, of which `accepted` were drafted."""
    origins = (Origin.DRAFTER,) * accepted + (Origin.EXPERT,) * (len(tokens) - accepted)
    return Judgement(
        session_id=message.session_id,
        epoch=message.epoch,
        position=message.position,
        digest=message.digest,
        verdict=Verdict(accepted=accepted, tokens=tokens, origins=origins),
    )


def drafting(*tokens: int) -> Callable[[object, FakeStream], Sequence[object]]:
    """Return a script that proposes the same tokens whenever it is asked."""

    def reply(message: object, stream: FakeStream) -> Sequence[object]:
        del stream
        return [proposal(message, *tokens)] if isinstance(message, Propose) else []

    return reply


def silent(message: object, stream: FakeStream) -> Sequence[object]:
    """Reply nothing."""
    del message, stream
    return []
