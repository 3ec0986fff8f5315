"""The gRPC API, with a real server and channel."""

from __future__ import annotations

import asyncio
import json
import math
import re
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray.serve.grpc_util import RayServegRPCContext
from tests.support.rpc_errors import error_info, status_of

from cascade.api.grpc import GenerationServicer
from cascade.api.keys import Keys
from cascade.api.schema import ChatBody, CompletionBody, Options
from cascade.errors import Overloaded
from cascade.rules import Lossy
from cascade.types import Confidence, SamplingParams, SequenceCascadeParams
from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc as rpc
from cascade.v1 import tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

    from openai import AsyncOpenAI
    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext
    from cascade.types import Request


CHOW = tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=0.5))
HELLO = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])

# Its messages for `List` are absent from the stubs.
HEALTH: Any = health_pb2

# Names that the protos do not have, or have elsewhere.
HTTP_ONLY = {
    *{*ChatBody.model_fields, *CompletionBody.model_fields, *Options.model_fields}
    - set(pb.Generation.DESCRIPTOR.fields_by_name),
}


def said(role: str, content: str) -> pb.Chat:
    return pb.Chat(messages=[pb.ChatMessage(role=role, content=content)])


def biased(token: int, bias: float) -> tokens_pb2.Sampling:
    return tokens_pb2.Sampling(logit_biases=[tokens_pb2.LogitBias(token_id=token, bias=bias)])


@asynccontextmanager
async def served(
    servicer: GenerationServicer, *, options: Sequence[tuple[str, str]] = ()
) -> AsyncGenerator[grpc.aio.Channel]:
    """Serve on a port, and yield a channel with these options."""
    server = grpc.aio.server()
    rpc.add_GenerationServiceServicer_to_server(servicer, server)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as opened:
        yield opened
    await server.stop(None)


@pytest.fixture
async def channel(service: ServingContext) -> AsyncIterator[grpc.aio.Channel]:
    async with served(GenerationServicer(lambda: service)) as opened:
        yield opened


@pytest.fixture
def stub(channel: grpc.aio.Channel) -> rpc.GenerationServiceAsyncStub:
    return rpc.GenerationServiceStub(channel)


def generation(**fields: Any) -> pb.Generation:
    prompts = {"text", "tokens", "chat"} & set(fields)
    given: dict[str, Any] = fields if prompts else {"text": "Buzz"} | fields
    return pb.Generation(**given)


def whole(**fields: Any) -> pb.GenerateRequest:
    return pb.GenerateRequest(generation=generation(**fields))


def stream(**fields: Any) -> pb.GenerateStreamRequest:
    return pb.GenerateStreamRequest(generation=generation(**fields))


async def test_a_choice_has_text_tokens_and_origins(
    stub: rpc.GenerationServiceAsyncStub, service: ServingContext
) -> None:
    response = await stub.Generate(whole(seed=7, max_tokens=5))
    (choice,) = response.choices
    assert choice.text == service.tokenizer.decode(choice.token_ids)
    assert (
        len(choice.token_ids) == len(choice.origins) == response.usage.completion_token_count == 5
    )
    assert choice.finish_reason == pb.FINISH_REASON_LENGTH
    assert (response.model, response.create_time.seconds) == ("pair", 1_800_000_000)


async def test_the_deltas_of_a_stream_join_to_the_response(
    stub: rpc.GenerationServiceAsyncStub,
) -> None:
    response = await stub.Generate(whole(seed=7, max_tokens=30, choice_count=2))
    frames = [
        frame async for frame in stub.GenerateStream(stream(seed=7, max_tokens=30, choice_count=2))
    ]
    texts = ["", ""]
    for frame in frames:
        for choice in frame.choices:
            texts[choice.index] += choice.text
    assert texts == [choice.text for choice in response.choices]
    assert frames[-1].usage == response.usage
    assert not any(frame.HasField("usage") for frame in frames[:-1])
    assert len({frame.request_id for frame in frames}) == 1


