"""The gRPC server of a replica: reads frames, hands messages to the tier, writes its replies.

A stream opens with the token of a lease in its metadata; without one, nothing of it is read.
A stream ends for the tier when the client half-closes, cancels or disappears: `grpc.aio` ends the
request iterator in each case. A frame that cannot be parsed aborts its stream. A message that
cannot be decoded, or whose session is not open, refuses that session only. A frame without messages
is a heartbeat.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from itertools import chain
from operator import methodcaller
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2

from cascade.errors import CascadeError, Internal, InvalidRequest, Overloaded, StartupError
from cascade.protocol import grpc_status
from cascade.protocol.arrivals import Arrivals
from cascade.protocol.codec import decode_client_message, encode_frame, parse_frame, session_of
from cascade.protocol.messages import Close, Judge, Open, Propose, Refusal, Score
from cascade.protocol.services import (
    HEARTBEAT_S,
    LEASE_KEY,
    STREAM_OPTIONS,
    Description,
    TierKind,
    encode_description,
    health_list,
)
from cascade.protocol.write_buffer import WriteBuffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable

    from google.protobuf.message import Message

    from cascade.protocol.codec import ClientMessage, FrameItem, ServerMessage
    from cascade.protocol.tls import Credentials
    from cascade.types import Block, SessionId

    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
    _Parsed: TypeAlias = tuple[FrameItem, ClientMessage | CascadeError]

logger = logging.getLogger(__name__)

_OPTIONS = (
    *STREAM_OPTIONS,
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 2_000),
    # A router needs one, a health check another.
    ("grpc.max_concurrent_streams", 128),
    # Of a connection that says nothing; two minutes by default.
    ("grpc.server_handshake_timeout_ms", 10_000),
    # A second server on a port must fail, not share its connections.
    ("grpc.so_reuseport", 0),
)


_LARGE_BYTES = 2**20  # parsing a frame of this size would delay all others
_PROBES = 64  # requests of health checks that are on their way
_PROBE_S = 5.0  # until one has arrived
_PROBE_BYTES = 1024


class TierServicer(Protocol):
    """What a server serves. Called on the event loop; nothing here may block."""

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        """Serve a message of an open session; a CascadeError refuses that session."""
        ...

    def disconnected(self, connection: Connection) -> None:
        """Free all sessions of a stream that ended."""
        ...

    def describe(self) -> Description:
        """Return what is served, and the limits that the server enforces."""
        ...

    def authenticate(self, lease: str) -> None:
        """Raise Unauthenticated unless the token is that of a lease on this replica."""
        ...

    @property
    def alive(self) -> bool:
        """Whether the tier makes progress; without heartbeats, clients leave it."""
        ...


class Connection:
    """One client's stream. Equal only to itself."""

    def __init__(self, kind: TierKind) -> None:
        self.kind = kind
        self.epochs: dict[SessionId, int] = {}  # of the open sessions
        self.write_buffer = WriteBuffer()
        self.ended = asyncio.Event()
        self.failure: CascadeError | None = None
        self.on_send: Callable[[ServerMessage], None] = lambda _: None  # called for every message

    def send(self, message: ServerMessage) -> None:
        """Send a message, in one frame with all others of this event loop iteration.

        Never blocks. Messages to a client that has left are dropped.
        """
        if self.ended.is_set():
            return
        self.on_send(message)
        if isinstance(message, Refusal) and self.epochs.get(message.session_id) == message.epoch:
            del self.epochs[message.session_id]
        try:
            self.write_buffer.put(encode_frame(message, self.kind.response))
        except InvalidRequest as error:
            # The session stays in `epochs`: the tier has not refused it and must get the `Close`.
            defect = Internal(f"a reply could not be sent: {error.message}")
            refusal = grpc_status.refusal(message.session_id, message.epoch, defect)
            self.write_buffer.put(encode_frame(refusal, self.kind.response))
        except Overloaded as error:
            self.fail(error)

    def send_heartbeat(self) -> None:
        """Tell the client that the tier makes progress."""
        if not self.ended.is_set():
            self.write_buffer.put(b"")

    def close(self) -> None:
        """Accept no more messages; those sent before are still written."""
        self.write_buffer.close()
        self.ended.set()

    def fail(self, error: CascadeError) -> None:
        """End the stream with an error and drop what is not written yet."""
        self.failure = error
        self.write_buffer.discard()
        self.close()


