"""OpenAI's client, both APIs and the shipped pair of models."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import pytest
import torch
from openai import AsyncOpenAI, BadRequestError
from tests.support.http_server import serve_http
from transformers import AutoModelForCausalLM, AutoTokenizer

from cascade import demo
from cascade.api.grpc import GenerationServicer
from cascade.api.http import create_app
from cascade.local import LocalServer, local_server
from cascade.settings import Application
from cascade.types import Mode
from cascade.v1 import cascade_pb2, cascade_pb2_grpc, tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

QUESTION: list[Any] = [{"role": "user", "content": "Who is Buzz Aldrin?"}]


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[LocalServer]:
    """The shipped pair with blocks of a fixed length: `auto` depends on timing."""
    tier = {"engine": {"threads": 1}}
    prices: dict[str, Any] = {"drafter": {"price_per_s": 0.5}, "expert": {"price_per_s": 2.0}}
    tiers = {name: tier | price for name, price in prices.items()}
    settings = Application.model_validate(tiers | {"defaults": {"draft_tokens": 5}})
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


async def complete(client: AsyncOpenAI, **body: Any) -> Any:
    greedy: dict[str, Any] = {"model": "cascade", "messages": QUESTION, "temperature": 0}
    return await client.chat.completions.create(**(greedy | body))


def cost(response: Any) -> dict[str, Any]:
    return response.usage.model_extra["cascade"]


async def generated(server: LocalServer, generation: Any) -> Any:
    """Return the response of the gRPC API."""
    rpc = grpc.aio.server()
    servicer = GenerationServicer(lambda: server.service)
    cascade_pb2_grpc.add_GenerationServiceServicer_to_server(servicer, rpc)  # pyright: ignore[reportArgumentType] - a servicer by its methods, as Serve takes it
    port = rpc.add_insecure_port("127.0.0.1:0")
    await rpc.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = cascade_pb2_grpc.GenerationServiceStub(channel)
        found = await stub.Generate(cascade_pb2.GenerateRequest(generation=generation))
    await rpc.stop(None)
    return found


async def test_greedy_chat_is_what_transformers_generates(client: AsyncOpenAI) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.EXPERT)
    model: Any = AutoModelForCausalLM.from_pretrained(demo.EXPERT, dtype=torch.float32)
    prompt = tokenizer.apply_chat_template(
        QUESTION, add_generation_prompt=True, return_tensors="pt"
    )
    text = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    expected = tokenizer.decode(text[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    response = await complete(client, max_completion_tokens=40)
    assert response.choices[0].message.content == expected
    assert cost(response)["drafter_tokens"] > 0


async def test_an_answer_that_is_begun_is_what_transformers_continues(
    client: AsyncOpenAI,
) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(demo.EXPERT)
    model: Any = AutoModelForCausalLM.from_pretrained(demo.EXPERT, dtype=torch.float32)
    messages = [*QUESTION, {"role": "assistant", "content": "Buzz Aldrin"}]
    prompt = tokenizer.apply_chat_template(
        messages, continue_final_message=True, return_tensors="pt"
    )
    text = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0]
    expected = tokenizer.decode(text[prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    continued = {"continue_final_message": True, "add_generation_prompt": False}
    response = await complete(
        client, messages=messages, max_completion_tokens=40, extra_body=continued
    )
    assert response.choices[0].message.content == expected
    assert expected


async def test_the_rule_decides_between_the_models(client: AsyncOpenAI) -> None:
    """Strict speculative decoding rejects the drafter's wording, `token_v3` keeps it."""
    strict = await complete(client, extra_body={"cascade": {"mode": "speculative"}})
    rule = {"kind": "token_v3", "alpha": 0.9}
    lenient = await complete(client, extra_body={"cascade": {"rule": rule}})
    assert strict.choices[0].message.content.startswith('Edwin "Buzz" Aldrin')
    assert lenient.choices[0].message.content.startswith("Buzz Aldrin is")
    assert cost(strict)["kept_tokens"] == 0 < cost(lenient)["kept_tokens"]
    assert cost(lenient)["expert_passes"] < cost(strict)["expert_passes"]


async def test_an_answer_says_what_it_took_and_how_far_it_is_from_the_expert(
    client: AsyncOpenAI,
) -> None:
    """The sum over the choices, each of which has a budget of its own; in a stream too."""
    options = {"rule": {"kind": "token_v3", "alpha": 0.9}, "divergence_budget": 1.5}
    body: dict[str, Any] = {"n": 2, "temperature": 0, "extra_body": {"cascade": options}}
    response = await complete(client, **body)
    stream = await complete(client, **body, stream=True, stream_options={"include_usage": True})
    chunks = [chunk async for chunk in stream]
    own = [choice.model_extra["cascade"]["divergence"] for choice in response.choices]
    assert own == [1.0, 1.0], "one word each that is not the expert's choice; a second would be 2"
    for found in (cost(response), cost(chunks[-1])):
        assert (found["divergence"], found["unmeasured_tokens"]) == (2.0, 0)
        assert found["spent_budgets"] == 2
        taken, drafter, expert = (found["cost"], *map(found["cost"].get, ("drafter", "expert")))
        assert drafter["passes"] == found["drafter_passes"] > 0
        assert expert["passes"] == found["expert_passes"] > 0
        assert drafter["price"] == pytest.approx(0.5 * drafter["seconds"])
        assert expert["price"] == pytest.approx(2.0 * expert["seconds"])
        assert taken["price"] == pytest.approx(drafter["price"] + expert["price"])
        assert taken["bytes"] == found["sent_bytes"] + found["received_bytes"] > 0