async def test_the_same_request_over_http_gets_the_same_completions(
    stub: rpc.GenerationServiceAsyncStub, client: AsyncOpenAI
) -> None:
    """Conformance 40: same tokens, same usage."""
    asked = {"rule": {"kind": "token_v3", "alpha": 0.5}, "draft_tokens": 3}
    by_http = await client.completions.create(
        model="pair",
        prompt="Buzz",
        seed=7,
        max_tokens=12,
        n=2,
        stop="zz",
        extra_body={"cascade": asked, "return_token_ids": True},
    )
    by_grpc = await stub.Generate(
        whole(
            seed=7,
            max_tokens=12,
            choice_count=2,
            stop_strings=["zz"],
            fixed_draft_length=3,
            rule=tokens_pb2.Rule(token_v3=tokens_pb2.TokenV3(alpha=0.5)),
        )
    )
    for ours, theirs in zip(by_grpc.choices, by_http.choices, strict=True):
        assert ours.text == theirs.text
        assert list(ours.token_ids) == (theirs.model_extra or {})["token_ids"]
    usage = by_http.usage
    assert usage is not None
    assert by_grpc.usage.prompt_token_count == usage.prompt_tokens
    assert by_grpc.usage.completion_token_count == usage.completion_tokens
    cost = (usage.model_extra or {})["cascade"]
    assert by_grpc.usage.drafted_count == cost["drafted"]
    assert list(by_grpc.usage.accepted_lengths) == cost["accepted_lengths"]


async def test_every_field_reaches_the_generator(
    stub: rpc.GenerationServiceAsyncStub, generator: ScriptedGenerator, service: ServingContext
) -> None:
    await stub.Generate(
        whole(
            sampling=tokens_pb2.Sampling(
                temperature=0.5,
                top_k=3,
                top_p=0.9,
                min_p=0.1,
                presence_penalty=1.0,
                logit_biases=[tokens_pb2.LogitBias(token_id=4, bias=-2.0)],
            ),
            stop_token_ids=[9],
            logprob_count=7,
            mode=pb.MODE_CASCADE,
            rule=tokens_pb2.Rule(lossy=tokens_pb2.Lossy(alpha=0.0)),
            automatic_draft_length=pb.AutomaticDraftLength(),
            coupling=tokens_pb2.COUPLING_GUMBEL,
            bonus=tokens_pb2.BONUS_NONE,
            verification=tokens_pb2.VERIFICATION_TOKEN,
            row_format=tokens_pb2.ROW_FORMAT_FULL,
            patience=pb.Patience(confidence=pb.CONFIDENCE_QUANTILE, threshold=-0.0),
            prediction="on the Moon",
            trace=True,
            expert_loss=pb.EXPERT_LOSS_DRAFTER,
            drafter_loss=pb.DRAFTER_LOSS_WAIT,
        )
    )
    (request,) = generator.requests
    policy = request.policy
    assert policy.sampling == SamplingParams(
        temperature=0.5,
        top_k=3,
        top_p=0.9,
        min_p=0.1,
        presence_penalty=1.0,
        logit_bias=((4, -2.0),),
    )
    assert (policy.rule, policy.coupling, policy.bonus) == (Lossy(alpha=0.0), "gumbel", "none")
    assert (policy.verification, policy.rows, policy.logprobs) == ("token", "full", 7)
    assert policy.stop_ids == (*service.tokenizer.stop_ids, 9)
    assert (request.mode, request.draft_tokens, request.trace) == ("cascade", None, True)
    assert request.patience == SequenceCascadeParams(confidence=Confidence.QUANTILE, threshold=0.0)
    assert service.tokenizer.decode(request.prediction) == "on the Moon"
    assert (request.on_expert_loss, request.on_drafter_loss) == ("drafter", "wait")


async def test_a_conversation_goes_through_the_template(
    stub: rpc.GenerationServiceAsyncStub, generator: ScriptedGenerator, service: ServingContext
) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="user", content="hi")])
    await stub.Generate(pb.GenerateRequest(generation=pb.Generation(chat=chat)))
    assert service.tokenizer.decode(generator.requests[0].prompt) == "user: hi"


async def test_echoed_tokens_come_first_and_have_no_origin(
    stub: rpc.GenerationServiceAsyncStub,
) -> None:
    """The first token of a prompt has no log-probability: NaN."""
    tokens = pb.TokenIds(token_ids=[5, 6, 7])
    fields: dict[str, Any] = {"tokens": tokens, "echo": True, "max_tokens": 2, "logprob_count": 1}
    request = pb.GenerateRequest(generation=pb.Generation(**fields))
    (choice,) = (await stub.Generate(request)).choices
    assert list(choice.token_ids[:3]) == [5, 6, 7]
    assert (len(choice.token_ids), len(choice.origins), len(choice.logprobs)) == (5, 2, 5)
    assert math.isnan(choice.logprobs[0].logprob)


