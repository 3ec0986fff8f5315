"""The client's side of the streams: one per peer replica, shared by all sessions on it.

A stream opens with the first link and cannot be moved or mended. When it breaks, every link on it
raises `DrafterUnavailable` or `ExpertUnavailable` from `receive`, and the next link opens another.
A replica that works sends something every second, however long it takes over what it was asked; the
stream of one that is silent for longer counts as broken.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVarTuple, Unpack

import grpc
from google.protobuf.message import DecodeError

from cascade.errors import CascadeError, Overloaded, Unavailable
from cascade.protocol.codec import decode_server_message, encode_frame, parse_frame
from cascade.protocol.messages import Close
from cascade.protocol.services import (
    HEARTBEAT_S,
    STREAM_OPTIONS,
    Description,
    TierKind,
    decode_description,
)
from cascade.protocol.write_buffer import WriteBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.protocol.codec import ClientMessage, ServerMessage
    from cascade.types import SessionId

    Dial: TypeAlias = Callable[[str, TierKind], "Call"]

MISSED_HEARTBEATS_LIMIT = (
    3  # after which a replica is taken for lost; counted, for our own loop may be late
)

Arguments = TypeVarTuple("Arguments")

_OPTIONS = (
    *STREAM_OPTIONS,
    ("grpc.http2.max_pings_without_data", 0),
    # One that never answers is given up after 3 s; core waits 20 s by default.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    # Replicas are neighbours: a proxy from the environment would only be in the way.
    ("grpc.enable_http_proxy", 0),
    # A new stream is a new connection, without the back-off of the one before.
    ("grpc.use_local_subchannel_pool", 1),
)


class SharedStream(Protocol):
    """What carries the items of links."""

    frames_received: int  # received

    def send(self, message: ClientMessage) -> int:
        """Put the item on its way and return its size in bytes; never blocks."""
        ...

    def close_session(self, stream: SessionStream) -> None:
        """End the link, and the session on the replica."""
        ...

    def lost_error(self) -> Unavailable:
        """Return the error of a link that can receive nothing more."""
        ...


class SessionStream:
    """One session on one replica, until `close` or the end of the stream."""

    def __init__(self, stream: SharedStream, session_id: SessionId, epoch: int) -> None:
        self.session_id = session_id
        self.epoch = epoch
        self.sent_bytes = 0
        self.received_bytes = 0
        self._stream = stream
        self._frames = stream.frames_received
        self._answers: asyncio.Queue[ServerMessage | None] = asyncio.Queue()

    def send(self, item: ClientMessage) -> None:
        """Send an item with all others of this tick; never blocks.

        Raises:
            Unavailable: the stream is broken.
            InvalidRequest: the item does not fit the wire.
        """
        self.sent_bytes += self._stream.send(item)

    async def receive(self) -> ServerMessage:
        """Return the next answer; raises Unavailable once the stream is broken."""
        answer = await self._answers.get()
        if answer is None:
            self._answers.put_nowait(None)
            raise self._stream.lost_error()
        return answer

    @property
    def has_message(self) -> bool:
        """Whether `receive` would not wait."""
        return not self._answers.empty()

    @property
    def replica_active(self) -> bool:
        """Whether the replica has said anything since, be it to others."""
        return self._stream.frames_received > self._frames

    def close(self) -> None:
        """Free the session on the replica; safe to repeat and on a broken stream."""
        self._stream.close_session(self)

    def deliver(self, answer: ServerMessage, size: int) -> None:
        """Take an answer that came over the stream, `size` bytes long."""
        self.received_bytes += size
        self._answers.put_nowait(answer)

    def end(self) -> None:
        """Let `receive` raise once it has returned what came before."""
        self._answers.put_nowait(None)


class Call(Protocol):
    """Carries the frames of one stream."""

    async def write(self, frame: bytes) -> None:
        """Send a frame."""
        ...

    async def read(self) -> object:
        """Return the next frame, or what is not bytes where the peer has ended the call."""
        ...

    async def close(self) -> None:
        """End the call; the peer hears of it."""
        ...


class GrpcCall:
    """A call on a connection of its own."""

    def __init__(self, address: str, kind: TierKind) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_OPTIONS)
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] = self._channel.stream_stream(
            kind.path(kind.stream_method)
        )()

    async def write(self, frame: bytes) -> None:
        """Send a frame; raises what grpc raises."""
        await self._call.write(frame)

    async def read(self) -> object:
        """Return the next frame, or grpc's end of file; raises what grpc raises."""
        return await self._call.read()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class ReplicaConnection:
    """One call, from its first link until it breaks."""

    def __init__(self, address: str, kind: TierKind, delay_s: float, dial: Dial) -> None:
        self.kind = kind
        self.address = address
        self.failure: str | None = None
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._links: dict[SessionId, SessionStream] = {}
        self._outbox = WriteBuffer()
        self.frames_received = 0
        self._silence = 0  # beats since the last frame
        self._call = dial(address, kind)
        self._task = asyncio.create_task(self._run())

    def open_session(self, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a link for the session; one of an older epoch ends."""
        if (old := self._links.get(session_id)) is not None:
            old.end()
        link = self._links[session_id] = SessionStream(self, session_id, epoch)
        return link

    def close_session(self, link: SessionStream) -> None:
        """End the link, and the session on the replica."""
        link.end()
        if self._links.get(link.session_id) is link:
            del self._links[link.session_id]
            if self.failure is None:
                self.send(Close(session_id=link.session_id, epoch=link.epoch))

    def send(self, item: ClientMessage) -> int:
        """Put the item on its way and return its size in bytes."""
        if self.failure is not None:
            raise self.lost_error()
        frame = encode_frame(item, self.kind.request)
        try:
            self._later(self._outbox.put, frame)
        except Overloaded as error:
            raise self.kind.unavailable(f"{self._peer}: {error.message}") from error
        return len(frame)

    def lost_error(self) -> Unavailable:
        """Return the error of a link that can receive nothing more."""
        return self.kind.unavailable(f"{self._peer}: {self.failure or 'the link was closed'}")

    async def close(self) -> None:
        """Cut the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    @property
    def _peer(self) -> str:
        return f"the {self.kind.name} at {self.address}"

    def _later(self, act: Callable[[Unpack[Arguments]], None], *args: *Arguments) -> None:
        if self._delay_s:
            self._loop.call_later(self._delay_s, act, *args)
        else:
            act(*args)

    async def _run(self) -> None:
        failure = "the stream was closed"
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read())
                group.create_task(self._write())
                group.create_task(self._listen())
        except* (grpc.aio.AioRpcError, asyncio.InvalidStateError, CascadeError) as failed:
            failure = _sentence(failed.exceptions[0])
        finally:
            self._break(failure)
            await self._call.close()

    def _break(self, failure: str) -> None:
        self.failure = failure
        for link in self._links.values():
            link.end()
        self._links.clear()

    async def _write(self) -> None:
        while (frame := await self._outbox.take()) is not None:
            await self._call.write(frame)

    async def _read(self) -> None:
        while isinstance(data := await self._call.read(), bytes):
            self._silence = 0
            self.frames_received += 1
            self._receive(data)
        raise self.kind.unavailable("the replica ended the stream")

    async def _listen(self) -> None:
        while self._silence <= MISSED_HEARTBEATS_LIMIT:
            await asyncio.sleep(HEARTBEAT_S)
            self._silence += 1
        raise self.kind.unavailable(
            f"it has been silent for {MISSED_HEARTBEATS_LIMIT * HEARTBEAT_S:g} s"
        )

    def _receive(self, data: bytes) -> None:
        messages = parse_frame(data, self.kind.response)
        for message in messages:
            answer = decode_server_message(message)
            link = self._links.get(answer.session_id)
            if link is not None and link.epoch == answer.epoch:
                size = len(data) if len(messages) == 1 else message.ByteSize()
                self._later(link.deliver, answer, size)


