"""The router's side of a stream, against real servers and handlers of bytes."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeAlias

import grpc
import pytest
from tests.support.recording_tier import RecordingTier

from cascade.benchmark.microbench import DESCRIPTION
from cascade.errors import DrafterUnavailable, ExpertUnavailable, InvalidRequest
from cascade.protocol import client, server, write_buffer
from cascade.protocol.client import ReplicaClient, ReplicaClients, SessionStream
from cascade.protocol.codec import decode_client_message, encode_frame, parse_frame
from cascade.protocol.messages import Close, Judge, Judgement, Need, Open, Propose, Refusal
from cascade.protocol.server import TierServer
from cascade.protocol.services import DRAFTER, EXPERT, TierKind
from cascade.types import Block, DecodingParams, Session, SessionId

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.tcp_relay import TcpRelay

    from cascade.protocol.codec import ClientMessage
    from cascade.protocol.server import Connection

    Serve: TypeAlias = Callable[[RecordingTier, TierKind], Awaitable[str]]
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
    Handler: TypeAlias = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]
    Connect: TypeAlias = Callable[[str], ReplicaClient]
    Relay: TypeAlias = Callable[[str], Awaitable[TcpRelay]]
    Raw: TypeAlias = Callable[[Handler], Awaitable[str]]


@pytest.fixture
async def connect() -> AsyncIterator[Connect]:
    """Return the client of an expert by its address, as one router has them."""
    clients = ReplicaClients(EXPERT)
    yield clients.__getitem__
    await clients.close()


@pytest.fixture
async def raw() -> AsyncIterator[Raw]:
    """Serve the expert's stream with any handler of bytes, and return the address."""
    servers: list[grpc.aio.Server] = []

    async def start(handler: Handler) -> str:
        server = grpc.aio.server()
        method = grpc.stream_stream_rpc_method_handler(handler)
        handlers = grpc.method_handlers_generic_handler(
            EXPERT.service, {EXPERT.stream_method: method}
        )
        server.add_generic_rpc_handlers((handlers,))
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for one in servers:
        await one.stop(0)


def opened(name: str = "s", *, epoch: int = 1) -> Open:
    session = Session(id=SessionId(name), prompt=(1, 2), policy=DecodingParams())
    return Open(session=session, epoch=epoch, lease="lease")


def judge(name: str = "s", *, epoch: int = 1, position: int = 0) -> Judge:
    block = Block(tokens=(7, 8))
    return Judge(session_id=SessionId(name), epoch=epoch, position=position, digest=0, block=block)


def join(replica: ReplicaClient, name: str = "s", *, epoch: int = 1) -> SessionStream:
    """Open a session on the replica."""
    stream = replica.open_stream(SessionId(name), epoch, lease="lease")
    stream.send(opened(name, epoch=epoch))
    return stream


async def judge_once(stream: SessionStream, *, position: int = 0) -> Judgement:
    stream.send(judge(stream.session_id, epoch=stream.epoch, position=position))
    reply = await stream.receive()
    assert isinstance(reply, Judgement)
    assert (reply.session_id, reply.position) == (stream.session_id, position)
    return reply


async def test_a_session_gets_a_judgement_per_round(serve: Serve, connect: Connect) -> None:
    stream = join(connect(await serve(RecordingTier(), EXPERT)))
    for position in range(0, 20, 2):
        assert (await judge_once(stream, position=position)).verdict.tokens == (7, 8)


async def test_sessions_share_one_stream(serve: Serve, connect: Connect) -> None:
    tier = RecordingTier()
    replica = connect(await serve(tier, EXPERT))
    streams = [join(replica, f"session {number}") for number in range(200)]
    for position in range(3):
        await asyncio.gather(*(judge_once(stream, position=position) for stream in streams))
    assert len({(await tier.received.get())[0] for _ in range(800)}) == 1


