"""The real client, the real doors, the pair that ships."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import pytest
import torch
import uvicorn
from openai import AsyncOpenAI, BadRequestError
from transformers import AutoModelForCausalLM, AutoTokenizer

from cascade import demo
from cascade.api.grpc import GenerationServicer
from cascade.api.http import create_app
from cascade.local import LocalServer, local_server
from cascade.settings import Application
from cascade.types import Mode
from cascade.v1 import cascade_pb2, cascade_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator

QUESTION = [{"role": "user", "content": "Who is Buzz Aldrin?"}]


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[LocalServer]:
    """The shipped pair with blocks of a fixed length: `auto` drafts as the clock tells it to."""
    tier = {"engine": {"threads": 1}}
    settings = Application.model_validate(
        {"drafter": tier, "expert": tier, "defaults": {"draft_tokens": 5}}
    )
    async with local_server(settings) as running:
        yield running


@pytest.fixture(scope="module")
async def client(server: LocalServer) -> AsyncIterator[AsyncOpenAI]:
    transport = httpx2.ASGITransport(app=create_app(server.service))
    async with AsyncOpenAI(
        base_url="http://server/v1",
        api_key="none",
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=transport),
        _strict_response_validation=True,
    ) as made:
        yield made


async def ask(client: AsyncOpenAI, **body: Any) -> Any:
    plain: dict[str, Any] = {"model": "cascade", "messages": QUESTION, "temperature": 0}
    return await client.chat.completions.create(**(plain | body))


def cost(answer: Any) -> dict[str, Any]:
    return answer.usage.model_extra["cascade"]


async def test_greedy_chat_is_what_transformers_generates(client: AsyncOpenAI) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.EXPERT)
    model: Any = AutoModelForCausalLM.from_pretrained(demo.EXPERT, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt"
    )
    text = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    expected = tokenizer.decode(text[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    answer = await ask(client, max_completion_tokens=40)
    assert answer.choices[0].message.content == expected
    assert cost(answer)["drafter_tokens"] > 0


async def test_the_rule_is_the_dial_between_the_models(client: AsyncOpenAI) -> None:
    """The blog's example: strict matching refuses the drafter's wording, `token_v3` keeps it."""
    strict = await ask(client, extra_body={"cascade": {"mode": "speculative"}})
    rule = {"kind": "token_v3", "alpha": 0.9}
    loose = await ask(client, extra_body={"cascade": {"rule": rule}})
    assert strict.choices[0].message.content.startswith('Edwin "Buzz" Aldrin')
    assert loose.choices[0].message.content.startswith("Buzz Aldrin is")
    assert cost(strict)["kept_tokens"] == 0 < cost(loose)["kept_tokens"]
    assert cost(loose)["expert_passes"] < cost(strict)["expert_passes"]


@pytest.mark.parametrize("mode", list(Mode))
async def test_every_mode_answers(client: AsyncOpenAI, mode: Mode) -> None:
    answer = await ask(client, extra_body={"cascade": {"mode": mode.value}})
    origins = answer.choices[0].model_extra["cascade"]["origins"]
    assert answer.choices[0].finish_reason == "stop"
    assert len(origins) == answer.usage.completion_tokens
    asked = {Mode.DRAFTER_ONLY: "k", Mode.EXPERT_ONLY: "e"}
    if mode in asked:
        assert set(origins) == {asked[mode]}


async def test_seeds_repeat_whatever_the_block_length(client: AsyncOpenAI) -> None:
    bodies = [{"cascade": {"draft_tokens": count}} for count in (1, 4, 9)]
    texts = [
        [
            choice.message.content
            for choice in (await ask(client, temperature=1.8, n=3, seed=7, extra_body=body)).choices
        ]
        for body in bodies
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1


async def test_scores_of_a_prompt_and_of_its_answer_agree(client: AsyncOpenAI) -> None:
    """What was written with log-probabilities scores the same when it is sent back."""
    written = await client.completions.create(
        model="cascade", prompt="The capital of France", max_tokens=8, temperature=0, logprobs=2
    )
    first = written.choices[0]
    # OpenAI's own answers break the client's strict types here: the first entry is null.
    lenient: Any = client.copy()
    lenient._strict_response_validation = False
    again = await lenient.completions.create(
        model="cascade",
        prompt="The capital of France" + first.text,
        max_tokens=0,
        echo=True,
        logprobs=2,
    )
    assert first.logprobs is not None
    assert again.choices[0].logprobs is not None
    ended = first.finish_reason == "stop"  # with a token that the text does not show
    mine = (first.logprobs.token_logprobs or [])[: -1 if ended else None]
    theirs = (again.choices[0].logprobs.token_logprobs or [])[-len(mine) :]
    assert theirs == pytest.approx(mine, abs=1e-3)


async def test_a_prediction_is_the_draft(client: AsyncOpenAI) -> None:
    plain = await ask(client)
    text = plain.choices[0].message.content
    predicted = await ask(client, prediction={"type": "content", "content": text})
    details = predicted.usage.completion_tokens_details
    assert predicted.choices[0].message.content == text
    assert details.accepted_prediction_tokens > 0
    assert cost(predicted)["drafter_passes"] < cost(plain)["drafter_passes"]


@asynccontextmanager
async def on_loopback(server: LocalServer) -> AsyncGenerator[str]:
    """Serve HTTP on a real port."""
    config = uvicorn.Config(create_app(server.service), port=0, log_level="error", lifespan="off")
    running = uvicorn.Server(config)
    task = asyncio.create_task(running.serve())
    while not running.started:  # noqa: ASYNC110 - uvicorn tells nobody
        await asyncio.sleep(0)
    port = running.servers[0].sockets[0].getsockname()[1]
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        running.should_exit = True
        await task


async def test_a_client_that_leaves_frees_both_tiers(server: LocalServer) -> None:
    """Within the second that a user would not notice."""
    async with (
        on_loopback(server) as url,
        AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model="cascade",
            messages=[{"role": "user", "content": "Tell me everything."}],
            stream=True,
            max_completion_tokens=600,
            extra_body={"ignore_eos": True},
        )
        await anext(aiter(stream))
        assert server.expert.sessions == 1
        await stream.close()
        async with asyncio.timeout(5):
            while server.drafter.sessions or server.expert.sessions:  # noqa: ASYNC110 - untold
                await asyncio.sleep(0.01)


async def test_both_doors_give_the_same_tokens_and_the_same_bill(
    server: LocalServer, client: AsyncOpenAI
) -> None:
    rpc = grpc.aio.server()
    door = GenerationServicer(lambda: server.service)
    cascade_pb2_grpc.add_GenerationServiceServicer_to_server(door, rpc)  # pyright: ignore[reportArgumentType] - a servicer by its methods, as Serve takes it
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    body = {"return_token_ids": True, "cascade": {"draft_tokens": 4}}
    http = await ask(client, seed=5, temperature=0.8, extra_body=body)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = cascade_pb2_grpc.GenerationServiceStub(channel)
        generation = cascade_pb2.Generation(
            chat=cascade_pb2.Chat(messages=[cascade_pb2.ChatMessage(**QUESTION[0])]),
            sampling=tokens_pb2.Sampling(temperature=0.8),
            seed=5,
            fixed_draft_length=4,
        )
        answer = await stub.Generate(cascade_pb2.GenerateRequest(generation=generation))
    await rpc.stop(None)
    assert answer.choices[0].text == http.choices[0].message.content
    assert list(answer.choices[0].token_ids) == http.choices[0].model_extra["token_ids"]
    assert answer.usage.completion_token_count == http.usage.completion_tokens
    assert answer.usage.prompt_token_count == http.usage.prompt_tokens
    assert answer.usage.drafted_count == cost(http)["drafted"]


async def test_a_prompt_over_the_context_is_a_bad_request(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        await ask(client, messages=[{"role": "user", "content": "word " * 5000}])
    assert refused.value.code == "context_length_exceeded"
