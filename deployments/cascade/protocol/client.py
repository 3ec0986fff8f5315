"""The router's side of the streams: one per replica, shared by all sessions on that replica.

The first session opens the stream. A broken stream is not repaired: `receive` raises
`DrafterUnavailable` or `ExpertUnavailable` for every session on it, and the next session opens a
new one. A working replica sends a frame at least every `HEARTBEAT_S` seconds, however long its
forward passes take; a stream without frames for longer counts as broken.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias, TypeVarTuple, Unpack

import grpc
from google.protobuf.message import DecodeError

from cascade.errors import CascadeError, Overloaded, Unavailable
from cascade.protocol.codec import decode_server_message, encode_frame, parse_frame
from cascade.protocol.messages import Close
from cascade.protocol.services import (
    HEARTBEAT_S,
    LEASE_KEY,
    PROTOCOL_VERSION,
    STREAM_OPTIONS,
    Description,
    TierKind,
    decode_description,
)
from cascade.protocol.write_buffer import WriteBuffer

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.protocol.codec import ClientMessage, ServerMessage
    from cascade.protocol.tls import Credentials
    from cascade.types import SessionId

    Dial: TypeAlias = Callable[[str, TierKind, str], "StreamCall"]

# After these the replica counts as lost. Counted, not timed: our own event loop may be late.
MISSED_HEARTBEATS_LIMIT = 3
SILENT_HEARTBEATS = 1.5  # without a frame: a session that has not begun tries another replica
TICKS = 4  # looks at the stream per heartbeat

Arguments = TypeVarTuple("Arguments")

_OPTIONS = (
    *STREAM_OPTIONS,
    ("grpc.http2.max_pings_without_data", 0),
    # Give up after 3 s on an address that does not respond; gRPC's default is 20 s.
    ("grpc.min_reconnect_backoff_ms", 3_000),
    # Replicas are in the same network: a proxy from the environment cannot reach them.
    ("grpc.enable_http_proxy", 0),
    # A new stream gets a new connection, without the back-off of the one before.
    ("grpc.use_local_subchannel_pool", 1),
)


class Lease(Protocol):
    """The right to open one session on one replica."""

    address: str
    token: str


class SharedStream(Protocol):
    """The stream to a replica that its sessions share."""

    frames_received: int

    @property
    def silent(self) -> bool:
        """Whether heartbeats are missing, so that the replica may hang or be unreachable."""
        ...

    def send(self, message: ClientMessage) -> int:
        """Queue the message and return its size in bytes; never blocks."""
        ...

    def close_session(self, stream: SessionStream) -> None:
        """End the session here and on the replica."""
        ...

    def lost_error(self) -> Unavailable:
        """Return the error of a session that can receive nothing more."""
        ...


class SessionStream:
    """One session on one replica, until `close` or the end of the shared stream."""

    def __init__(self, stream: SharedStream, session_id: SessionId, epoch: int) -> None:
        self.session_id = session_id
        self.epoch = epoch
        self.sent_bytes = 0
        self.received_bytes = 0
        self._stream = stream
        self._frames_before = stream.frames_received
        self._received: asyncio.Queue[ServerMessage | None] = asyncio.Queue()  # None: the end

    def send(self, message: ClientMessage) -> None:
        """Send a message, in one frame with all others of this event loop iteration.

        Raises:
            Unavailable: The stream is broken.
            InvalidRequest: The message does not fit its proto.
        """
        self.sent_bytes += self._stream.send(message)

    async def receive(self) -> ServerMessage:
        """Return the next message; raises Unavailable once the stream is broken."""
        message = await self._received.get()
        if message is None:
            self.end()
            raise self._stream.lost_error()
        return message

    @property
    def has_message(self) -> bool:
        """Whether `receive` returns or raises without waiting."""
        return not self._received.empty()

    @property
    def replica_active(self) -> bool:
        """Whether the replica has sent any frame, to any session, since this session opened."""
        return self._stream.frames_received > self._frames_before

    @property
    def replica_silent(self) -> bool:
        """Whether heartbeats of the replica are missing."""
        return self._stream.silent

    def close(self) -> None:
        """Close the session on the replica; safe to repeat and on a broken stream."""
        self._stream.close_session(self)

    def deliver(self, message: ServerMessage, size: int) -> None:
        """Hand over a message of `size` bytes that arrived for this session."""
        self.received_bytes += size
        self._received.put_nowait(message)

    def end(self) -> None:
        """Let `receive` raise after the messages that arrived before."""
        self._received.put_nowait(None)


class StreamCall(Protocol):
    """Carries the frames of one stream."""

    async def write(self, frame: bytes) -> None:
        """Send a frame."""
        ...

    async def read(self) -> object:
        """Return the next frame; something other than bytes once the replica ended the call."""
        ...

    async def close(self) -> None:
        """End the call; the replica sees it."""
        ...


class GrpcCall:
    """A gRPC call on a connection of its own; its methods raise `grpc.aio.AioRpcError`."""

    def __init__(
        self,
        address: str,
        kind: TierKind,
        lease: str,
        *,
        credentials: Credentials | None = None,
    ) -> None:
        """Start the call.

        Args:
            address: `host:port` of the replica.
            kind: The tier it belongs to.
            lease: Token of a lease on it, without which it reads nothing.
            credentials: Of TLS; None: without.
        """
        self._channel = _channel(address, kind, credentials)
        method = self._channel.stream_stream(kind.path(kind.stream_method))
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] = method(metadata=_metadata(lease))

    async def write(self, frame: bytes) -> None:
        """Send a frame."""
        await self._call.write(frame)

    async def read(self) -> object:
        """Return the next frame, or gRPC's end-of-file marker."""
        return await self._call.read()

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()


