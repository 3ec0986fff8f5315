from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol, TypeAlias

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

    from cascade.protocol.codec import ClientMessage
    from cascade.protocol.server import Connection

    Serve: TypeAlias = Callable[[RecordingTier, TierKind], Awaitable[str]]
    Context: TypeAlias = grpc.aio.ServicerContext[bytes, bytes]
    Handler: TypeAlias = Callable[[AsyncIterator[bytes], Context], Awaitable[None]]
    Dial: TypeAlias = Callable[[str], ReplicaClient]
    Raw: TypeAlias = Callable[[Handler], Awaitable[str]]


class Line(Protocol):
    """A TCP relay, as `conftest` makes them."""

    address: str
    silent: bool

    def cut(self) -> None: ...


Relay: TypeAlias = "Callable[[str], Awaitable[Line]]"


@pytest.fixture
async def dial() -> AsyncIterator[Dial]:
    """Return experts by address, as one router would know them."""
    peers = ReplicaClients(EXPERT)
    yield peers.__getitem__
    await peers.close()


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


def join(peer: ReplicaClient, name: str = "s", *, epoch: int = 1) -> SessionStream:
    link = peer.open_stream(SessionId(name), epoch)
    link.send(opened(name, epoch=epoch))
    return link


async def ask(link: SessionStream, *, position: int = 0) -> Judgement:
    link.send(judge(link.session_id, epoch=link.epoch, position=position))
    answer = await link.receive()
    assert isinstance(answer, Judgement)
    assert (answer.session_id, answer.position) == (link.session_id, position)
    return answer


async def test_a_session_is_judged_round_by_round(serve: Serve, dial: Dial) -> None:
    link = join(dial(await serve(RecordingTier(), EXPERT)))
    for position in range(0, 20, 2):
        assert (await ask(link, position=position)).verdict.tokens == (7, 8)


async def test_sessions_share_one_stream(serve: Serve, dial: Dial) -> None:
    tier = RecordingTier()
    peer = dial(await serve(tier, EXPERT))
    links = [join(peer, f"session {number}") for number in range(200)]
    for position in range(3):
        await asyncio.gather(*(ask(link, position=position) for link in links))
    assert len({(await tier.received.get())[0] for _ in range(800)}) == 1


async def test_items_of_one_tick_leave_as_one_frame(raw: Raw, dial: Dial) -> None:
    frames: asyncio.Queue[list[ClientMessage]] = asyncio.Queue()

    async def keep(requests: AsyncIterator[bytes], context: Context) -> None:
        del context
        async for data in requests:
            frames.put_nowait(
                [decode_client_message(item) for item in parse_frame(data, EXPERT.request)]
            )

    peer = dial(await raw(keep))
    one, two = join(peer, "one"), join(peer, "two")
    one.send(judge("one"))
    two.send(judge("two"))
    assert await frames.get() == [opened("one"), opened("two"), judge("one"), judge("two")]
    one.close()
    two.close()
    closes = [Close(session_id=SessionId(name), epoch=1) for name in ("one", "two")]
    assert await frames.get() == closes


async def test_closing_a_link_frees_its_session_and_no_other(serve: Serve, dial: Dial) -> None:
    tier = RecordingTier()
    peer = dial(await serve(tier, EXPERT))
    stays, leaves = join(peer, "stays"), join(peer, "leaves")
    leaves.close()
    leaves.close()
    await ask(stays)
    connection, _ = await tier.received.get()
    assert set(connection.epochs) == {"stays"}
    with pytest.raises(ExpertUnavailable, match="the link was closed"):
        await leaves.receive()


async def test_answers_to_an_old_epoch_are_dropped(raw: Raw, dial: Dial) -> None:
    def need(name: str, epoch: int) -> bytes:
        item = Need(session_id=SessionId(name), epoch=epoch, position=epoch)
        return encode_frame(item, EXPERT.response)

    async def answer(requests: AsyncIterator[bytes], context: Context) -> None:
        await anext(requests)
        late = need("s", 1) + need("s", 3) + need("nobody", 2)
        await context.write(late + need("s", 2))
        await anext(requests, None)

    link = join(dial(await raw(answer)), epoch=2)
    assert await link.receive() == Need(session_id=SessionId("s"), epoch=2, position=2)


async def test_a_newer_link_ends_the_older_and_outlives_its_close(serve: Serve, dial: Dial) -> None:
    peer = dial(await serve(RecordingTier(), EXPERT))
    old = join(peer, epoch=1)
    await ask(old)
    new = join(peer, epoch=2)
    old.close()
    await ask(new)
    with pytest.raises(ExpertUnavailable):
        await old.receive()


