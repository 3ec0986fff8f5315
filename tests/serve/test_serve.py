"""The server as its users meet it: `serve run cluster/local.yaml`, real clients, real signals."""

from __future__ import annotations

import asyncio
import copy
import re
import signal
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from openai import AsyncOpenAI, BadRequestError

from cascade.v1 import cascade_pb2, cascade_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator

    from tests.serve.conftest import Server

QUESTION = "Who is Buzz Aldrin?"
ANSI = re.compile(r"\x1b\[[0-9;]*m")


@pytest.fixture(scope="module")
async def client(server: Server) -> AsyncIterator[AsyncOpenAI]:
    async with AsyncOpenAI(base_url=f"{server.http}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture(scope="module")
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with grpc.aio.insecure_channel(server.grpc) as made:
        yield made


def replica(server: Server, name: str) -> psutil.Process:
    """Return the process of a deployment's only replica."""
    wanted = f"ray::ServeReplica:cascade:{name}"
    ours = psutil.Process(server.process.pid).children(recursive=True)
    found = [
        process for process in ours if any(word.startswith(wanted) for word in process.cmdline())
    ]
    assert len(found) == 1, f"{len(found)} processes of {name}"
    return found[0]


@contextmanager
def stopped(process: psutil.Process) -> Generator[None]:
    """Freeze a process for a while."""
    process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        process.send_signal(signal.SIGCONT)


def greedy(**cascade: Any) -> dict[str, Any]:
    return {
        "model": "cascade",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_completion_tokens": 48,
        "extra_body": {"cascade": cascade},
    }


async def text_of(client: AsyncOpenAI, **cascade: Any) -> tuple[str, dict[str, Any]]:
    """Return an answer and its `usage.cascade`."""
    answer = await client.chat.completions.create(**greedy(**cascade))
    assert answer.usage is not None
    assert answer.usage.model_extra is not None
    return answer.choices[0].message.content or "", answer.usage.model_extra["cascade"]


async def test_speculation_writes_what_the_expert_writes(client: AsyncOpenAI) -> None:
    expert, _ = await text_of(client, mode="expert_only")
    fast, cost = await text_of(client, mode="speculative", draft_tokens=4)
    assert fast == expert != ""
    assert cost["drafted"] > 0
    assert cost["drafter_tokens"] > 0


async def test_a_stream_is_the_same_text(client: AsyncOpenAI) -> None:
    whole, _ = await text_of(client)
    stream = await client.chat.completions.create(**greedy(), stream=True)
    parts = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert "".join(parts) == whole


async def test_a_question_has_the_same_tokens_everywhere(
    server: Server, channel: grpc.aio.Channel
) -> None:
    door = cascade_pb2_grpc.GenerationServiceStub(channel)
    async with httpx.AsyncClient(base_url=server.http, timeout=60) as http:
        found = (await http.post("/tokenize", json={"prompt": QUESTION})).json()
        text = (await http.post("/detokenize", json={"tokens": found["tokens"]})).json()["prompt"]
    ours = await door.Tokenize(cascade_pb2.TokenizeRequest(text=QUESTION))
    theirs = await door.Detokenize(cascade_pb2.DetokenizeRequest(token_ids=ours.token_ids))
    assert list(ours.token_ids) == found["tokens"]
    assert text == theirs.text


async def test_the_router_passes_on_the_metrics_of_its_node(server: Server) -> None:
    async with httpx.AsyncClient(base_url=server.http, timeout=60) as http:
        found = await http.get("/metrics")
    assert found.status_code == 200
    assert found.headers["content-type"].startswith("text/plain")
    assert "# TYPE ray_" in found.text


async def test_http_and_grpc_give_the_same_tokens(
    client: AsyncOpenAI, channel: grpc.aio.Channel
) -> None:
    door = cascade_pb2_grpc.GenerationServiceStub(channel)
    generation = cascade_pb2.Generation(
        chat=cascade_pb2.Chat(messages=[cascade_pb2.ChatMessage(role="user", content=QUESTION)]),
        sampling=tokens_pb2.Sampling(temperature=0),
        max_tokens=48,
        fixed_draft_length=4,
    )
    whole, cost = await text_of(client, draft_tokens=4)
    unary = await door.Generate(cascade_pb2.GenerateRequest(generation=generation))
    frames = door.GenerateStream(cascade_pb2.GenerateStreamRequest(generation=generation))
    streamed = [frame async for frame in frames]
    assert unary.choices[0].text == whole
    assert "".join(choice.text for frame in streamed for choice in frame.choices) == whole
    assert streamed[-1].usage.drafted_count == unary.usage.drafted_count == cost["drafted"]


async def test_a_bad_request_is_a_bad_request_through_every_door(
    client: AsyncOpenAI, channel: grpc.aio.Channel
) -> None:
    with pytest.raises(BadRequestError) as refused:
        await text_of(client, rule={"kind": "chow", "alpha": 2})
    assert refused.value.type == "invalid_request_error"
    assert refused.value.param == "cascade.rule.alpha"
    door = cascade_pb2_grpc.GenerationServiceStub(channel)
    generation = cascade_pb2.Generation(
        text="x", rule=tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=2))
    )
    with pytest.raises(grpc.aio.AioRpcError) as unary:
        await door.Generate(cascade_pb2.GenerateRequest(generation=generation))
    frames = door.GenerateStream(cascade_pb2.GenerateStreamRequest(generation=generation))
    with pytest.raises(grpc.aio.AioRpcError) as streamed:
        _ = [frame async for frame in frames]
    for error in (unary, streamed):
        assert error.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "alpha" in (error.value.details() or "")