class _Health(health.aio.HealthServicer):  # pyright: ignore[reportAttributeAccessIssue, reportUntypedBaseClass] - absent from the stubs
    """The library's servicer with `List`, which its version for asyncio lacks."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__()
        self._names = names

    async def List(self, request: Message, context: Any) -> Message:  # noqa: N802 - the RPC's name
        """Return what `Check` says of every name."""
        del request
        asked = [health_pb2.HealthCheckRequest(service=name) for name in self._names]
        answers = [await self.Check(one, context) for one in asked]
        return health_list(zip(self._names, (one.status for one in answers), strict=True))


class TierServer:
    """Serves a tier on one address, with `grpc.health.v1`."""

    def __init__(
        self, tier: TierServicer, kind: TierKind, *, credentials: Credentials | None = None
    ) -> None:
        """Serve nothing yet.

        Args:
            tier: What to serve.
            kind: The service.
            credentials: Of TLS; None: anybody who reaches the address can read along.
        """
        self.tier = tier
        self.kind = kind
        self._credentials = credentials
        self._admitted: Counter[str] = Counter()  # leases that opened the streams of now
        self._probes = Arrivals()
        self._parsing = asyncio.Lock()  # of one large frame at a time
        self._health = _Health(("", kind.service))
        self._server: grpc.aio.Server | None = None
        self._limits: Description | None = None

    async def start(self, address: str) -> str:
        """Serve, and return the bound address.

        Args:
            address: `host:port`, where port 0 picks a free one, or `host:first-last` for the first
                port of a range that is free.

        Raises:
            StartupError: No such address can be bound.
        """
        self._limits = self.tier.describe()
        self._server = server = grpc.aio.server(options=_OPTIONS)
        server.add_generic_rpc_handlers((self._handlers(), self._health_handlers()))
        host, _, ports = address.rpartition(":")
        first, _, last = ports.partition("-")
        port = self._bind(server, host, range(int(first), int(last or first) + 1))
        await server.start()
        await self.set_serving(serving=True)
        return f"{host}:{port}"

    def _bind(self, server: grpc.aio.Server, host: str, ports: range) -> int:
        for port in ports:
            address = f"{host}:{port}"
            try:
                if self._credentials is None:
                    return server.add_insecure_port(address)
                return server.add_secure_port(address, self._credentials.server())
            except RuntimeError as error:
                if port == ports[-1]:
                    what = address if len(ports) == 1 else f"{host}:{ports[0]} to {port}"
                    raise StartupError(f"{what} cannot be bound: {error}; in use?") from error
        raise StartupError(f"no port from {ports.start} to {ports.stop - 1}")

    async def set_serving(self, *, serving: bool) -> None:
        """Report SERVING or NOT_SERVING to health checks; open streams continue either way."""
        response = health_pb2.HealthCheckResponse
        for name in ("", self.kind.service):
            await self._health.set(name, response.SERVING if serving else response.NOT_SERVING)

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Report NOT_SERVING, take no new streams, and end the open ones after `grace_s`."""
        if self._server is None:
            return
        await self.set_serving(serving=False)
        await self._server.stop(grace_s)
        self._server = None

    def _handlers(self) -> grpc.GenericRpcHandler:
        # Without deserializers: we, not gRPC, handle frames that cannot be parsed. All take
        # streams, since gRPC reads the message of a unary call before we know the caller.
        return grpc.method_handlers_generic_handler(
            self.kind.service,
            {
                self.kind.stream_method: grpc.stream_stream_rpc_method_handler(self._stream),
                self.kind.describe_method: grpc.stream_unary_rpc_method_handler(self._describe),
            },
        )

    def _health_handlers(self) -> grpc.GenericRpcHandler:
        """Return the health check, whose callers have no lease: little of them is read."""
        check, list_, watch = self._health.Check, self._health.List, self._health.Watch

        async def checked(requests: AsyncIterator[bytes], context: Context) -> Message:
            return await check(await self._probe(requests, context), context)

        async def listed(requests: AsyncIterator[bytes], context: Context) -> Message:
            return await list_(await self._probe(requests, context), context)

        async def watched(requests: AsyncIterator[bytes], context: Context) -> None:
            await watch(await self._probe(requests, context), context)

        written: Any = {"response_serializer": methodcaller("SerializeToString")}
        return grpc.method_handlers_generic_handler(
            "grpc.health.v1.Health",
            {
                "Check": grpc.stream_unary_rpc_method_handler(checked, **written),
                "List": grpc.stream_unary_rpc_method_handler(listed, **written),
                "Watch": grpc.stream_stream_rpc_method_handler(watched, **written),
            },
        )

    async def _probe(
        self, requests: AsyncIterator[bytes], context: Context
    ) -> health_pb2.HealthCheckRequest:
        """Return the request of a health check; ends the call if it is none, or does not arrive."""
        sender = context.peer().rpartition(":")[0]
        try:
            async with self._probes.place(sender, most=_PROBES, within_s=_PROBE_S):
                data = await anext(requests, b"")
            return health_pb2.HealthCheckRequest.FromString(data[:_PROBE_BYTES])
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, "no request arrived in time")
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "no request of a health check")

    async def _describe(self, requests: AsyncIterator[bytes], context: Context) -> bytes:
        del requests
        await self._authenticate(context)
        try:
            return encode_description(self.tier.describe(), self.kind)
        except Exception as error:  # noqa: BLE001 - `_hidden` logs it
            problem = _hidden(error, self.kind)
            await context.abort(grpc_status.code(problem), problem.message)

    async def _authenticate(self, context: Context) -> str:
        """Return the lease of a call; ends the call if it has none, before anything is read."""
        found = dict(context.invocation_metadata() or ()).get(LEASE_KEY, "")
        lease = found if isinstance(found, str) else ""
        try:
            if self._credentials is not None:
                names = context.auth_context().get("x509_subject_alternative_name", ())
                self._credentials.check_client(tuple(names))
            if not self._admitted[lease]:
                self.tier.authenticate(lease)
        except CascadeError as error:
            await context.abort(grpc_status.code(error), grpc_status.message(error))
        return lease

    async def _stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        lease = await self._authenticate(context)
        self._admitted[lease] += 1
        try:
            await self._serve_stream(requests, context)
        finally:
            self._admitted[lease] -= 1
            self._admitted += Counter[str]()  # without those that are zero

    async def _serve_stream(self, requests: AsyncIterator[bytes], context: Context) -> None:
        connection = Connection(self.kind)
        reader = asyncio.create_task(self._read_frames(connection, requests))
        writer = asyncio.create_task(_write_frames(connection, context))
        heartbeats = asyncio.create_task(self._send_heartbeats(connection))
        try:
            try:
                await connection.ended.wait()
            finally:
                reader.cancel()
                connection.close()
                self.tier.disconnected(connection)
            # gRPC accepts no status while a write is in progress.
            await asyncio.wait((reader, writer))
        finally:
            writer.cancel()
            heartbeats.cancel()
        if (error := connection.failure) is not None:
            metadata = grpc_status.trailing_metadata(error)
            await context.abort(grpc_status.code(error), grpc_status.message(error), metadata)
        if not reader.cancelled():
            reader.result()

    async def _read_frames(self, connection: Connection, requests: AsyncIterator[bytes]) -> None:
        assert self._limits is not None, "start the server first"
        try:
            async for data in requests:
                for item, message in await self._parsed(data, self._limits):
                    self._handle(connection, item, message, self._limits)
        except CascadeError as error:
            connection.fail(error)
        except Exception as error:  # noqa: BLE001 - `_hidden` logs it
            connection.fail(_hidden(error, self.kind))
        finally:
            connection.close()

    async def _parsed(self, data: bytes, limits: Description) -> list[_Parsed]:
        if len(data) < _LARGE_BYTES:
            return self._parse(data, limits)
        async with self._parsing:
            return await asyncio.to_thread(self._parse, data, limits)

    def _parse(self, data: bytes, limits: Description) -> list[_Parsed]:
        """Return the items of a frame, each with its message or what is wrong with it."""
        items = parse_frame(data, self.kind.request)
        if len(items) > limits.item_limit:
            raise InvalidRequest(
                f"a frame has {len(items)} items; the limit is {limits.item_limit}"
            )
        return [(item, _decode(item, limits)) for item in items]

    def _handle(
        self,
        connection: Connection,
        item: FrameItem,
        message: ClientMessage | CascadeError,
        limits: Description,
    ) -> None:
        try:
            if isinstance(message, CascadeError):
                raise message
            if _admit(connection, message, limits):
                self.tier.receive(connection, message)
        except CascadeError as error:
            session = session_of(item)
            if session is None:
                raise
            session_id, epoch = session
            if connection.epochs.get(session_id) == epoch:
                self.tier.receive(connection, Close(session_id=session_id, epoch=epoch))
            connection.send(grpc_status.refusal(session_id, epoch, error))

    async def _send_heartbeats(self, connection: Connection) -> None:
        while True:
            if self.tier.alive:
                connection.send_heartbeat()
            await asyncio.sleep(HEARTBEAT_S)