async def test_messages_of_one_loop_iteration_are_sent_as_one_frame(
    raw: Raw, connect: Connect
) -> None:
    frames: asyncio.Queue[list[ClientMessage]] = asyncio.Queue()

    async def keep(requests: AsyncIterator[bytes], context: Context) -> None:
        del context
        async for data in requests:
            frames.put_nowait(
                [decode_client_message(item) for item in parse_frame(data, EXPERT.request)]
            )

    replica = connect(await raw(keep))
    one, two = join(replica, "one"), join(replica, "two")
    one.send(judge("one"))
    two.send(judge("two"))
    assert await frames.get() == [opened("one"), opened("two"), judge("one"), judge("two")]
    one.close()
    two.close()
    closes = [Close(session_id=SessionId(name), epoch=1) for name in ("one", "two")]
    assert await frames.get() == closes


async def test_closing_a_session_frees_no_other(serve: Serve, connect: Connect) -> None:
    tier = RecordingTier()
    replica = connect(await serve(tier, EXPERT))
    stays, leaves = join(replica, "stays"), join(replica, "leaves")
    leaves.close()
    leaves.close()
    await judge_once(stays)
    connection, _ = await tier.received.get()
    assert set(connection.epochs) == {"stays"}
    with pytest.raises(ExpertUnavailable, match="the session was closed"):
        await leaves.receive()


async def test_messages_of_another_epoch_are_dropped(raw: Raw, connect: Connect) -> None:
    def need(name: str, epoch: int) -> bytes:
        message = Need(session_id=SessionId(name), epoch=epoch, position=epoch)
        return encode_frame(message, EXPERT.response)

    async def reply(requests: AsyncIterator[bytes], context: Context) -> None:
        await anext(requests)
        late = need("s", 1) + need("s", 3) + need("nobody", 2)
        await context.write(late + need("s", 2))
        await anext(requests, None)

    stream = join(connect(await raw(reply)), epoch=2)
    assert await stream.receive() == Need(session_id=SessionId("s"), epoch=2, position=2)


async def test_a_newer_epoch_ends_the_older_stream_and_survives_its_close(
    serve: Serve, connect: Connect
) -> None:
    replica = connect(await serve(RecordingTier(), EXPERT))
    old = join(replica, epoch=1)
    await judge_once(old)
    new = join(replica, epoch=2)
    old.close()
    await judge_once(new)
    with pytest.raises(ExpertUnavailable):
        await old.receive()


async def test_bytes_are_counted_both_ways(serve: Serve, connect: Connect) -> None:
    replica = connect(await serve(RecordingTier(), EXPERT))
    one, two = join(replica, "one"), join(replica, "two")
    replies = await asyncio.gather(judge_once(one), judge_once(two))
    for stream, reply in zip((one, two), replies, strict=True):
        sent = (opened(stream.session_id), judge(stream.session_id))
        assert stream.sent_bytes == sum(
            len(encode_frame(message, EXPERT.request)) for message in sent
        )
        # A message in a frame with others takes two bytes more.
        assert 0 <= len(encode_frame(reply, EXPERT.response)) - stream.received_bytes <= 2


async def test_a_refusal_reaches_its_session(serve: Serve, connect: Connect) -> None:
    replica = connect(await serve(RecordingTier(), EXPERT))
    good, bad = join(replica, "good"), replica.open_stream(SessionId("bad"), 1, lease="lease")
    bad.send(judge("bad"))
    refusal = await bad.receive()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "NOT_FOUND"
    await judge_once(good)


async def test_stopping_the_replica_ends_every_session(connect: Connect) -> None:
    server = TierServer(RecordingTier(), EXPERT)
    replica = connect(await server.start("127.0.0.1:0"))
    streams = [join(replica, name) for name in ("one", "two")]
    await asyncio.gather(*map(judge_once, streams))
    await server.stop()
    for stream in streams:
        for _ in range(2):
            with pytest.raises(ExpertUnavailable, match=r"the expert at 127\.0\.0\.1"):
                await stream.receive()
        with pytest.raises(ExpertUnavailable):
            stream.send(judge())
        stream.close()


async def test_messages_before_the_end_are_still_received(connect: Connect) -> None:
    tier = RecordingTier()
    server = TierServer(tier, EXPERT)
    replica = connect(await server.start("127.0.0.1:0"))
    first, last = join(replica, "first"), join(replica, "last")
    first.send(judge("first"))
    await judge_once(last)
    await server.stop()
    assert isinstance(await first.receive(), Judgement)
    with pytest.raises(ExpertUnavailable):
        await first.receive()