async def test_bytes_are_counted_both_ways(serve: Serve, dial: Dial) -> None:
    peer = dial(await serve(RecordingTier(), EXPERT))
    one, two = join(peer, "one"), join(peer, "two")
    answers = await asyncio.gather(ask(one), ask(two))
    for link, answer in zip((one, two), answers, strict=True):
        sent = (opened(link.session_id), judge(link.session_id))
        assert link.sent_bytes == sum(len(encode_frame(item, EXPERT.request)) for item in sent)
        # Two bytes frame an item that comes together with others.
        assert 0 <= len(encode_frame(answer, EXPERT.response)) - link.received_bytes <= 2


async def test_a_refusal_reaches_its_session(serve: Serve, dial: Dial) -> None:
    peer = dial(await serve(RecordingTier(), EXPERT))
    good, bad = join(peer, "good"), peer.open_stream(SessionId("bad"), 1)
    bad.send(judge("bad"))
    refusal = await bad.receive()
    assert isinstance(refusal, Refusal)
    assert refusal.code == "NOT_FOUND"
    await ask(good)


async def test_every_link_hears_that_the_replica_was_stopped(dial: Dial) -> None:
    server = TierServer(RecordingTier(), EXPERT)
    peer = dial(await server.start("127.0.0.1:0"))
    links = [join(peer, name) for name in ("one", "two")]
    await asyncio.gather(*map(ask, links))
    await server.stop()
    for link in links:
        for _ in range(2):
            with pytest.raises(ExpertUnavailable, match=r"the expert at 127\.0\.0\.1"):
                await link.receive()
        with pytest.raises(ExpertUnavailable):
            link.send(judge())
        link.close()


async def test_answers_before_the_end_are_still_received(dial: Dial) -> None:
    tier = RecordingTier()
    server = TierServer(tier, EXPERT)
    peer = dial(await server.start("127.0.0.1:0"))
    first, last = join(peer, "first"), join(peer, "last")
    first.send(judge("first"))
    await ask(last)
    await server.stop()
    assert isinstance(await first.receive(), Judgement)
    with pytest.raises(ExpertUnavailable):
        await first.receive()


async def test_a_link_waits_for_no_replica_that_is_cut_off(
    serve: Serve, relay: Relay, dial: Dial
) -> None:
    line = await relay(await serve(RecordingTier(), EXPERT))
    link = join(dial(line.address))
    await ask(link)
    waiting = asyncio.ensure_future(link.receive())
    line.cut()
    with pytest.raises(ExpertUnavailable, match="UNAVAILABLE"):
        await waiting


async def test_the_next_link_opens_another_stream(serve: Serve, relay: Relay, dial: Dial) -> None:
    tier = RecordingTier()
    line = await relay(await serve(tier, EXPERT))
    peer = dial(line.address)
    link = join(peer)
    for epoch in (2, 3):
        await ask(link)
        line.cut()
        await tier.ended.get()
        with pytest.raises(ExpertUnavailable):
            await link.receive()
        link = join(peer, epoch=epoch)
    await ask(link)


@pytest.mark.parametrize(
    ("kind", "error"), [(DRAFTER, DrafterUnavailable), (EXPERT, ExpertUnavailable)]
)
async def test_nobody_at_the_address_is_a_broken_stream(
    kind: TierKind, error: type[Exception]
) -> None:
    server = TierServer(RecordingTier(), kind)
    address = await server.start("127.0.0.1:0")
    await server.stop()
    peer = ReplicaClient(address, kind)
    link = join(peer)
    with pytest.raises(error, match=f"the {kind.name} at {address}: UNAVAILABLE"):
        await link.receive()
    with pytest.raises(error, match="does not say what it serves"):
        await peer.describe()
    await peer.close()


async def test_a_replica_that_ends_the_stream_is_lost(raw: Raw, dial: Dial) -> None:
    async def leave(requests: AsyncIterator[bytes], context: Context) -> None:
        del context
        await anext(requests)

    with pytest.raises(ExpertUnavailable, match="ended the stream"):
        await join(dial(await raw(leave))).receive()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"\xff\xff",
        encode_frame(Need(session_id=SessionId(""), epoch=1, position=0), EXPERT.response),
    ],
    ids=["no frame", "no item"],
)
async def test_a_replica_that_talks_rubbish_is_lost(raw: Raw, dial: Dial, rubbish: bytes) -> None:
    async def talk(requests: AsyncIterator[bytes], context: Context) -> None:
        await context.write(rubbish)
        await anext(requests)
        await anext(requests, None)

    link = join(dial(await raw(talk)))
    with pytest.raises(ExpertUnavailable, match="the expert at"):
        await link.receive()


async def test_a_tier_of_the_other_kind_is_no_peer(serve: Serve, dial: Dial) -> None:
    link = join(dial(await serve(RecordingTier(), DRAFTER)))
    with pytest.raises(ExpertUnavailable, match="UNIMPLEMENTED"):
        await link.receive()


