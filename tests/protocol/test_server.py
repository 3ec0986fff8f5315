"""The server, spoken to by a client that knows nothing but bytes."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Protocol, TypeAlias

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from tests.support.recording_tier import RecordingTier

from cascade.benchmark.microbench import DESCRIPTION
from cascade.errors import ContextTooLong, StartupError
from cascade.protocol import grpc_status, write_buffer
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
from cascade.protocol.services import DRAFTER, EXPERT, Description, TierKind
from cascade.types import Block, DecodingParams, Session, SessionId
from cascade.v1 import drafter_pb2, drafter_pb2_grpc, expert_pb2, expert_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from cascade.protocol.codec import ClientMessage, ServerMessage

    Serve: TypeAlias = Callable[[RecordingTier, TierKind], Awaitable[str]]
    Call: TypeAlias = grpc.aio.StreamStreamCall[bytes, bytes]


class Line(Protocol):
    """A TCP relay, as `conftest` makes them."""

    address: str
    silent: bool

    def cut(self) -> None: ...


Relay: TypeAlias = "Callable[[str], Awaitable[Line]]"


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


async def tell(call: Call, *items: ClientMessage, kind: TierKind = EXPERT) -> None:
    await call.write(b"".join(encode_frame(item, kind.request) for item in items))


async def hear(call: Call, kind: TierKind = EXPERT) -> list[ServerMessage]:
    while (data := await call.read()) == b"":
        pass
    assert isinstance(data, bytes), "the stream ended"
    return [decode_server_message(message) for message in parse_frame(data, kind.response)]


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


def refusals(answers: list[ServerMessage]) -> list[tuple[str, int, str, str]]:
    return [
        (item.session_id, item.epoch, item.code, item.reason)
        for item in answers
        if isinstance(item, Refusal)
    ]


async def seen(tier: RecordingTier, count: int) -> list[ClientMessage]:
    return [(await tier.received.get())[1] for _ in range(count)]


async def test_an_expert_judges_and_scores(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        score = Score(session_id=SessionId("q"), epoch=4, lease="", tokens=(1, 2), top=1)
        await tell(call, opened(), judge(position=3, tokens=(7, 8)), score)
        verdict, scores = await hear(call)
    assert isinstance(verdict, Judgement)
    assert (verdict.session_id, verdict.epoch, verdict.position) == ("s", 1, 3)
    assert verdict.verdict.tokens == (7, 8)
    assert isinstance(scores, Scores)
    assert (scores.session_id, scores.epoch, len(scores.logprobs)) == ("q", 4, 1)


async def test_who_watches_a_connection_hears_what_leaves() -> None:
    connection = Connection(EXPERT)
    heard: list[ServerMessage] = []
    connection.on_send = heard.append
    need = Need(session_id=SessionId("s"), epoch=1, position=0)
    connection.send(need)
    connection.close()
    connection.send(need)
    assert heard == [need]


async def test_a_drafter_proposes(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(), DRAFTER), DRAFTER) as call:
        ask = Propose(session_id=SessionId("s"), epoch=1, position=2, digest=0, count=3)
        await tell(call, opened(), ask, kind=DRAFTER)
        (proposal,) = await hear(call, DRAFTER)
    assert isinstance(proposal, Proposal)
    assert (proposal.position, proposal.block.length) == (2, 3)


@pytest.mark.parametrize("kind", [DRAFTER, EXPERT], ids=lambda kind: kind.name)
async def test_the_generated_stubs_understand_the_server(serve: Serve, kind: TierKind) -> None:
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


async def test_answers_of_one_tick_leave_as_one_frame(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await tell(call, opened("a"), opened("b"), judge("a"), judge("b"), judge("a", position=1))
        assert len(await hear(call)) == 3


async def test_a_pass_is_sent_as_one_frame_a_stream() -> None:
    tier = RecordingTier()
    server = TierServer(tier, EXPERT)
    address = await server.start("127.0.0.1:0")
    async with dialled(address) as one, dialled(address) as two:
        await tell(one, opened("a"), opened("b"))
        await tell(two, opened("c"))
        clients = {
            item.session.id: connection
            for connection, item in [await tier.received.get() for _ in range(3)]
            if isinstance(item, Open)
        }
        answers = [
            (clients[name], Need(session_id=name, epoch=1, position=position))
            for position in range(50)
            for name in (SessionId("a"), SessionId("b"), SessionId("c"))
        ]
        for client, answer in answers:
            client.send(answer)
        assert len(await hear(one)) == 100
        assert len(await hear(two)) == 50
    await server.stop()


async def test_the_half_close_of_a_client_frees_its_sessions(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await tell(call, opened(), judge("unknown"))
        await call.done_writing()
        assert set((await tier.ended.get()).epochs) == {"s"}
        assert refusals(await hear(call)) == [("unknown", 1, "NOT_FOUND", "SESSION_NOT_FOUND")]
        assert await call.read() is grpc.aio.EOF
        assert await call.code() is grpc.StatusCode.OK


async def test_a_client_that_cancels_frees_its_sessions_and_no_others(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, EXPERT)
    async with dialled(address) as stays:
        await tell(stays, opened("stays"))
        async with dialled(address) as leaves:
            await tell(leaves, opened("leaves"))
            await seen(tier, 2)
        assert set((await tier.ended.get()).epochs) == {"leaves"}
        await tell(stays, judge("stays"))
        assert len(await hear(stays)) == 1


async def test_a_client_that_is_cut_off_frees_its_sessions(serve: Serve, relay: Relay) -> None:
    tier = RecordingTier()
    line = await relay(await serve(tier, EXPERT))
    async with dialled(line.address) as call:
        await tell(call, opened())
        connection, _ = await tier.received.get()
        line.cut()
        assert await tier.ended.get() is connection
        connection.send(Need(session_id=SessionId("s"), epoch=1, position=0))
        assert (await failure(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_rubbish_ends_its_stream_and_no_other(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, EXPERT)
    async with dialled(address) as good, dialled(address) as bad:
        await tell(good, opened())
        await tell(bad, opened("bad"))
        await bad.write(b"\xff\xff\xff\xff")
        code, details = await failure(bad)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert details is not None
        assert "4 bytes are no cascade.v1.JudgeRequest" in details
        assert set((await tier.ended.get()).epochs) == {"bad"}
        await tell(good, judge())
        assert isinstance((await hear(good))[0], Judgement)


async def test_the_details_of_an_abort_are_ours(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await call.write(b"\xff")
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
    ours = grpc_status.to_error(error.value)
    assert grpc_status.reason(ours) == "INVALID_REQUEST"


@pytest.mark.parametrize(
    "item",
    [
        expert_pb2.JudgeRequestItem(),
        expert_pb2.JudgeRequestItem(close=tokens_pb2.Close()),
        expert_pb2.JudgeRequestItem(judge=expert_pb2.Judge(session_id="x" * 1000)),
    ],
    ids=["no kind", "no id", "endless id"],
)
async def test_a_bad_item_of_nobody_ends_the_stream(
    serve: Serve, item: expert_pb2.JudgeRequestItem
) -> None:
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await call.write(expert_pb2.JudgeRequest(items=[item]).SerializeToString())
        assert (await failure(call))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_a_bad_item_of_a_session_refuses_that_session_alone(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await tell(call, opened("good"), opened("bad"))
        bad = expert_pb2.JudgeRequestItem(
            judge=expert_pb2.Judge(session_id="bad", epoch=1, position=-1)
        )
        await call.write(expert_pb2.JudgeRequest(items=[bad]).SerializeToString())
        assert refusals(await hear(call)) == [("bad", 1, "INVALID_ARGUMENT", "INVALID_REQUEST")]
        await tell(call, judge("good"), judge("bad"))
        judgement, refusal = await hear(call)
        assert isinstance(judgement, Judgement)
        assert refusals([refusal]) == [("bad", 1, "NOT_FOUND", "SESSION_NOT_FOUND")]
    opens_close_judge = await seen(tier, 4)
    assert opens_close_judge[2] == close("bad")


async def test_a_token_past_the_vocabulary_never_reaches_the_tier(serve: Serve) -> None:
    tier = RecordingTier(SMALL)
    async with dialled(await serve(tier, EXPERT)) as call:
        await tell(call, opened(prompt=(1, 100)))
        (refusal,) = await hear(call)
        assert isinstance(refusal, Refusal)
        assert refusal.message == "token id 100 is not in the vocabulary; ids are 0 to 99"
    assert tier.received.empty()


async def test_a_frame_of_too_many_items_ends_the_stream(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(SMALL), EXPERT)) as call:
        await tell(call, *[close()] * 4)
        code, details = await failure(call)
    assert (code, details) == (
        grpc.StatusCode.INVALID_ARGUMENT,
        "a frame has 4 items; the limit is 3",
    )


async def test_a_frame_of_too_many_bytes_ends_its_stream_and_no_other(serve: Serve) -> None:
    tier = RecordingTier()
    address = await serve(tier, EXPERT)
    async with dialled(address) as good, dialled(address) as bad:
        await tell(good, opened("good"))
        await tell(bad, opened("bad"))
        await seen(tier, 2)
        await bad.write(bytes(64 * 2**20 + 2048))
        assert (await failure(bad))[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert set((await tier.ended.get()).epochs) == {"bad"}
        await tell(good, judge("good"))
        assert isinstance((await hear(good))[0], Judgement)


async def test_a_stream_holds_no_more_sessions_than_agreed(serve: Serve) -> None:
    async with dialled(await serve(RecordingTier(SMALL), EXPERT)) as call:
        await tell(call, opened("a"), opened("b"), opened("c"))
        assert refusals(await hear(call)) == [("c", 1, "RESOURCE_EXHAUSTED", "OVERLOADED")]
        await tell(call, close("a"), opened("c"), judge("c"))
        assert isinstance((await hear(call))[0], Judgement)


async def test_an_item_of_an_unknown_session_is_refused(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await tell(call, judge("a"), opened("b"), close("b"), judge("b"), close("nobody"))
        assert refusals(await hear(call)) == [
            ("a", 1, "NOT_FOUND", "SESSION_NOT_FOUND"),
            ("b", 1, "NOT_FOUND", "SESSION_NOT_FOUND"),
        ]
    assert await seen(tier, 2) == [opened("b"), close("b")]


async def test_items_of_an_old_epoch_change_nothing(serve: Serve) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        old = (opened(epoch=4), judge(epoch=4), close(epoch=4))
        await tell(call, opened(epoch=5), *old, judge(epoch=5))
        assert [item.epoch for item in await hear(call)] == [5]
        await tell(call, opened(epoch=6), judge(epoch=7), judge(epoch=6))
        answers = await hear(call)
    assert refusals(answers) == [("s", 7, "NOT_FOUND", "SESSION_NOT_FOUND")]
    assert [item.epoch for item in answers] == [7, 6]


class Strict(RecordingTier):
    """Refuses every block, as a tier does: by raising."""

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        super().receive(connection, message)
        if isinstance(message, Judge):
            raise ContextTooLong("no room")


async def test_a_tier_that_raises_refuses_the_session(serve: Serve) -> None:
    tier = Strict()
    async with dialled(await serve(tier, EXPERT)) as call:
        await tell(call, opened(), judge())
        answers = await hear(call)
        assert refusals(answers) == [("s", 1, "INVALID_ARGUMENT", "CONTEXT_LENGTH_EXCEEDED")]
    assert (await seen(tier, 3))[2] == close()


async def test_an_answer_too_large_for_a_frame_is_a_refusal(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        monkeypatch.setattr(write_buffer, "FRAME_LIMIT_BYTES", 1000)
        await tell(call, opened(), judge(tokens=(7,) * 2000), close())
        assert refusals(await hear(call)) == [("s", 1, "INTERNAL", "INTERNAL_ERROR")]
    assert (await seen(tier, 3))[2] == close()


async def test_a_client_that_does_not_read_is_cut_off(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write_buffer, "BACKLOG_LIMIT_BYTES", 1000)
    tier = RecordingTier()
    async with dialled(await serve(tier, EXPERT)) as call:
        await tell(call, opened(), *(judge(position=place) for place in range(500)))
        code, details = await failure(call)
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert details is not None
    assert "does not read" in details
    assert set((await tier.ended.get()).epochs) == {"s"}


async def test_many_sessions_share_a_stream(serve: Serve) -> None:
    names = [f"session {number}" for number in range(500)]
    async with dialled(await serve(RecordingTier(), EXPERT)) as call:
        await tell(call, *(opened(name) for name in names))
        await tell(call, *(judge(name) for name in reversed(names)))
        answers: list[ServerMessage] = []
        while len(answers) < len(names):
            answers += await hear(call)
    assert [item.session_id for item in answers] == names[::-1]


async def test_health_follows_the_server() -> None:
    server = TierServer(RecordingTier(), DRAFTER)
    async with grpc.aio.insecure_channel(await server.start("127.0.0.1:0")) as channel:
        check = channel.unary_unary(
            "/grpc.health.v1.Health/Check",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )

        async def state(name: str) -> int:
            return (await check(health_pb2.HealthCheckRequest(service=name))).status

        for name in ("", DRAFTER.service):
            assert await state(name) == health_pb2.HealthCheckResponse.SERVING
        await server.set_serving(serving=False)
        for name in ("", DRAFTER.service):
            assert await state(name) == health_pb2.HealthCheckResponse.NOT_SERVING
    await server.stop()


async def test_reflection_names_the_service_and_its_file(serve: Serve) -> None:
    async with grpc.aio.insecure_channel(await serve(RecordingTier(), EXPERT)) as channel:
        call = channel.stream_stream(
            "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
            reflection_pb2.ServerReflectionRequest.SerializeToString,
            reflection_pb2.ServerReflectionResponse.FromString,
        )()
        await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
        await call.write(
            reflection_pb2.ServerReflectionRequest(file_containing_symbol=EXPERT.service)
        )
        answers = [await call.read(), await call.read()]
        call.cancel()
    names, file = [str(answer) for answer in answers]
    assert EXPERT.service in names
    assert "cascade/v1/expert.proto" in file


async def test_an_address_in_use_is_a_startup_error(serve: Serve) -> None:
    address = await serve(RecordingTier(), EXPERT)
    with pytest.raises(StartupError, match=f"{address} cannot be bound"):
        await TierServer(RecordingTier(), EXPERT).start(address)


async def test_stopping_ends_streams_and_frees_their_sessions() -> None:
    tier = RecordingTier(DESCRIPTION)
    server = TierServer(tier, EXPERT)
    async with dialled(await server.start("127.0.0.1:0")) as call:
        await tell(call, opened())
        await seen(tier, 1)
        await asyncio.gather(server.stop(), server.stop())
        assert set((await tier.ended.get()).epochs) == {"s"}
        assert (await failure(call))[0] is grpc.StatusCode.UNAVAILABLE


async def test_bytes_that_are_not_even_http_harm_nobody(serve: Serve) -> None:
    address = await serve(RecordingTier(), EXPERT)
    async with dialled(address) as call:
        await tell(call, opened())
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"GET / HTTP/1.1\r\n\r\n" + bytes(range(256)) * 64)
        with suppress(OSError):  # the server may have hung up already
            await reader.read()
        writer.close()
        await tell(call, judge())
        assert isinstance((await hear(call))[0], Judgement)


async def test_a_defect_of_the_tier_ends_the_stream_and_frees_its_sessions(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(RecordingTier):
        def receive(self, connection: Connection, message: ClientMessage) -> None:
            super().receive(connection, message)
            raise ZeroDivisionError

    tier = Broken()
    async with dialled(await serve(tier, EXPERT)) as call:
        await tell(call, opened())
        assert (await failure(call))[0] is grpc.StatusCode.UNKNOWN
        assert set((await tier.ended.get()).epochs) == {"s"}
    assert "ZeroDivisionError" in caplog.text