async def test_receive_raises_when_the_replica_is_cut_off(
    serve: Serve, relay: Relay, connect: Connect
) -> None:
    proxy = await relay(await serve(RecordingTier(), EXPERT))
    stream = join(connect(proxy.address))
    await judge_once(stream)
    waiting = asyncio.ensure_future(stream.receive())
    proxy.cut()
    with pytest.raises(ExpertUnavailable, match="UNAVAILABLE"):
        await waiting


async def test_after_a_break_the_next_session_reconnects(
    serve: Serve, relay: Relay, connect: Connect
) -> None:
    tier = RecordingTier()
    proxy = await relay(await serve(tier, EXPERT))
    replica = connect(proxy.address)
    stream = join(replica)
    for epoch in (2, 3):
        await judge_once(stream)
        proxy.cut()
        await tier.ended.get()
        with pytest.raises(ExpertUnavailable):
            await stream.receive()
        stream = join(replica, epoch=epoch)
    await judge_once(stream)


@pytest.mark.parametrize(
    ("kind", "error"), [(DRAFTER, DrafterUnavailable), (EXPERT, ExpertUnavailable)]
)
async def test_an_address_without_a_server_is_a_broken_stream(
    kind: TierKind, error: type[Exception]
) -> None:
    server = TierServer(RecordingTier(), kind)
    address = await server.start("127.0.0.1:0")
    await server.stop()
    replica = ReplicaClient(address, kind)
    stream = join(replica)
    with pytest.raises(error, match=f"the {kind.name} at {address}: UNAVAILABLE"):
        await stream.receive()
    with pytest.raises(error, match="does not describe itself"):
        await replica.describe()
    await replica.close()


async def test_a_replica_that_ends_the_stream_is_unavailable(raw: Raw, connect: Connect) -> None:
    async def leave(requests: AsyncIterator[bytes], context: Context) -> None:
        del context
        await anext(requests)

    with pytest.raises(ExpertUnavailable, match="ended the stream"):
        await join(connect(await raw(leave))).receive()


@pytest.mark.parametrize(
    "invalid",
    [
        b"\xff\xff",
        encode_frame(Need(session_id=SessionId(""), epoch=1, position=0), EXPERT.response),
    ],
    ids=["no frame", "no session id"],
)
async def test_a_replica_that_sends_invalid_bytes_is_unavailable(
    raw: Raw, connect: Connect, invalid: bytes
) -> None:
    async def talk(requests: AsyncIterator[bytes], context: Context) -> None:
        await context.write(invalid)
        await anext(requests)
        await anext(requests, None)

    stream = join(connect(await raw(talk)))
    with pytest.raises(ExpertUnavailable, match="the expert at"):
        await stream.receive()


async def test_a_replica_of_the_other_tier_is_unavailable(serve: Serve, connect: Connect) -> None:
    stream = join(connect(await serve(RecordingTier(), DRAFTER)))
    with pytest.raises(ExpertUnavailable, match="UNIMPLEMENTED"):
        await stream.receive()