def _decode(item: FrameItem, limits: Description) -> ClientMessage | CascadeError:
    try:
        message = decode_client_message(item)
        check_limits(message, limits)
    except CascadeError as error:
        return error
    return message


def _hidden(error: Exception, kind: TierKind) -> Internal:
    """Return what a client may see of an error that is not ours; the log has the rest."""
    logger.error("a call of the %s failed: %s", kind.name, error, exc_info=error)
    return Internal(f"Internal error; the log of the {kind.name} has the details")


async def _write_frames(connection: Connection, context: Context) -> None:
    try:
        while (frame := await connection.write_buffer.take()) is not None:
            await context.write(frame)
    except grpc.aio.BaseError:
        logger.debug("a client of the %s left during a write", connection.kind.name)


def _admit(connection: Connection, message: ClientMessage, limits: Description) -> bool:
    """Update the stream's open sessions; return whether the tier should get the message."""
    epochs = connection.epochs
    match message:
        case Score():
            return True
        case Open(session=session, epoch=epoch):
            known = epochs.get(session.id)
            if known is not None and epoch <= known:
                return False  # of an old epoch, or a repeat
            if known is None and len(epochs) >= limits.session_limit:
                raise Overloaded(f"{limits.session_limit} sessions are open on this stream")
            epochs[session.id] = epoch
            return True
        case Close(session_id=session_id, epoch=epoch):
            return epochs.get(session_id) == epoch and epochs.pop(session_id) == epoch
        case (
            Propose(session_id=session_id, epoch=epoch) | Judge(session_id=session_id, epoch=epoch)
        ):
            known = epochs.get(session_id)
            if known is None or epoch > known:
                connection.send(grpc_status.unknown_session(session_id, epoch))
            return epoch == known