class ReplicaConnection:
    """One stream to a replica, from its first session until it breaks."""

    def __init__(
        self, address: str, kind: TierKind, *, lease: str, delay_s: float, dial: Dial
    ) -> None:
        """Start the stream.

        Args:
            address: `host:port` of the replica.
            kind: The tier it belongs to.
            lease: Token of a lease on it.
            delay_s: Added to every message in each direction.
            dial: Starts the call that carries the frames.
        """
        self.kind = kind
        self.address = address
        self.lease = lease
        self.failure: str | None = None  # why the stream broke
        self.frames_received = 0
        self._delay_s = delay_s
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[SessionId, SessionStream] = {}
        self._write_buffer = WriteBuffer()
        self._silent_ticks = 0
        self._call = dial(address, kind, lease)
        self._task = asyncio.create_task(self._run())

    @property
    def silent(self) -> bool:
        """Whether heartbeats are missing, so that the replica may hang or be unreachable."""
        return self._silent_ticks >= TICKS * SILENT_HEARTBEATS

    @property
    def alive(self) -> bool:
        """Whether the replica sends frames."""
        return self.failure is None and self.frames_received > 0 and not self.silent

    def open_session(self, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a stream for the session; the stream of an older epoch ends."""
        if (old := self._sessions.get(session_id)) is not None:
            old.end()
        stream = self._sessions[session_id] = SessionStream(self, session_id, epoch)
        return stream

    def close_session(self, stream: SessionStream) -> None:
        """End the session here and on the replica."""
        stream.end()
        if self._sessions.get(stream.session_id) is stream:
            del self._sessions[stream.session_id]
            if self.failure is None:
                self.send(Close(session_id=stream.session_id, epoch=stream.epoch))

    def send(self, message: ClientMessage) -> int:
        """Queue the message and return its size in bytes.

        Raises:
            Unavailable: The stream is broken, or the replica does not read it.
            InvalidRequest: The message does not fit its proto.
        """
        if self.failure is not None:
            raise self.lost_error()
        frame = encode_frame(message, self.kind.request)
        try:
            self._after_delay(self._write_buffer.put, frame)
        except Overloaded as error:
            raise self._unavailable(error.message) from error
        return len(frame)

    def lost_error(self) -> Unavailable:
        """Return the error of a session that can receive nothing more."""
        return self._unavailable(self.failure or "the session was closed")

    async def close(self) -> None:
        """End the stream."""
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def _unavailable(self, reason: str) -> Unavailable:
        return self.kind.unavailable(f"the {self.kind.name} at {self.address}: {reason}")

    def _after_delay(
        self, callback: Callable[[Unpack[Arguments]], None], *args: *Arguments
    ) -> None:
        if self._delay_s:
            self._loop.call_later(self._delay_s, callback, *args)
        else:
            callback(*args)

    async def _run(self) -> None:
        failure = "the stream was closed"
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._read_frames())
                group.create_task(self._write_frames())
                group.create_task(self._watch_heartbeats())
        except* (grpc.aio.AioRpcError, asyncio.InvalidStateError, CascadeError) as failed:
            failure = _description(failed.exceptions[0])
        finally:
            self.failure = failure
            for stream in self._sessions.values():
                stream.end()
            self._sessions.clear()
            await self._call.close()

    async def _write_frames(self) -> None:
        while (frame := await self._write_buffer.take()) is not None:
            await self._call.write(frame)

    async def _read_frames(self) -> None:
        while isinstance(data := await self._call.read(), bytes):
            self._silent_ticks = 0
            self.frames_received += 1
            self._deliver_frame(data)
        raise self.kind.unavailable("the replica ended the stream")

    def _deliver_frame(self, data: bytes) -> None:
        items = parse_frame(data, self.kind.response)
        for item in items:
            message = decode_server_message(item)
            stream = self._sessions.get(message.session_id)
            if stream is not None and stream.epoch == message.epoch:
                size = len(data) if len(items) == 1 else item.ByteSize()
                self._after_delay(stream.deliver, message, size)

    async def _watch_heartbeats(self) -> None:
        while self._silent_ticks < TICKS * (MISSED_HEARTBEATS_LIMIT + 1):
            await asyncio.sleep(HEARTBEAT_S / TICKS)
            self._silent_ticks += 1
        silent_s = MISSED_HEARTBEATS_LIMIT * HEARTBEAT_S
        raise self.kind.unavailable(f"it has sent nothing for {silent_s:g} s")


class ReplicaClient:
    """Connects to one replica by its own address. Must be used on one event loop."""

    def __init__(
        self,
        address: str,
        kind: TierKind,
        *,
        credentials: Credentials | None = None,
        delay_s: float = 0.0,
        dial: Dial | None = None,
    ) -> None:
        """Connect to nothing yet.

        Args:
            address: `host:port` of the replica.
            kind: The tier it belongs to.
            credentials: Of TLS; None: without.
            delay_s: Added to every message in each direction, to emulate a network.
            dial: Starts the call of a stream; by default over gRPC.
        """
        self.address = address
        self.kind = kind
        self.delay_s = delay_s
        self._credentials = credentials
        self._dial = dial or partial(GrpcCall, credentials=credentials)
        self.description: Description | None = None  # of the last call of `describe`
        self._connection: ReplicaConnection | None = None

    @property
    def connected(self) -> bool:
        """Whether the replica sends frames and speaks this version of the protocol."""
        if self.description and self.description.protocol_version != PROTOCOL_VERSION:
            return False
        return self._connection is not None and self._connection.alive

    def connect(self, lease: str) -> ReplicaConnection:
        """Return the connection, a new one if there is none or it is broken.

        Args:
            lease: Token of a lease on the replica, which lets a new connection in.
        """
        if self._connection is None or self._connection.failure is not None:
            self._connection = ReplicaConnection(
                self.address, self.kind, lease=lease, delay_s=self.delay_s, dial=self._dial
            )
        return self._connection

    def open_stream(self, session_id: SessionId, epoch: int, *, lease: str) -> SessionStream:
        """Return a stream for the session; connects if there is no connection or it is broken.

        Args:
            session_id: The session.
            epoch: Grows each time the session moves to another replica.
            lease: The token of its lease.
        """
        return self.connect(lease).open_session(session_id, epoch)

    async def describe(self, *, timeout_s: float = 2.0) -> Description:
        """Return what the replica serves, with the lease of the connection to it.

        Raises:
            Unavailable: It does not answer; DrafterUnavailable or ExpertUnavailable.
        """
        self.description = None
        lease = "" if self._connection is None else self._connection.lease
        async with _channel(self.address, self.kind, self._credentials) as channel:
            describe = channel.unary_unary(self.kind.path(self.kind.describe_method))
            try:
                data = await describe(b"", timeout=timeout_s, metadata=_metadata(lease))
                self.description = decode_description(data, self.kind)
            except (grpc.aio.AioRpcError, DecodeError) as error:
                raise self.kind.unavailable(
                    f"the {self.kind.name} at {self.address} does not describe itself: "
                    f"{_description(error)}"
                ) from error
        return self.description

    async def close(self) -> None:
        """End the connection and every session on it."""
        if self._connection is not None:
            await self._connection.close()
            self._connection = None


class ReplicaClients:
    """The replicas of one tier by address, each with at most one stream."""

    def __init__(
        self,
        kind: TierKind,
        *,
        credentials: Credentials | None = None,
        delay_s: float = 0.0,
        dial: Dial | None = None,
    ) -> None:
        """Connect to nothing yet; the parameters are those of `ReplicaClient`."""
        self.kind = kind
        self.delay_s = delay_s
        self._credentials = credentials
        self._dial = dial
        self._clients: dict[str, ReplicaClient] = {}

    def __getitem__(self, address: str) -> ReplicaClient:
        if address not in self._clients:
            self._clients[address] = ReplicaClient(
                address,
                self.kind,
                credentials=self._credentials,
                delay_s=self.delay_s,
                dial=self._dial,
            )
        return self._clients[address]

    @property
    def connected(self) -> list[ReplicaClient]:
        """Return the replicas that are connected now."""
        return [client for client in self._clients.values() if client.connected]

    def open_stream(self, lease: Lease, session_id: SessionId, epoch: int) -> SessionStream:
        """Return a stream for a session on one replica.

        Args:
            lease: Its lease there.
            session_id: The session.
            epoch: Grows each time the session moves to another replica.
        """
        return self[lease.address].open_stream(session_id, epoch, lease=lease.token)

    async def close(self) -> None:
        """End all streams."""
        clients, self._clients = self._clients, {}
        await asyncio.gather(*(client.close() for client in clients.values()))


def _channel(address: str, kind: TierKind, credentials: Credentials | None) -> grpc.aio.Channel:
    if credentials is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    options = (*_OPTIONS, *credentials.channel_options(kind.name))
    return grpc.aio.secure_channel(address, credentials.channel(), options=options)


def _metadata(lease: str) -> tuple[tuple[str, str], ...]:
    return ((LEASE_KEY, lease),)


def _description(error: BaseException) -> str:
    if isinstance(error, grpc.aio.AioRpcError):
        return f"{error.code().name}: {error.details()}"
    return str(error)
