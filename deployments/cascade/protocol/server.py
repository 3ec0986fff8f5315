"""The gRPC server of a tier: frames in, items to the tier, answers out as few frames as can be.

A stream ends for the tier when the client half-closes, cancels or vanishes: `grpc.aio` ends the
request iterator alike. A frame that cannot be read aborts its stream; an item that cannot be read,
or names no open session, refuses its session alone. A frame without items says that the tier works.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Protocol, TypeAlias

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cascade.errors import CascadeError, Internal, InvalidRequest, Overloaded, StartupError
from cascade.protocol import grpc_status
from cascade.protocol.codec import decode_client_message, encode_frame, parse_frame, session_of
from cascade.protocol.messages import Close, Judge, Open, Propose, Refusal, Score
from cascade.protocol.services import (
    HEARTBEAT_S,
    STREAM_OPTIONS,
    Description,
    TierKind,
    encode_description,
)
from cascade.protocol.validation import check
from cascade.protocol.write_buffer import WriteBuffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from cascade.protocol.codec import ClientMessage, FrameItem, ServerMessage
    from cascade.types import SessionId

    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]

logger = logging.getLogger(__name__)

_OPTIONS = (
    *STREAM_OPTIONS,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    # A router needs one, a health check another.
    ("grpc.max_concurrent_streams", 128),
    # A second server on a port must fail, not share its connections.
    ("grpc.so_reuseport", 0),
)


class TierServicer(Protocol):
    """What a server serves. Called on the event loop; nothing here may block."""

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        """Take an item of an open session; a CascadeError refuses that session."""
        ...

    def disconnected(self, connection: Connection) -> None:
        """Free all sessions of a stream that ended."""
        ...

    def describe(self) -> Description:
        """Return what is served, and the limits that the server enforces."""
        ...

    @property
    def alive(self) -> bool:
        """Whether what was asked is being worked on; clients leave a tier that does not say so."""
        ...


class Connection:
    """One client's stream. Equal only to itself."""

    def __init__(self, kind: TierKind) -> None:
        self.kind = kind
        self.epochs: dict[SessionId, int] = {}  # of the open sessions
        self.write_buffer = WriteBuffer()
        self.ended = asyncio.Event()
        self.failure: CascadeError | None = None
        self.on_send: Callable[[ServerMessage], None] = lambda _: None  # hears of every answer

    def send(self, message: ServerMessage) -> None:
        """Send an answer with all others of this tick; on the event loop, never blocks.

        What is sent to a client that has gone is dropped.
        """
        if self.ended.is_set():
            return
        self.on_send(message)
        if isinstance(message, Refusal) and self.epochs.get(message.session_id) == message.epoch:
            del self.epochs[message.session_id]
        try:
            self.write_buffer.put(encode_frame(message, self.kind.response))
        except InvalidRequest as error:
            self._refuse(message, error)
        except Overloaded as error:
            self.fail(error)

    def send_heartbeat(self) -> None:
        """Say that the tier works."""
        if not self.ended.is_set():
            self.write_buffer.put(b"")

    def close(self) -> None:
        """Accept nothing more; what was sent before still leaves."""
        self.write_buffer.close()
        self.ended.set()

    def fail(self, error: CascadeError) -> None:
        """End the stream with an error, without what still waits to leave."""
        self.failure = error
        self.write_buffer.discard()
        self.close()

    def _refuse(self, item: ServerMessage, error: InvalidRequest) -> None:
        # The session stays in `epochs`: the tier has not refused it and must hear the `Close`.
        defect = Internal(f"an answer could not be sent: {error.message}")
        refusal = grpc_status.refusal(item.session_id, item.epoch, defect)
        self.write_buffer.put(encode_frame(refusal, self.kind.response))