def check_limits(message: ClientMessage, limits: Description) -> None:
    """Check that the replica's model can read a message.

    Args:
        message: What a client sent.
        limits: What the replica describes of itself.

    Raises:
        InvalidRequest: A token id is outside the vocabulary, or the block is too long.
    """
    ids: Iterable[int] = ()
    match message:
        case Open(session=session):
            biases = (token for token, _ in session.policy.sampling.logit_bias)
            ids = chain(session.prompt, session.source, session.tokens, biases)
        case Judge(block=block):
            ids = chain(message.tokens, _check_block(block, limits))
        case Propose() | Score():
            ids = message.tokens
        case Close():
            pass
    largest = max(ids, default=0)
    if largest >= limits.vocab_size:
        raise InvalidRequest(
            f"token id {largest} is not in the vocabulary; ids are 0 to {limits.vocab_size - 1}"
        )


def _check_block(block: Block, limits: Description) -> Iterable[int]:
    """Return the token ids of the block after checking its sizes."""
    if block.length > limits.draft_limit:
        raise InvalidRequest(
            f"the block has {block.length} tokens; this replica judges up to {limits.draft_limit}"
        )
    widest = max((probs.weights.size for probs in block.draft_probs), default=0)
    if widest > limits.vocab_size:
        raise InvalidRequest(
            f"a row has {widest} weights; the vocabulary has {limits.vocab_size} tokens"
        )
    argmaxes = (stats.argmax for stats in block.draft_stats)
    largest = (int(probs.ids.max()) for probs in block.draft_probs if probs.ids.size)
    return chain(block.tokens, argmaxes, largest)