async def test_trace_returns_the_rounds(stub: rpc.GenerationServiceAsyncStub) -> None:
    (choice,) = (await stub.Generate(whole(max_tokens=4, trace=True))).choices
    assert [entry.token_count for entry in choice.rounds] == [3, 1]


async def test_rounds_without_a_draft_are_reported_with_their_cause(
    stub: rpc.GenerationServiceAsyncStub, generator: ScriptedGenerator
) -> None:
    generator.undrafted = "late"
    response = await stub.Generate(whole(max_tokens=4, trace=True))
    (choice,) = response.choices
    assert [entry.undrafted_cause for entry in choice.rounds] == ["late", "late"]
    assert dict(choice.undrafted_rounds) == dict(response.usage.undrafted_rounds) == {"late": 2}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"choice_count": 99}, "choice_count"),
        ({"choice_count": 0}, "choice_count"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprob_count": 21}, "logprob_count"),
        ({"stop_strings": ["a"] * 65}, "stop_strings"),
        ({"fixed_draft_length": 99}, "fixed_draft_length"),
        ({"divergence_budget": -0.5}, "divergence_budget"),
        ({"divergence_budget": math.nan}, "divergence_budget"),
        ({"divergence_budget": math.inf}, "divergence_budget"),
        ({"divergence_budget": 1.0, "mode": pb.MODE_DRAFTER_ONLY}, "mode"),
        ({"sampling": tokens_pb2.Sampling(temperature=math.nan)}, "sampling.temperature"),
        ({"sampling": tokens_pb2.Sampling(top_p=1.5)}, "sampling.top_p"),
        ({"rule": tokens_pb2.Rule()}, "rule"),
        ({"rule": tokens_pb2.Rule(chow=tokens_pb2.Chow())}, "rule.chow.alpha"),
        ({"rule": tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=math.nan))}, "rule.chow.alpha"),
        ({"rule": tokens_pb2.Rule(opt=tokens_pb2.Opt(alpha=1e300))}, "rule.opt.alpha"),
        ({"mode": 77}, "mode"),
        ({"coupling": 77}, "coupling"),
        ({"row_format": 77}, "row_format"),
        ({"expert_loss": 77}, "expert_loss"),
        ({"drafter_loss": 77}, "drafter_loss"),
        ({"patience": pb.Patience(confidence=cast("Any", 77))}, "patience.confidence"),
        ({"patience": pb.Patience(threshold=math.nan)}, "patience.threshold"),
        ({"seed": 1, "verification": tokens_pb2.VERIFICATION_BLOCK}, "verification"),
        ({"stop_strings": ["a", ""]}, "stop_strings[1]"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"sampling": biased(10**6, 1.0)}, "sampling.logit_biases"),
        ({"sampling": biased(5, 101.0)}, "sampling.logit_biases"),
        ({"sampling": biased(5, math.nan)}, "sampling.logit_biases"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"chat": HELLO, "max_tokens": 5000}, "max_tokens"),
        ({"chat": HELLO, "logprob_count": 21}, "logprob_count"),
        ({"mode": pb.MODE_EXPERT_ONLY, "rule": CHOW}, "rule"),
        ({"text": ""}, "text"),
        ({"text": "x" * 10**5}, "text"),
        ({"tokens": pb.TokenIds()}, "tokens.token_ids"),
        ({"tokens": pb.TokenIds(token_ids=[2**32 - 1])}, "tokens.token_ids"),
        ({"chat": pb.Chat()}, "chat.messages"),
        ({"chat": said("wizard", "hi")}, "chat.messages[0].role"),
        ({"chat": said("assistant", "hi")}, "chat.messages"),
        ({"chat": said("user", "x" * 10**5)}, "chat.messages"),
        ({"chat": pb.Chat(messages=[pb.ChatMessage(role="user")]), "echo": True}, "echo"),
    ],
)
async def test_an_invalid_field_has_its_proto_name(
    stub: rpc.GenerationServiceAsyncStub, fields: dict[str, Any], param: str
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(whole(**fields))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert error_info(caught.value).metadata["param"] == param
    named = re.findall(r"`([\w.]+)[`\[:]", caught.value.details() or "")
    assert HTTP_ONLY.isdisjoint(name.split(".")[0] for name in named)


async def test_a_request_without_a_prompt_is_refused(stub: rpc.GenerationServiceAsyncStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest())
    assert error_info(caught.value).metadata["param"] == "prompt"


async def test_an_unknown_model_is_not_found(stub: rpc.GenerationServiceAsyncStub) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(whole(model="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert error_info(caught.value).reason == "MODEL_NOT_FOUND"


async def overloaded(_request: Request, _position: int) -> None:
    raise Overloaded("no room", retry_after_s=2.0)


async def broken(_request: Request, position: int) -> None:
    if position:
        raise ZeroDivisionError("a secret of the server")


async def test_errors_have_details_unary_and_streamed(
    stub: rpc.GenerationServiceAsyncStub, generator: ScriptedGenerator
) -> None:
    """A failed stream has one more message: Ray Serve's proxy would lose the status without."""
    generator.pause = overloaded
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(whole())
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        assert [frame async for frame in stub.GenerateStream(stream())]
    assert error_info(streamed.value).reason == error_info(caught.value).reason == "OVERLOADED"


async def test_an_unexpected_exception_is_internal_and_its_text_hidden(
    stub: rpc.GenerationServiceAsyncStub, generator: ScriptedGenerator
) -> None:
    generator.pause = broken
    call = stub.GenerateStream(stream())
    frames = [await call.read(), await call.read()]
    assert await call.code() is grpc.StatusCode.INTERNAL
    assert "secret" not in await call.details()
    last = cast("pb.GenerateStreamResponse", frames[-1])
    assert last.choices[0].finish_reason == pb.FINISH_REASON_ERROR
    assert generator.open == 0


async def test_a_cancelled_call_ends_its_generation(
    stub: rpc.GenerationServiceAsyncStub, generator: ScriptedGenerator
) -> None:
    async def forever(_request: Request, position: int) -> None:
        if position:
            await asyncio.Event().wait()

    generator.pause = forever
    call = stub.GenerateStream(stream())
    await call.read()
    assert generator.open == 1
    call.cancel()
    async with asyncio.timeout(10):
        await generator.idle.wait()


async def test_models_are_listed(stub: rpc.GenerationServiceAsyncStub) -> None:
    listed = (await stub.ListModels(pb.ListModelsRequest())).models
    assert [(model.name, model.context_length) for model in listed] == [
        ("pair", 512),
        ("org/pair", 512),
    ]


async def test_health_is_readiness(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    for name in ("", "cascade.v1.GenerationService", "readiness", "liveness"):
        response = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert response.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="other"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize(
    ("name", "status"), [("", "NOT_SERVING"), ("readiness", "NOT_SERVING"), ("liveness", "SERVING")]
)
async def test_without_models_a_router_is_alive_but_not_ready(
    service: ServingContext, name: str, status: str
) -> None:
    servicer = GenerationServicer(lambda: replace(service, ready=lambda: False))
    request = health_pb2.HealthCheckRequest(service=name)
    response = await servicer.Check(request, FakeContext())
    assert response.status == health_pb2.HealthCheckResponse.ServingStatus.Value(status)


async def test_health_lists_every_name(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    listed = (await health.List(HEALTH.HealthListRequest())).statuses
    assert set(listed) == {"", "cascade.v1.GenerationService", "readiness", "liveness"}
    assert {one.status for one in listed.values()} == {health_pb2.HealthCheckResponse.SERVING}


async def test_watched_health_follows_the_server(service: ServingContext) -> None:
    ready = [False]
    waiting = replace(service, ready=lambda: ready[0])
    status = health_pb2.HealthCheckResponse
    async with served(GenerationServicer(lambda: waiting, poll_s=0.001)) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        call = health.Watch(health_pb2.HealthCheckRequest(service="readiness"))
        unknown = health.Watch(health_pb2.HealthCheckRequest(service="other"))
        assert (await unknown.read()).status == status.SERVICE_UNKNOWN
        for now in (False, True, False):
            ready[0] = now
            assert (await call.read()).status == (status.SERVING if now else status.NOT_SERVING)
        call.cancel()
        unknown.cancel()


async def test_a_channel_with_health_checks_works(service: ServingContext) -> None:
    """Though each `Watch` ends soon: the client begins the next one."""
    config = {
        "loadBalancingConfig": [{"round_robin": {}}],
        "healthCheckConfig": {"serviceName": ""},
    }
    ready = [True]
    waiting = replace(service, ready=lambda: ready[0])
    options = [("grpc.service_config", json.dumps(config))]
    servicer = GenerationServicer(lambda: waiting, polls=3, poll_s=0.001)
    async with served(servicer, options=options) as channel:
        stub = rpc.GenerationServiceStub(channel)
        for _ in range(20):
            assert await stub.Generate(whole(), wait_for_ready=True)
        ready[0] = False
        while await stub.Generate(whole()).code() is grpc.StatusCode.OK:
            pass
        assert await stub.Generate(whole()).code() is grpc.StatusCode.UNAVAILABLE
        ready[0] = True
        assert await stub.Generate(whole(), wait_for_ready=True)


async def test_a_watch_that_fails_has_a_short_status(service: ServingContext) -> None:
    def broken() -> bool:
        raise ZeroDivisionError("a secret of the server")

    async with served(GenerationServicer(lambda: replace(service, ready=broken))) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        watch = health.Watch(health_pb2.HealthCheckRequest())
        assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
        for call in (
            watch,
            health.Check(health_pb2.HealthCheckRequest()),
            health.List(HEALTH.HealthListRequest()),
        ):
            assert await call.code() is grpc.StatusCode.INTERNAL
            assert "secret" not in await call.details()


async def test_an_unknown_method_is_unimplemented(channel: grpc.aio.Channel) -> None:
    for method in ("/cascade.v1.GenerationService/Nothing", "/nowhere.Nothing/Nothing"):
        call: Any = channel.unary_unary(method)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


class FakeContext:
    """A call's context without a channel."""

    def __init__(self, *metadata: tuple[str, str]) -> None:
        self.metadata = metadata
        self.code: grpc.StatusCode | None = None
        self.details = ""
        self.trailing: tuple[tuple[str, Any], ...] = ()

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return self.metadata

    def peer(self) -> str:
        return "ipv4:127.0.0.1:50051"

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details

    def trailing_metadata(self) -> tuple[tuple[str, Any], ...]:
        return self.trailing

    def set_trailing_metadata(self, trailing_metadata: Any) -> None:
        self.trailing = tuple(trailing_metadata)


class ProxyContext:
    """What Ray Serve's proxy builds its context from."""

    def auth_context(self) -> dict[str, Any]:
        return {}

    def code(self) -> int:
        return 0

    def details(self) -> str:
        return ""

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("request_id", "by-serve"),)

    def trailing_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("request_id", "by-serve"),)

    peer = peer_identities = peer_identity_key = details


async def test_errors_go_through_the_context_of_ray_serve(service: ServingContext) -> None:
    context: Any = RayServegRPCContext(cast("Any", ProxyContext()))
    response = await GenerationServicer(lambda: service).Generate(whole(model="other"), context)
    metadata = dict(context.trailing_metadata())
    assert response == pb.GenerateResponse()
    assert context.code() is grpc.StatusCode.NOT_FOUND
    assert metadata["request_id"] == "by-serve"
    assert status_of(context.trailing_metadata()).details


async def test_a_call_needs_an_api_key_if_the_service_has_some(service: ServingContext) -> None:
    servicer = GenerationServicer(lambda: replace(service, keys=Keys(["secret"])))
    without, valid = FakeContext(), FakeContext(("authorization", "Bearer secret"))
    await servicer.ListModels(pb.ListModelsRequest(), without)
    response = await servicer.ListModels(pb.ListModelsRequest(), valid)
    assert (without.code, valid.code) == (grpc.StatusCode.UNAUTHENTICATED, None)
    assert len(response.models) == 2


async def test_without_a_service_every_call_is_unavailable() -> None:
    context = FakeContext()
    servicer = GenerationServicer(lambda: None)
    await servicer.Generate(whole(), context)
    assert context.code is grpc.StatusCode.UNAVAILABLE
    response = await servicer.Check(health_pb2.HealthCheckRequest(), FakeContext())
    assert response.status == health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.mark.parametrize(
    ("sent", "request_id"),
    [
        ([("request_id", "named")], "named"),
        ([("x-request-id", "named")], "named"),
        ([("x-request-id", "named"), ("request_id", "other")], "named"),
        ([("x-request-id", "with spaces")], "with spaces"),
        ([("x-request-id", "x" * 200)], "x" * 200),
        ([("x-request-id", "x" * 5000)], None),
        ([], None),
    ],
)
async def test_a_call_has_one_id_everywhere(
    channel: grpc.aio.Channel,
    generator: ScriptedGenerator,
    sent: list[tuple[str, str]],
    request_id: str | None,
) -> None:
    """The caller's own: in the response, the log and the trailing metadata, also of an error."""
    stub = rpc.GenerationServiceStub(channel)
    call = stub.Generate(whole(), metadata=sent)
    got = (await call).request_id
    assert got == (request_id or got) != ""
    assert generator.requests[0].name == got
    assert dict(await call.trailing_metadata())["x-request-id"] == got
    streamed = stub.GenerateStream(stream(), metadata=sent)
    frames = [frame async for frame in streamed]
    assert dict(await streamed.trailing_metadata())["x-request-id"] == frames[0].request_id
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(whole(model="other"), metadata=sent)
    refused = dict(caught.value.trailing_metadata() or ())
    assert refused["x-request-id"] == (request_id or refused["x-request-id"])


async def test_a_call_without_an_id_has_the_one_of_ray_serve(service: ServingContext) -> None:
    context = FakeContext()
    context.trailing = (("request_id", "by-serve"),)
    response = await GenerationServicer(lambda: service).Generate(whole(), context)
    assert response.request_id == "by-serve"


async def test_a_unary_call_that_fails_returns_an_empty_message(service: ServingContext) -> None:
    """Ray Serve's proxy keeps the details only if a message passes."""
    context = FakeContext()
    response = await GenerationServicer(lambda: service).Generate(whole(model="other"), context)
    assert response == pb.GenerateResponse()
    assert context.code is grpc.StatusCode.NOT_FOUND


async def test_a_call_that_succeeds_sets_no_status(service: ServingContext) -> None:
    context = FakeContext()
    await GenerationServicer(lambda: service).Generate(whole(), context)
    assert context.code is None


async def test_a_closed_stream_closes_its_generation(
    service: ServingContext, generator: ScriptedGenerator
) -> None:
    responses = GenerationServicer(lambda: service).GenerateStream(stream(), FakeContext())
    await anext(responses)
    assert generator.open == 1
    await responses.aclose()
    assert generator.open == 0


async def test_a_prompt_becomes_tokens_and_tokens_a_text(
    stub: rpc.GenerationServiceAsyncStub, service: ServingContext
) -> None:
    text = "Buzz <|user|>Aldrin"
    request = pb.TokenizeRequest(text=text, return_token_strings=True)
    found = await stub.Tokenize(request)
    ids = service.tokenizer.encode(text)
    assert tuple(found.token_ids) == ids
    assert list(found.token_strings) == service.tokenizer.strings(ids)
    assert found.context_length == 512
    assert (await stub.Detokenize(pb.DetokenizeRequest(token_ids=ids))).text == text
    chat = await stub.Tokenize(pb.TokenizeRequest(chat=HELLO))
    whole_chat = await stub.Generate(whole(chat=HELLO, max_tokens=1))
    assert len(chat.token_ids) == whole_chat.usage.prompt_token_count


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (pb.TokenizeRequest(), "prompt"),
        (pb.TokenizeRequest(text="x", model="other"), "model"),
        (pb.DetokenizeRequest(token_ids=[99_999]), "token_ids"),
    ],
)
async def test_what_has_no_tokens_is_refused(
    stub: rpc.GenerationServiceAsyncStub, request_: Any, param: str
) -> None:
    call = stub.Tokenize if isinstance(request_, pb.TokenizeRequest) else stub.Detokenize
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await cast("Any", call)(request_)
    assert error_info(caught.value).metadata["param"] == param


async def test_the_logprobs_of_a_prompt_come_with_the_whole_answer(
    stub: rpc.GenerationServiceAsyncStub, service: ServingContext
) -> None:
    response = await stub.Generate(whole(prompt_logprob_count=2, choice_count=2, max_tokens=2))
    for choice in response.choices:
        first, *others = choice.prompt_logprobs
        assert math.isnan(first.logprob)
        ids = [first.token_id, *(one.token_id for one in others)]
        assert tuple(ids) == service.tokenizer.encode("Buzz")
        assert all(len(one.top_token_ids) == 2 for one in others)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [frame async for frame in stub.GenerateStream(stream(prompt_logprob_count=2))]
    assert error_info(caught.value).metadata["param"] == "prompt_logprob_count"