async def test_grpc_health_answers_and_reflection_does_not(channel: grpc.aio.Channel) -> None:
    health: Any = health_pb2_grpc.HealthStub(channel)
    answer = await health.Check(health_pb2.HealthCheckRequest())
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()
    messages: Any = health_pb2  # those of `List` are absent from the stubs
    assert "readiness" in (await health.List(messages.HealthListRequest())).statuses
    # With its only message in the call itself: a refused stream may end before one is written.
    reflect: Any = channel.unary_stream(
        "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
    )
    with pytest.raises(grpc.aio.AioRpcError) as refused:
        await reflect(reflection_pb2.ServerReflectionRequest(list_services="")).read()
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_a_user_config_applies_to_new_requests_without_a_restart(
    server: Server, client: AsyncOpenAI
) -> None:
    """An answer goes on meanwhile; a wrong one changes nothing, and `/health` says so."""
    ask: dict[str, Any] = {"model": "cascade", "prompt": QUESTION, "temperature": 0}
    pids = {name: replica(server, name).pid for name in ("Router", "Drafter", "Expert")}

    async def refused() -> bool:
        try:
            await client.completions.create(**ask, max_tokens=8)
        except BadRequestError as error:
            return "max_tokens" in error.message
        return False

    def warned() -> bool:
        return "max_token" in str(httpx.get(f"{server.http}/health").json().get("warnings"))

    stream = await client.completions.create(**ask, max_tokens=60, stream=True)
    chunks = aiter(stream)
    await anext(chunks)
    try:
        await deploy(server, {"limits": {"max_tokens": 4}})
        while not await refused():  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.1)
        await deploy(server, {"limits": {"max_token": 4}})
        while not warned():  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.1)
        assert await refused()
    finally:
        await deploy(server, {})
    while await refused() or warned():  # noqa: ASYNC110 - as above
        await asyncio.sleep(0.1)
    assert [chunk async for chunk in chunks][-1].choices[0].finish_reason
    assert pids == {name: replica(server, name).pid for name in pids}


async def deploy(server: Server, user_config: dict[str, Any]) -> None:
    config = copy.deepcopy(server.config)
    application = config["applications"][0]
    application["deployments"] = [{"name": "Router", "user_config": user_config}]
    await server.deploy(config)


async def becomes(server: Server, *, ready: bool) -> None:
    """Wait until `/health` says so; everything else is then as it stays."""
    async with asyncio.timeout(60), httpx.AsyncClient(base_url=server.http, timeout=60) as plain:
        while (await plain.get("/health")).is_success is not ready:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.1)


async def test_without_an_expert_a_router_lives_but_is_not_ready(
    server: Server, client: AsyncOpenAI, channel: grpc.aio.Channel
) -> None:
    """Serve leaves it alone, new requests are refused, and it is ready again by itself."""
    health: Any = health_pb2_grpc.HealthStub(channel)
    names = health_pb2.HealthCheckResponse.ServingStatus
    router = replica(server, "Router")
    with stopped(replica(server, "Expert")):
        await becomes(server, ready=False)
        async with httpx.AsyncClient(base_url=server.http, timeout=60) as plain:
            assert (await plain.get("/livez")).is_success
            refused = await plain.post("/v1/completions", json={"prompt": "x"})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "expert_unavailable"
        assert int(refused.headers["retry-after"]) >= 1
        for name, status in (("", "NOT_SERVING"), ("liveness", "SERVING")):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert names.Name(answer.status) == status
        door = cascade_pb2_grpc.GenerationServiceStub(channel)
        generation = cascade_pb2.Generation(text="x")
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await door.Generate(cascade_pb2.GenerateRequest(generation=generation))
        assert failed.value.code() is grpc.StatusCode.UNAVAILABLE
    await becomes(server, ready=True)
    assert (await text_of(client))[0]
    assert replica(server, "Router").pid == router.pid


async def test_without_a_drafter_a_router_is_ready(server: Server, client: AsyncOpenAI) -> None:
    with stopped(replica(server, "Drafter")):
        assert (await text_of(client))[0]
        async with httpx.AsyncClient(base_url=server.http, timeout=60) as plain:
            assert (await plain.get("/health")).is_success
    assert (await text_of(client))[0]