class TierServer:
    """Serves a tier on one address, with `grpc.health.v1` and reflection."""

    def __init__(self, tier: TierServicer, kind: TierKind) -> None:
        self.tier = tier
        self.kind = kind
        self._health = health.aio.HealthServicer()  # pyright: ignore[reportAttributeAccessIssue] - absent from the stubs
        self._server: grpc.aio.Server | None = None
        self._limits: Description | None = None

    async def start(self, address: str) -> str:
        """Serve on `host:port`, where port 0 picks a free one, and return the address bound.

        Raises:
            StartupError: the address cannot be bound.
        """
        self._limits = self.tier.describe()
        self._server = server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._handlers(),))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        names = (self.kind.service, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        bound = _bind(server, address)
        await server.start()
        await self.set_serving(serving=True)
        return bound

    async def set_serving(self, *, serving: bool) -> None:
        """Say SERVING or NOT_SERVING to health checks; open streams go on either way."""
        state = health_pb2.HealthCheckResponse.SERVING
        if not serving:
            state = health_pb2.HealthCheckResponse.NOT_SERVING
        for name in ("", self.kind.service):
            await self._health.set(name, state)

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Say NOT_SERVING, take no new streams, and cut the open ones after `grace_s` seconds."""
        if self._server is None:
            return
        await self.set_serving(serving=False)
        await self._server.stop(grace_s)
        self._server = None

    def _handlers(self) -> grpc.GenericRpcHandler:
        # Bytes pass through: a frame that cannot be read is ours to answer, not grpc's.
        return grpc.method_handlers_generic_handler(
            self.kind.service,
            {
                self.kind.stream_method: grpc.stream_stream_rpc_method_handler(self._stream),
                self.kind.describe_method: grpc.unary_unary_rpc_method_handler(self._describe),
            },
        )

    async def _describe(self, request: bytes, context: Context) -> bytes:
        del request, context
        return encode_description(self.tier.describe(), self.kind)

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        connection = Connection(self.kind)
        reader = asyncio.create_task(self._read(connection, requests))
        writer = asyncio.create_task(_write(connection, context))
        beats = asyncio.create_task(self._beat(connection))
        try:
            await self._attend(connection, reader)
            # Core takes no status while a write is under way, so the writer is waited for.
            await asyncio.wait((reader, writer))
        finally:
            writer.cancel()
            beats.cancel()
        if connection.failure is not None:
            await _abort(context, connection.failure)
        if not reader.cancelled():
            reader.result()

    async def _attend(self, connection: Connection, reader: asyncio.Task[None]) -> None:
        try:
            await connection.ended.wait()
        finally:
            reader.cancel()
            connection.close()
            self.tier.disconnected(connection)

    async def _beat(self, connection: Connection) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_S)
            if self.tier.alive:
                connection.send_heartbeat()

    async def _read(self, connection: Connection, requests: AsyncIterator[bytes]) -> None:
        try:
            async for data in requests:
                self._receive(connection, data)
        except CascadeError as error:
            connection.fail(error)
        finally:
            connection.close()

    def _receive(self, connection: Connection, data: bytes) -> None:
        assert self._limits is not None, "start the server first"
        messages = parse_frame(data, self.kind.request)
        if len(messages) > self._limits.item_limit:
            raise InvalidRequest(
                f"a frame has {len(messages)} items; the limit is {self._limits.item_limit}"
            )
        for message in messages:
            self._take(connection, message, self._limits)

    def _take(self, connection: Connection, message: FrameItem, limits: Description) -> None:
        try:
            item = decode_client_message(message)
            check(item, limits)
            if _admit(connection, item, limits):
                self.tier.receive(connection, item)
        except CascadeError as error:
            culprit = session_of(message)
            if culprit is None:
                raise
            self._refuse(connection, *culprit, error)

    def _refuse(
        self, connection: Connection, session_id: SessionId, epoch: int, error: CascadeError
    ) -> None:
        if connection.epochs.get(session_id) == epoch:
            self.tier.receive(connection, Close(session_id=session_id, epoch=epoch))
        connection.send(grpc_status.refusal(session_id, epoch, error))


async def _write(connection: Connection, context: Context) -> None:
    try:
        while (frame := await connection.write_buffer.take()) is not None:
            await context.write(frame)
    except grpc.aio.BaseError:
        logger.debug("a client of the %s left while it was written to", connection.kind.name)


async def _abort(context: Context, error: CascadeError) -> None:
    metadata = grpc_status.trailing_metadata(error)
    await context.abort(grpc_status.code(error), grpc_status.message(error), metadata)


def _admit(connection: Connection, item: ClientMessage, limits: Description) -> bool:
    """Keep account of the open sessions; return whether the tier should see the item."""
    match item:
        case Score():
            return True
        case Open():
            return _admit_open(connection, item, limits)
        case Close():
            known = connection.epochs.get(item.session_id) == item.epoch
            return known and connection.epochs.pop(item.session_id) == item.epoch
        case Propose() | Judge():
            return _admit_step(connection, item)


def _admit_open(connection: Connection, item: Open, limits: Description) -> bool:
    known = connection.epochs.get(item.session.id)
    if known is not None and item.epoch <= known:
        return False  # of an old epoch, or a repeat
    if known is None and len(connection.epochs) >= limits.session_limit:
        raise Overloaded(f"{limits.session_limit} sessions are open on this stream; close one")
    connection.epochs[item.session.id] = item.epoch
    return True


def _admit_step(connection: Connection, item: Propose | Judge) -> bool:
    known = connection.epochs.get(item.session_id)
    if known is None or item.epoch > known:
        connection.send(grpc_status.unknown_session(item.session_id, item.epoch))
        return False
    return item.epoch == known


def _bind(server: grpc.aio.Server, address: str) -> str:
    try:
        port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(f"{address} cannot be bound: {error}; is it in use?") from error
    return f"{address.rpartition(':')[0]}:{port}"