async def test_grpc_says_the_same_of_an_answer(server: LocalServer) -> None:
    generation = cascade_pb2.Generation(
        chat=cascade_pb2.Chat(messages=[cascade_pb2.ChatMessage(**QUESTION[0])]),
        sampling=tokens_pb2.Sampling(temperature=0),
        rule=tokens_pb2.Rule(token_v3=tokens_pb2.TokenV3(alpha=0.9)),
        divergence_budget=1.5,
        trace=True,
    )
    answer = await generated(server, generation)
    (choice,), usage = answer.choices, answer.usage
    assert choice.divergence == usage.divergence == 1.0
    assert sum(one.divergence for one in choice.rounds) == 1.0
    assert (usage.unmeasured_token_count, usage.spent_budget_count) == (0, 1)
    taken = usage.cost.expert_pass_duration.ToNanoseconds() / 1e9
    assert usage.cost.expert_price == pytest.approx(2.0 * taken, rel=1e-3)


@pytest.mark.parametrize("mode", list(Mode))
async def test_every_mode_generates_to_the_end(client: AsyncOpenAI, mode: Mode) -> None:
    response = await complete(client, extra_body={"cascade": {"mode": mode.value}})
    origins = response.choices[0].model_extra["cascade"]["origins"]
    assert response.choices[0].finish_reason == "stop"
    assert len(origins) == response.usage.completion_tokens
    only = {Mode.DRAFTER_ONLY: "k", Mode.EXPERT_ONLY: "e"}
    if mode in only:
        assert set(origins) == {only[mode]}


async def test_seeds_repeat_whatever_the_block_length(client: AsyncOpenAI) -> None:
    bodies = [{"cascade": {"draft_tokens": count}} for count in (1, 4, 9)]
    texts = [
        [
            choice.message.content
            for choice in (
                await complete(client, temperature=1.8, n=3, seed=7, extra_body=body)
            ).choices
        ]
        for body in bodies
    ]
    assert texts[0] == texts[1] == texts[2]
    assert len(set(texts[0])) > 1


async def test_generated_and_echoed_logprobs_agree(client: AsyncOpenAI) -> None:
    """Generated text gets the same log-probabilities when it is echoed as a prompt."""
    written = await client.completions.create(
        model="cascade", prompt="The capital of France", max_tokens=8, temperature=0, logprobs=2
    )
    first = written.choices[0]
    # The client's strict types do not allow null for the first token; OpenAI's service sends it.
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
    ended = first.finish_reason == "stop"  # with a token that has no text
    mine = (first.logprobs.token_logprobs or [])[: -1 if ended else None]
    theirs = (again.choices[0].logprobs.token_logprobs or [])[-len(mine) :]
    assert theirs == pytest.approx(mine, abs=1e-3)


async def test_a_prediction_saves_drafter_passes(client: AsyncOpenAI) -> None:
    without = await complete(client)
    text = without.choices[0].message.content
    predicted = await complete(client, prediction={"type": "content", "content": text})
    details = predicted.usage.completion_tokens_details
    assert predicted.choices[0].message.content == text
    assert details.accepted_prediction_tokens > 0
    assert cost(predicted)["drafter_passes"] < cost(without)["drafter_passes"]


async def test_a_client_that_disconnects_frees_both_tiers(server: LocalServer) -> None:
    async with (
        serve_http(create_app(server.service)) as url,
        AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
    ):
        stream = await client.chat.completions.create(
            model="cascade",
            messages=[{"role": "user", "content": "Tell me everything."}],
            stream=True,
            max_completion_tokens=600,
            extra_body={"ignore_eos": True},
        )
        await anext(aiter(stream))
        assert server.expert.num_sessions == 1
        await stream.close()
        async with asyncio.timeout(5):
            while server.drafter.num_sessions or server.expert.num_sessions:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)


async def test_http_and_grpc_give_the_same_tokens_and_usage(
    server: LocalServer, client: AsyncOpenAI
) -> None:
    body = {"return_token_ids": True, "cascade": {"draft_tokens": 4}}
    http = await complete(client, seed=5, temperature=0.8, extra_body=body)
    generation = cascade_pb2.Generation(
        chat=cascade_pb2.Chat(messages=[cascade_pb2.ChatMessage(**QUESTION[0])]),
        sampling=tokens_pb2.Sampling(temperature=0.8),
        seed=5,
        fixed_draft_length=4,
    )
    response = await generated(server, generation)
    assert response.choices[0].text == http.choices[0].message.content
    assert list(response.choices[0].token_ids) == http.choices[0].model_extra["token_ids"]
    assert response.usage.completion_token_count == http.usage.completion_tokens
    assert response.usage.prompt_token_count == http.usage.prompt_tokens
    assert response.usage.drafted_count == cost(http)["drafted"]


async def test_a_prompt_longer_than_the_context_is_a_400(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError) as refused:
        await complete(client, messages=[{"role": "user", "content": "word " * 5000}])
    assert refused.value.code == "context_length_exceeded"