async def test_a_peer_that_does_not_read_is_given_up(
    raw: Raw, dial: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def sleep(requests: AsyncIterator[bytes], context: Context) -> None:
        del requests, context
        await asyncio.Event().wait()

    monkeypatch.setattr(write_buffer, "BACKLOG_LIMIT_BYTES", 100)
    link = join(dial(await raw(sleep)))
    with pytest.raises(ExpertUnavailable, match="wait for a peer that does not read"):
        link.send(judge())


async def test_an_item_that_fits_no_wire_harms_nobody(serve: Serve, dial: Dial) -> None:
    link = join(dial(await serve(RecordingTier(), EXPERT)))
    with pytest.raises(InvalidRequest, match="Judge cannot be sent"):
        link.send(judge(position=-(2**70)))
    await ask(link)


async def test_a_closed_pool_ends_its_links(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, DRAFTER)
    peers = ReplicaClients(DRAFTER)
    link = peers.open_stream(address, SessionId("s"), 1)
    link.send(opened())
    link.send(Propose(session_id=SessionId("s"), epoch=1, position=0, digest=0, count=1))
    await link.receive()
    await peers.close()
    with pytest.raises(DrafterUnavailable):
        await link.receive()
    assert set((await tier.ended.get()).epochs) == {"s"}


async def test_a_replica_describes_itself(serve: Serve, dial: Dial) -> None:
    assert await dial(await serve(RecordingTier(), EXPERT)).describe() == DESCRIPTION


async def test_a_delay_keeps_the_order(serve: Serve) -> None:
    peer = ReplicaClient(await serve(RecordingTier(), EXPERT), EXPERT, delay_s=0.001)
    link = join(peer)
    for position in range(50):
        link.send(judge(position=position))
    answers = [await link.receive() for _ in range(50)]
    assert [item.position for item in answers if isinstance(item, Judgement)] == list(range(50))
    await peer.close()


class Slow(RecordingTier):
    """Works for many beats before it answers; `alive` is asked for each."""

    def __init__(self) -> None:
        super().__init__()
        self.beats = 0
        self.waiting: tuple[Connection, ClientMessage] | None = None

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        if isinstance(message, Judge):
            self.waiting = connection, message

    @property
    def alive(self) -> bool:
        self.beats += self.waiting is not None
        if self.waiting is not None and self.beats > 3 * client.MISSED_HEARTBEATS_LIMIT:
            super().receive(*self.waiting)
        return True


class Hung(RecordingTier):
    """Never answers, and says that its engine hangs."""

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        pass

    @property
    def alive(self) -> bool:
        return False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let replicas say more often that they work."""
    monkeypatch.setattr(client, "HEARTBEAT_S", 0.05)
    monkeypatch.setattr(server, "HEARTBEAT_S", 0.02)


@pytest.mark.usefixtures("quick")
async def test_a_replica_may_take_its_time_as_long_as_it_says_so(serve: Serve, dial: Dial) -> None:
    tier = Slow()
    link = join(dial(await serve(tier, EXPERT)))
    await ask(link)
    assert tier.beats > client.MISSED_HEARTBEATS_LIMIT


@pytest.mark.usefixtures("quick")
async def test_a_replica_that_hangs_is_lost(serve: Serve, dial: Dial) -> None:
    link = join(dial(await serve(Hung(), EXPERT)))
    link.send(judge())
    with pytest.raises(ExpertUnavailable, match="silent"):
        await link.receive()


@pytest.mark.slow
async def test_a_line_that_falls_silent_is_noticed_at_both_ends(
    serve: Serve, relay: Relay, dial: Dial
) -> None:
    """No packet says so: the client counts beats, the server's pings go unanswered for 10 s."""
    tier = RecordingTier()
    line = await relay(await serve(tier, EXPERT))
    link = join(dial(line.address))
    await ask(link)
    line.silent = True
    with pytest.raises(ExpertUnavailable, match="silent"):
        await link.receive()
    assert set((await tier.ended.get()).epochs) == {"s"}


@pytest.mark.slow
async def test_a_replica_that_never_answers_is_given_up(
    serve: Serve, relay: Relay, dial: Dial
) -> None:
    line = await relay(await serve(RecordingTier(), EXPERT))
    line.silent = True
    link = join(dial(line.address))
    with pytest.raises(ExpertUnavailable, match=r"timed out|silent"):
        await link.receive()


@pytest.mark.parametrize("code", [code for code in grpc.StatusCode if code.value[0]])
async def test_a_stream_that_fails_with_any_status_is_lost(
    raw: Raw, dial: Dial, code: grpc.StatusCode
) -> None:
    async def fail(requests: AsyncIterator[bytes], context: Context) -> None:
        await anext(requests)
        await context.abort(code, "why")

    with pytest.raises(ExpertUnavailable, match=code.name):
        await join(dial(await raw(fail))).receive()
