"""The server of a replica, called by a client of raw bytes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.support.recording_tier import RecordingTier
from tests.support.rpc_errors import error_info

from cascade.benchmark.microbench import DESCRIPTION
from cascade.errors import ContextTooLong, StartupError, Unauthenticated
from cascade.protocol import write_buffer
from cascade.protocol.codec import decode_server_message, encode_frame, parse_frame
from cascade.protocol.messages import (
    Close,
    Judge,
    Judgement,
    Need,
    Open,
    Proposal,
    Propose,
    Refusal,
    Score,
    Scores,
)
from cascade.protocol.server import Connection, TierServer
from cascade.protocol.services import DRAFTER, EXPERT, LEASE_KEY, Description, TierKind
from cascade.types import Block, DecodingParams, Session, SessionId
from cascade.v1 import drafter_pb2, drafter_pb2_grpc, expert_pb2, expert_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from tests.support.tcp_relay import TcpRelay

    from cascade.protocol.codec import ClientMessage, ServerMessage

    Serve: TypeAlias = Callable[[RecordingTier, TierKind], Awaitable[str]]
    Relay: TypeAlias = Callable[[str], Awaitable[TcpRelay]]
    Call: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]


SMALL = Description(
    model="m",
    vocab_size=100,
    context_length=100,
    tokenizer_fingerprint="f",
    session_limit=2,
    item_limit=3,
)


@asynccontextmanager
async def dialled(address: str, kind: TierKind = EXPERT) -> AsyncGenerator[Call]:
    unlimited = (("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1))
    async with grpc.aio.insecure_channel(address, options=unlimited) as channel:
        call: Call = channel.stream_stream(kind.path(kind.stream_method))()
        yield call
        call.cancel()


async def send(call: Call, *messages: ClientMessage, kind: TierKind = EXPERT) -> None:
    await call.write(b"".join(encode_frame(message, kind.request) for message in messages))


async def read(call: Call, kind: TierKind = EXPERT) -> list[ServerMessage]:
    while (data := await call.read()) == b"":
        pass
    assert isinstance(data, bytes), "the stream ended"
    return [decode_server_message(item) for item in parse_frame(data, kind.response)]


async def drain(call: Call) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def failure(call: Call) -> tuple[grpc.StatusCode, str | None]:
    with pytest.raises(grpc.aio.AioRpcError) as error:
        await drain(call)
    return error.value.code(), error.value.details()


def opened(name: str = "s", *, epoch: int = 1, prompt: tuple[int, ...] = (1, 2)) -> Open:
    session = Session(id=SessionId(name), prompt=prompt, policy=DecodingParams())
    return Open(session=session, epoch=epoch, lease="lease")


def judge(
    name: str = "s", *, epoch: int = 1, position: int = 0, tokens: tuple[int, ...] = (7,)
) -> Judge:
    block = Block(tokens=tokens)
    return Judge(session_id=SessionId(name), epoch=epoch, position=position, digest=0, block=block)


def close(name: str = "s", *, epoch: int = 1) -> Close:
    return Close(session_id=SessionId(name), epoch=epoch)


def refusals(messages: list[ServerMessage]) -> list[tuple[str, int, str, str]]:
    return [
        (message.session_id, message.epoch, message.code, message.reason)
        for message in messages
        if isinstance(message, Refusal)
    ]


async def received(tier: RecordingTier, count: int) -> list[ClientMessage]:
    return [(await tier.received.get())[1] for _ in range(count)]


async def test_an_expert_judges_and_scores(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        score = Score(session_id=SessionId("q"), epoch=4, lease="", tokens=(1, 2), top=1)
        await send(call, opened(), judge(position=3, tokens=(7, 8)), score)
        verdict, scores = await read(call)
    assert isinstance(verdict, Judgement)
    assert (verdict.session_id, verdict.epoch, verdict.position) == ("s", 1, 3)
    assert verdict.verdict.tokens == (7, 8)
    assert isinstance(scores, Scores)
    assert (scores.session_id, scores.epoch, len(scores.logprobs)) == ("q", 4, 1)


async def test_on_send_is_called_for_every_message() -> None:
    connection = Connection(EXPERT)
    sent: list[ServerMessage] = []
    connection.on_send = sent.append
    need = Need(session_id=SessionId("s"), epoch=1, position=0)
    connection.send(need)
    connection.close()
    connection.send(need)
    assert sent == [need]


async def test_a_drafter_proposes(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(), DRAFTER), DRAFTER) as call:
        ask = Propose(session_id=SessionId("s"), epoch=1, position=2, digest=0, count=3)
        await send(call, opened(), ask, kind=DRAFTER)
        (proposal,) = await read(call, DRAFTER)
    assert isinstance(proposal, Proposal)
    assert (proposal.position, proposal.block.length) == (2, 3)


@pytest.mark.parametrize("kind", [DRAFTER, EXPERT], ids=lambda kind: kind.name)
async def test_the_generated_stubs_can_call_describe(serve: Serve, kind: TierKind) -> None:
    address = await serve(RecordingTier(SMALL), kind)
    async with grpc.aio.insecure_channel(address) as channel:
        if kind is DRAFTER:
            drafter = drafter_pb2_grpc.DrafterServiceStub(channel)
            request = drafter_pb2.DescribeDrafterRequest()
            description = (await drafter.DescribeDrafter(request)).description
        else:
            expert = expert_pb2_grpc.ExpertServiceStub(channel)
            description = (
                await expert.DescribeExpert(expert_pb2.DescribeExpertRequest())
            ).description
    assert (description.model, description.vocab_size, description.item_limit) == ("m", 100, 3)
    assert description.protocol_version == 2


async def test_replies_of_one_loop_iteration_are_sent_as_one_frame(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await send(call, opened("a"), opened("b"), judge("a"), judge("b"), judge("a", position=1))
        assert len(await read(call)) == 3


async def test_the_replies_of_one_pass_are_one_frame_per_stream() -> None:
    tier = RecordingTier()
    server = TierServer(tier, EXPERT)
    address = await server.start("127.0.0.1:0")
    async with dialled(address) as one, dialled(address) as two:
        await send(one, opened("a"), opened("b"))
        await send(two, opened("c"))
        clients = {
            message.session.id: connection
            for connection, message in [await tier.received.get() for _ in range(3)]
            if isinstance(message, Open)
        }
        replies = [
            (clients[name], Need(session_id=name, epoch=1, position=position))
            for position in range(50)
            for name in (SessionId("a"), SessionId("b"), SessionId("c"))
        ]
        for client, reply in replies:
            client.send(reply)
        assert len(await read(one)) == 100
        assert len(await read(two)) == 50
    await server.stop()


async def test_a_half_close_frees_the_sessions_of_the_stream(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await send(call, opened(), judge("unknown"))
        await call.done_writing()
        assert set((await tier.ended.get()).epochs) == {"s"}
        assert refusals(await read(call)) == [("unknown", 1, "NOT_FOUND", "SESSION_NOT_FOUND")]
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_a_cancelled_stream_frees_its_sessions_only(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, EXPERT)
    async with dialled(address) as stays:
        await send(stays, opened("stays"))
        async with dialled(address) as leaves:
            await send(leaves, opened("leaves"))
            await received(tier, 2)
        assert set((await tier.ended.get()).epochs) == {"leaves"}
        await send(stays, judge("stays"))
        assert len(await read(stays)) == 1


async def test_a_broken_connection_frees_its_sessions(serve: Serve, relay: Relay) -> None:
    tier = RecordingTier()
    relayed = await relay(await serve(tier, EXPERT))
    async with dialled(relayed.address) as call:
        await send(call, opened())
        connection, _ = await tier.received.get()
        relayed.cut()
        assert await tier.ended.get() is connection
        connection.send(Need(session_id=SessionId("s"), epoch=1, position=0))
        assert (await failure(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_invalid_bytes_end_their_stream_only(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, EXPERT)
    async with dialled(address) as good, dialled(address) as bad:
        await send(good, opened())
        await send(bad, opened("bad"))
        await bad.write(b"\xff\xff\xff\xff")
        code, details = await failure(bad)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details is not None
        assert "4 bytes are no cascade.v1.JudgeRequest" in details
        assert set((await tier.ended.get()).epochs) == {"bad"}
        await send(good, judge())
        assert isinstance((await read(good))[0], Judgement)


async def test_an_abort_has_error_details(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await call.write(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await read(call)
    assert error_info(error.value).reason == "INVALID_REQUEST"


@pytest.mark.parametrize(
    "item",
    [
        expert_pb2.JudgeRequestItem(),
        expert_pb2.JudgeRequestItem(close=tokens_pb2.Close()),
        expert_pb2.JudgeRequestItem(judge=expert_pb2.Judge(session_id="x" * 1000)),
    ],
    ids=["no kind", "no id", "long id"],
)
async def test_a_bad_item_without_a_session_ends_the_stream(
    serve: Serve, item: expert_pb2.JudgeRequestItem
) -> None:
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await call.write(expert_pb2.JudgeRequest(items=[item]).SerializeToString())
        assert (await failure(call))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_bad_item_refuses_its_session_only(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await send(call, opened("good"), opened("bad"))
        bad = expert_pb2.JudgeRequestItem(
            judge=expert_pb2.Judge(session_id="bad", epoch=1, position=-1)
        )
        await call.write(expert_pb2.JudgeRequest(items=[bad]).SerializeToString())
        assert refusals(await read(call)) == [("bad", 1, "INVALID_ARGUMENT", "INVALID_REQUEST")]
        await send(call, judge("good"), judge("bad"))
        judgement, refusal = await read(call)
        assert isinstance(judgement, Judgement)
        assert refusals([refusal]) == [("bad", 1, "NOT_FOUND", "SESSION_NOT_FOUND")]
    opens_close_judge = await received(tier, 4)
    assert opens_close_judge[2] == close("bad")


async def test_a_token_outside_the_vocabulary_does_not_reach_the_tier(serve: Serve) -> None:
    tier = RecordingTier(SMALL)
    async with dialled(await serve(tier, EXPERT)) as call:
        await send(call, opened(prompt=(1, 100)))
        (refusal,) = await read(call)
        assert isinstance(refusal, Refusal)
        assert refusal.message == "token id 100 is not in the vocabulary; ids are 0 to 99"
    assert tier.received.empty()


async def test_a_frame_of_too_many_items_ends_the_stream(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(SMALL), EXPERT)) as call:
        await send(call, *[close()] * 4)
        code, details = await failure(call)
    assert (code, details) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "a frame has 4 items; the limit is 3",
    )


async def test_a_frame_of_too_many_bytes_ends_its_stream_only(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, EXPERT)
    async with dialled(address) as good, dialled(address) as bad:
        await send(good, opened("good"))
        await send(bad, opened("bad"))
        await received(tier, 2)
        await bad.write(bytes(64 * 2**20 + 2048))
        assert (await failure(bad))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert set((await tier.ended.get()).epochs) == {"bad"}
        await send(good, judge("good"))
        assert isinstance((await read(good))[0], Judgement)


async def test_more_sessions_than_the_limit_are_refused(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(SMALL), EXPERT)) as call:
        await send(call, opened("a"), opened("b"), opened("c"))
        assert refusals(await read(call)) == [("c", 1, "RESOURCE_EXHAUSTED", "OVERLOADED")]
        await send(call, close("a"), opened("c"), judge("c"))
        assert isinstance((await read(call))[0], Judgement)


async def test_a_message_of_an_unknown_session_is_refused(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await send(call, judge("a"), opened("b"), close("b"), judge("b"), close("nobody"))
        assert refusals(await read(call)) == [
            ("a", 1, "NOT_FOUND", "SESSION_NOT_FOUND"),
            ("b", 1, "NOT_FOUND", "SESSION_NOT_FOUND"),
        ]
    assert await received(tier, 2) == [opened("b"), close("b")]


async def test_messages_of_an_old_epoch_are_ignored(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        old = (opened(epoch=4), judge(epoch=4), close(epoch=4))
        await send(call, opened(epoch=5), *old, judge(epoch=5))
        assert [message.epoch for message in await read(call)] == [5]
        await send(call, opened(epoch=6), judge(epoch=7), judge(epoch=6))
        replies = await read(call)
    assert refusals(replies) == [("s", 7, "NOT_FOUND", "SESSION_NOT_FOUND")]
    assert [message.epoch for message in replies] == [7, 6]


class RefusingTier(RecordingTier):
    """Raises for every block."""

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        super().receive(connection, message)
        if isinstance(message, Judge):
            raise ContextTooLong("no room")


async def test_a_tier_that_raises_refuses_the_session(serve: Serve) -> None:
    tier = RefusingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await send(call, opened(), judge())
        replies = await read(call)
        assert refusals(replies) == [("s", 1, "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")]
    assert (await received(tier, 3))[2] == close()


async def test_a_reply_too_large_for_a_frame_is_a_refusal(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        monkeypatch.setattr(write_buffer, "FRAME_LIMIT_BYTES", 1000)
        await send(call, opened(), judge(tokens=(7,) * 2000), close())
        assert refusals(await read(call)) == [("s", 1, "INTERNAL", "INTERNAL_ERROR")]
    assert (await received(tier, 3))[2] == close()


async def test_a_client_that_does_not_read_is_disconnected(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_buffer, "BACKLOG_LIMIT_BYTES", 1000)
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await send(call, opened(), *(judge(position=place) for place in range(500)))
        code, details = await failure(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details is not None
    assert "does not read" in details
    assert set((await tier.ended.get()).epochs) == {"s"}


async def test_many_sessions_share_a_stream(serve: Serve) -> None:
    names = [f"session {number}" for number in range(500)]
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await send(call, *(opened(name) for name in names))
        await send(call, *(judge(name) for name in reversed(names)))
        replies: list[ServerMessage] = []
        while len(replies) < len(names):
            replies += await read(call)
    assert [message.session_id for message in replies] == names[::-1]


async def test_health_follows_the_server() -> None:
    """Checked, watched and listed."""
    server, status = TierServer(RecordingTier(), DRAFTER), health_pb2.HealthCheckResponse
    list_request: Any = health_pb2.HealthListRequest  # pyright: ignore[reportAttributeAccessIssue, reportUnknownVariableType] - absent from the stubs
    async with grpc.aio.insecure_channel(await server.start("127.0.0.1:0")) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        names = ("", DRAFTER.service)
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in names]
        for expected in (status.SERVING, status.NOT_SERVING):
            await server.set_serving(serving=expected == status.SERVING)
            for name in names:
                asked = health_pb2.HealthCheckRequest(service=name)
                assert (await health.Check(asked)).status == expected
            assert [(await watch.read()).status for watch in watches] == [expected, expected]
            listed = (await health.List(list_request())).statuses
            assert {name: one.status for name, one in listed.items()} == dict.fromkeys(
                names, expected
            )
        for watch in watches:
            watch.cancel()
    await server.stop()


async def test_a_description_that_fails_has_a_short_status(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tier = RecordingTier()
    server = TierServer(tier, DRAFTER)
    async with grpc.aio.insecure_channel(await server.start("127.0.0.1:0")) as channel:

        def broken() -> Description:
            raise ZeroDivisionError("a secret of the tier")

        tier.describe = broken
        call: Any = channel.unary_unary(f"/{DRAFTER.service}/{DRAFTER.describe_method}")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "secret" not in (caught.value.details() or "")
    assert "a secret of the tier" in caplog.text
    await server.stop()


class GuardedTier(RecordingTier):
    """Lets in who has a token, while `open`."""

    open = True

    def authenticate(self, lease: str) -> None:
        if lease != "mine" or not self.open:
            raise Unauthenticated("no such lease")


async def test_a_stream_without_a_lease_is_refused_unread(serve: Serve) -> None:
    """A stranger sends frames of megabytes: nothing is parsed, and nobody waits for that."""
    tier = GuardedTier()
    address = await serve(tier, EXPERT)
    async with dialled(address) as call:
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED
    async with dialled(address) as call:
        with suppress(grpc.aio.AioRpcError, asyncio.InvalidStateError):
            for _ in range(4):
                await call.write(bytes(16 * 2**20))
        assert await call.code() is not grpc.StatusCode.OK
    assert tier.received.empty()
    assert tier.ended.empty()


async def test_a_description_takes_a_lease_too(serve: Serve) -> None:
    """That of an open stream serves, also when its own session is over."""
    tier = GuardedTier()
    address = await serve(tier, EXPERT)
    async with grpc.aio.insecure_channel(address) as channel:
        describe: Any = channel.unary_unary(EXPERT.path(EXPERT.describe_method))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await describe(b"")
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        with_lease = ((LEASE_KEY, "mine"),)
        call = channel.stream_stream(EXPERT.path(EXPERT.stream_method))(metadata=with_lease)
        assert await call.read() == b""  # a heartbeat: it is open
        tier.open = False
        await describe(b"", metadata=with_lease)
        call.cancel()
        await tier.ended.get()
    async with grpc.aio.insecure_channel(address) as channel:
        describe = channel.unary_unary(EXPERT.path(EXPERT.describe_method))
        with pytest.raises(grpc.aio.AioRpcError):
            await describe(b"", metadata=with_lease)


async def test_a_range_of_ports_gives_the_first_that_is_free() -> None:
    first = TierServer(RecordingTier(), EXPERT)
    taken = int((await first.start("127.0.0.1:0")).rpartition(":")[2])
    second = TierServer(RecordingTier(), EXPERT)
    address = await second.start(f"127.0.0.1:{taken}-{taken + 20}")
    assert taken < int(address.rpartition(":")[2]) <= taken + 20
    await first.stop()
    await second.stop()


async def test_an_address_in_use_is_a_startup_error(serve: Serve) -> None:
    address = await serve(RecordingTier(), EXPERT)
    with pytest.raises(StartupError, match=f"{address} cannot be bound"):
        await TierServer(RecordingTier(), EXPERT).start(address)


async def test_stopping_ends_streams_and_frees_their_sessions() -> None:
    tier = RecordingTier(DESCRIPTION)
    server = TierServer(tier, EXPERT)
    async with dialled(await server.start("127.0.0.1:0")) as call:
        await send(call, opened())
        await received(tier, 1)
        await asyncio.gather(server.stop(), server.stop())
        assert set((await tier.ended.get()).epochs) == {"s"}
        assert (await failure(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_bytes_that_are_not_http2_disturb_no_other_connection(serve: Serve) -> None:
    address = await serve(RecordingTier(), EXPERT)
    async with dialled(address) as call:
        await send(call, opened())
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64)
        with suppress(OSError):  # the server may have closed it already
            await reader.read()
        writer.close()
        await send(call, judge())
        assert isinstance((await read(call))[0], Judgement)


async def test_an_unexpected_exception_ends_the_stream_and_frees_its_sessions(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(RecordingTier):
        def receive(self, connection: Connection, message: ClientMessage) -> None:
            super().receive(connection, message)
            raise ZeroDivisionError("a secret of the tier")

    tier = Broken()
    async with dialled(await serve(tier, EXPERT)) as call:
        await send(call, opened())
        code, details = await failure(call)
        assert code is grpc.StatusCode.INTERNAL
        assert "secret" not in (details or "")
        assert set((await tier.ended.get()).epochs) == {"s"}
    assert "ZeroDivisionError" in caplog.text