async def test_a_channel_with_health_checks_works(server: Server) -> None:
    config = (
        '{"loadBalancingConfig": [{"round_robin": {}}], "healthCheckConfig": {"serviceName": ""}}'
    )
    options = [("grpc.service_config", config)]
    async with grpc.aio.insecure_channel(server.grpc, options=options) as made:
        door = cascade_pb2_grpc.GenerationServiceStub(made)
        assert await door.ListModels(cascade_pb2.ListModelsRequest(), wait_for_ready=True)


@pytest.mark.parametrize("given", ["mine", "with spaces", "x" * 200, "日本"])
async def test_a_request_has_one_id_everywhere(server: Server, given: str) -> None:
    async with httpx.AsyncClient(base_url=server.http) as plain:
        sent = [(b"x-request-id", given.encode())]
        body = {"prompt": QUESTION, "max_tokens": 2}
        answer = await plain.post("/v1/completions", json=body, headers=sent)
    assert answer.headers.get_list("x-request-id") == [given]
    assert answer.json()["id"] == f"cmpl-{given}"


async def test_a_call_has_the_id_of_ray_serve(channel: grpc.aio.Channel) -> None:
    door = cascade_pb2_grpc.GenerationServiceStub(channel)
    generation = cascade_pb2.Generation(text=QUESTION, max_tokens=2)
    call = door.Generate(cascade_pb2.GenerateRequest(generation=generation))
    trailing = dict(await call.trailing_metadata())
    assert (await call).request_id == trailing["request_id"] == trailing["x-request-id"]


def test_status_shows_three_deployments(server: Server) -> None:
    run = server.command("serve", "status", "-a", server.dashboard)
    text = ANSI.sub("", run.stdout)
    for name in ("Router", "Drafter", "Expert"):
        assert re.search(rf"{name}:\n\s+status: HEALTHY", text)


def test_the_cluster_refuses_another_token(server: Server) -> None:
    wrong = "0" * 64
    run = server.command("serve", "status", "-a", server.dashboard, token=wrong)
    assert run.returncode != 0
    assert "Invalid authentication token" in run.stderr
    listening = [
        one.laddr.port
        for one in replica(server, "Router").net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    ]
    refused = set[grpc.StatusCode]()
    for port in listening:
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            call = channel.unary_unary("/ray.serve.ASGIService/HandleRequest")
            with pytest.raises(grpc.RpcError) as error:
                call(b"", timeout=10, metadata=(("authorization", f"Bearer {wrong}"),))
            refused.add(error.value.code())
    assert grpc.StatusCode.UNAUTHENTICATED in refused


def test_tiers_are_processes_of_their_own(server: Server) -> None:
    assert len({replica(server, name).pid for name in ("Router", "Drafter", "Expert")}) == 3


async def test_without_the_drafter_the_expert_goes_on_alone(
    server: Server, client: AsyncOpenAI
) -> None:
    """Speculation is real: it stops with the drafter's process, and only speculation does."""
    before, _ = await text_of(client, mode="speculative", draft_tokens=4)
    with stopped(replica(server, "Drafter")):
        frozen, cost = await text_of(client, mode="speculative", draft_tokens=4)
    assert frozen == before
    assert cost["drafted"] == cost["drafter_tokens"] == 0
    assert cost["expert_tokens"] > 0
    after, cost = await text_of(client, mode="speculative", draft_tokens=4)
    assert after == before
    assert cost["drafted"] > 0


def test_the_doctor_finds_nothing_wrong(server: Server) -> None:
    words = ("cascade", "doctor", "--url", server.http, "--dashboard", server.dashboard)
    run = server.command(*words)
    assert f"the server at {server.http} is healthy" in run.stdout
    assert f"Ray cluster at {server.dashboard}: " in run.stdout
    assert re.search(r"application cascade runs", run.stdout), run.stdout
    assert "the Ray cluster asks its callers for a token" in run.stdout
    assert "it may need its token" in server.command(*words, token="0" * 64).stdout


async def test_what_serves_own_proxy_answers_is_known(server: Server) -> None:
    """Our code never sees these: recorded, not chosen. Ours have OpenAI's shape."""
    for answer in server.early:
        ours = answer.headers["content-type"].startswith("application/json")
        assert answer.status_code == (503 if ours else 404)
        assert ours or "not found" in answer.text
    async with httpx.AsyncClient(base_url=server.http) as plain:
        assert (await plain.get("/-/routes")).json() == {"/": "cascade"}
        assert (await plain.get("/-/healthz")).text == "success"
        missing = await plain.get("/nowhere")
        assert missing.status_code == 404
        assert missing.json()["error"]["type"] == "invalid_request_error"