class ReplicaClient:
    """One replica, reached on its own address. Must be used on one event loop.

    `delay_s` is added to every item each way, to emulate a network; `dial` begins a stream's call.
    """

    def __init__(
        self, address: str, kind: TierKind, *, delay_s: float = 0.0, dial: Dial = GrpcCall
    ) -> None:
        self.address = address
        self.kind = kind
        self.delay_s = delay_s
        self._dial = dial
        self._stream: ReplicaConnection | None = None

    def open_stream(self, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a link for the session, on a new stream if there is none or it is broken."""
        if self._stream is None or self._stream.failure is not None:
            self._stream = ReplicaConnection(self.address, self.kind, self.delay_s, self._dial)
        return self._stream.open_session(session_id, epoch)

    async def describe(self, *, timeout_s: float = 5.0) -> Description:
        """Return what the replica serves; raises DrafterUnavailable or ExpertUnavailable."""
        async with grpc.aio.insecure_channel(self.address, options=_OPTIONS) as channel:
            ask = channel.unary_unary(self.kind.path(self.kind.describe_method))
            try:
                return decode_description(await ask(b"", timeout=timeout_s), self.kind)
            except (grpc.aio.AioRpcError, DecodeError) as error:
                raise self.kind.unavailable(
                    f"the {self.kind.name} at {self.address} does not say what it serves: "
                    f"{_sentence(error)}"
                ) from error

    async def close(self) -> None:
        """Cut the stream; every link on it ends."""
        if self._stream is not None:
            await self._stream.close()
            self._stream = None


class ReplicaClients:
    """The replicas of one tier by address, each with at most one stream."""

    def __init__(self, kind: TierKind, *, delay_s: float = 0.0, dial: Dial = GrpcCall) -> None:
        self.kind = kind
        self.delay_s = delay_s
        self._dial = dial
        self._peers: dict[str, ReplicaClient] = {}

    def __getitem__(self, address: str) -> ReplicaClient:
        if address not in self._peers:
            self._peers[address] = ReplicaClient(
                address, self.kind, delay_s=self.delay_s, dial=self._dial
            )
        return self._peers[address]

    def open_stream(self, address: str, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a link for the session to the replica at the address."""
        return self[address].open_stream(session_id, epoch)

    async def close(self) -> None:
        """Cut all streams."""
        peers, self._peers = self._peers, {}
        await asyncio.gather(*(peer.close() for peer in peers.values()))


def _sentence(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