async def test_a_replica_that_does_not_read_is_unavailable(
    raw: Raw, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(requests: AsyncIterator[bytes], context: Context) -> None:
        del requests, context
        await asyncio.Event().wait()

    monkeypatch.setattr(write_buffer, "BACKLOG_LIMIT_BYTES", 100)
    stream = join(connect(await raw(sleep)))
    with pytest.raises(ExpertUnavailable, match="wait for a peer that does not read"):
        stream.send(judge())


async def test_a_message_that_does_not_fit_its_proto_is_refused_locally(
    serve: Serve, connect: Connect
) -> None:
    stream = join(connect(await serve(RecordingTier(), EXPERT)))
    with pytest.raises(InvalidRequest, match="Judge cannot be sent"):
        stream.send(judge(position=-(2**70)))
    await judge_once(stream)


async def test_closing_the_clients_ends_their_sessions(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, DRAFTER)
    clients = ReplicaClients(DRAFTER)
    stream = clients[address].open_stream(SessionId("s"), 1, lease="lease")
    stream.send(opened())
    stream.send(Propose(session_id=SessionId("s"), epoch=1, position=0, digest=0, count=1))
    await stream.receive()
    await clients.close()
    with pytest.raises(DrafterUnavailable):
        await stream.receive()
    assert set((await tier.ended.get()).epochs) == {"s"}


async def test_describe_returns_what_the_replica_serves(serve: Serve, connect: Connect) -> None:
    assert await connect(await serve(RecordingTier(), EXPERT)).describe() == DESCRIPTION


async def test_a_delay_keeps_the_order_of_messages(serve: Serve) -> None:
    replica = ReplicaClient(await serve(RecordingTier(), EXPERT), EXPERT, delay_s=0.001)
    stream = join(replica)
    for position in range(50):
        stream.send(judge(position=position))
    replies = [await stream.receive() for _ in range(50)]
    assert [item.position for item in replies if isinstance(item, Judgement)] == list(range(50))
    await replica.close()


class Slow(RecordingTier):
    """Answers only after many heartbeats; `alive` is read for each."""

    def __init__(self) -> None:
        super().__init__()
        self.heartbeats = 0
        self.waiting: tuple[Connection, ClientMessage] | None = None

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        if isinstance(message, Judge):
            self.waiting = connection, message

    @property
    def alive(self) -> bool:
        self.heartbeats += self.waiting is not None
        if self.waiting is not None and self.heartbeats > 3 * client.MISSED_HEARTBEATS_LIMIT:
            super().receive(*self.waiting)
        return True


class Hung(RecordingTier):
    """Never replies, and reports that it makes no progress."""

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        pass

    @property
    def alive(self) -> bool:
        return False


@pytest.fixture
def fast_heartbeats(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time between heartbeats."""
    monkeypatch.setattr(client, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(server, "HEARTBEAT_S", 0.02)


@pytest.mark.usefixtures("fast_heartbeats")
async def test_a_slow_replica_that_sends_heartbeats_is_kept(serve: Serve, connect: Connect) -> None:
    tier = Slow()
    stream = join(connect(await serve(tier, EXPERT)))
    await judge_once(stream)
    assert tier.heartbeats > client.MISSED_HEARTBEATS_LIMIT


@pytest.mark.usefixtures("fast_heartbeats")
async def test_a_replica_without_heartbeats_is_unavailable(serve: Serve, connect: Connect) -> None:
    stream = join(connect(await serve(Hung(), EXPERT)))
    stream.send(judge())
    with pytest.raises(ExpertUnavailable, match="sent nothing"):
        await stream.receive()


@pytest.mark.slow
async def test_a_connection_without_packets_ends_on_both_sides(
    serve: Serve, relay: Relay, connect: Connect
) -> None:
    """The client misses heartbeats; the server gets no response to its pings for 10 s."""
    tier = RecordingTier()
    proxy = await relay(await serve(tier, EXPERT))
    stream = join(connect(proxy.address))
    await judge_once(stream)
    proxy.silent = True
    with pytest.raises(ExpertUnavailable, match="sent nothing"):
        await stream.receive()
    assert set((await tier.ended.get()).epochs) == {"s"}


@pytest.mark.slow
async def test_a_replica_that_accepts_but_never_sends_is_unavailable(
    serve: Serve, relay: Relay, connect: Connect
) -> None:
    proxy = await relay(await serve(RecordingTier(), EXPERT))
    proxy.silent = True
    stream = join(connect(proxy.address))
    with pytest.raises(ExpertUnavailable, match=r"timed out|sent nothing"):
        await stream.receive()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
async def test_a_stream_that_fails_with_any_status_is_unavailable(
    raw: Raw, connect: Connect, code: grpc.StatusCode
) -> None:
    async def fail(requests: AsyncIterator[bytes], context: Context) -> None:
        await anext(requests)
        await context.abort(code, "why")

    with pytest.raises(ExpertUnavailable, match=code.name):
        await join(connect(await raw(fail))).receive()
