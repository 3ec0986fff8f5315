"""Both APIs over the shipped pair of models."""

from __future__ import annotations

import asyncio
import math
from dataclasses import asdict, replace
from functools import cache
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import pytest
import torch
from transformers import AutoModelForCausalLM

from cascade import demo
from cascade.api import grpc_convert
from cascade.api.completion import Completions
from cascade.api.grpc import GenerationServicer
from cascade.rules import Chow, Lossless, TokenV3
from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc as rpc
from cascade.v1 import tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from openai import AsyncOpenAI
    from torch import Tensor

    from cascade.api.context import ServingContext
    from cascade.local import LocalServer
    from cascade.rules import Rule

ALDRIN: Any = [{"role": "user", "content": "Who is Buzz Aldrin?"}]

RULES: list[dict[str, Any]] = [
    {"kind": "lossless"},
    {"kind": "lossy", "alpha": 0.3},
    {"kind": "ensemble", "weight": 0.5},
    {"kind": "chow", "alpha": 0.5},
    {"kind": "diff", "alpha": 0.1},
    {"kind": "opt", "alpha": 0.1},
    {"kind": "chow_log", "alpha": 1.0},
    {"kind": "diff_log", "alpha": 0.1},
    {"kind": "opt_log", "alpha": 0.1},
    {"kind": "bild", "alpha": 1.0},
    {"kind": "fuzzy", "alpha": 0.2},
    {"kind": "token_v1", "alpha": 0.3},
    {"kind": "token_v2", "alpha": 0.3},
    {"kind": "token_v3", "alpha": 0.8},
    {"kind": "typical"},
]

OPTIONS: list[dict[str, Any]] = [
    *({"rule": rule} for rule in RULES),
    {"mode": "expert_only"},
    {"mode": "drafter_only"},
    {"mode": "sequence_cascade", "patience": {"threshold": -0.1}},
    {"mode": "token_cascade"},
    {"mode": "speculative"},
    {"rule": RULES[-2], "bonus": "none", "verification": "block", "coupling": "maximal"},
    {"rule": RULES[5], "bonus": "target", "rows": "full", "coupling": "maximal"},
]


MODES: dict[Any, Any] = {
    "drafter_only": pb.MODE_DRAFTER_ONLY,
    "token_cascade": pb.MODE_TOKEN_CASCADE,
    "expert_only": pb.MODE_EXPERT_ONLY,
}


@pytest.fixture
def pair(shipped_server: LocalServer) -> LocalServer:
    return shipped_server


@pytest.fixture
def service(pair: LocalServer) -> ServingContext:
    return replace(pair.service, models=("pair",))


@cache
def model(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def expert() -> Any:
    return model(demo.EXPERT)


def logprobs_of(path: Path, tokens: list[int]) -> Tensor:
    """Return a model's log-probabilities after each token, by a plain forward pass."""
    with torch.inference_mode():
        return torch.log_softmax(model(path)(torch.tensor([tokens])).logits[0], dim=-1)


def extra(model: Any) -> dict[str, Any]:
    return model.model_extra or {}


@pytest.mark.parametrize("draft_tokens", [0, 1, 5, 16])
async def test_greedy_text_is_that_of_transformers(
    client: AsyncOpenAI, service: ServingContext, draft_tokens: int
) -> None:
    """Conformance 12."""
    response = await client.chat.completions.create(
        model="pair",
        messages=ALDRIN,
        temperature=0,
        max_tokens=40,
        extra_body={"cascade": {"draft_tokens": draft_tokens}},
    )
    prompt = torch.tensor([service.tokenizer.chat(ALDRIN)])
    with torch.inference_mode():
        whole = expert().generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=40, do_sample=False
        )
    expected = service.tokenizer.decode(whole[0, prompt.shape[1] :].tolist())
    assert response.choices[0].message.content == expected


async def test_logprobs_are_the_experts(client: AsyncOpenAI) -> None:
    """Of every token under the lossless rule, whatever the temperature."""
    response = await client.completions.create(
        model="pair",
        prompt="The Moon",
        seed=3,
        temperature=0.7,
        max_tokens=20,
        logprobs=3,
        extra_body={"return_token_ids": True},
    )
    (choice,) = response.choices
    ids = extra(choice)
    prompt, tokens = ids["prompt_token_ids"], ids["token_ids"]
    expected = logprobs_of(demo.EXPERT, prompt + tokens)[len(prompt) - 1 :]
    assert choice.logprobs is not None
    for at, token in enumerate(tokens):
        logprob = (choice.logprobs.token_logprobs or [])[at]
        assert logprob == pytest.approx(expected[at, token].item(), abs=2e-3)
        best = max((choice.logprobs.top_logprobs or [])[at].values())
        assert best == pytest.approx(expected[at].max().item(), abs=2e-3)
    assert "".join(choice.logprobs.tokens or []) == choice.text
    assert extra(choice)["cascade"]["logprob_origins"] == "e" * len(tokens)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_logprobs_are_of_the_model_that_is_named(
    client: AsyncOpenAI, service: ServingContext, options: dict[str, Any]
) -> None:
    """Of the drafter where no expert ran for a token; over both APIs."""
    response = await client.completions.create(
        model="pair",
        prompt="The Moon is",
        seed=5,
        max_tokens=8,
        logprobs=1,
        extra_body={"return_token_ids": True, "cascade": options},
    )
    (choice,) = response.choices
    ids, origins = extra(choice), extra(choice)["cascade"]["origins"]
    named = extra(choice)["cascade"]["logprob_origins"]
    prompt, tokens = ids["prompt_token_ids"], ids["token_ids"]
    assert choice.logprobs is not None
    for at, token in enumerate(tokens):
        path = {"d": demo.DRAFTER, "e": demo.EXPERT}[named[at]]
        expected = logprobs_of(path, prompt + tokens)[len(prompt) - 1 + at, token].item()
        logprob = (choice.logprobs.token_logprobs or [])[at]
        assert logprob == pytest.approx(expected, abs=2e-3)
    asks_at_deferrals = options.get("rule", {}).get("kind") in {"chow", "chow_log"}
    asks_at_deferrals |= options.get("mode") in {"token_cascade", "drafter_only"}
    if asks_at_deferrals:
        assert named == "".join("e" if origin == "e" else "d" for origin in origins)
    elif options.get("mode") != "sequence_cascade":
        assert set(named) == {"e"}
    if (mode := options.get("mode")) in MODES:
        generation = pb.Generation(
            text="The Moon is", seed=5, max_tokens=8, logprob_count=0, mode=MODES[mode]
        )
        completions = Completions(grpc_convert.call(generation, service), service)
        await completions.run()
        (one,) = completions.all
        over_grpc = grpc_convert.choice(one, one.output).logprobs
        assert "".join("d" if entry.drafter else "e" for entry in over_grpc) == named


@pytest.mark.parametrize("draft_tokens", [0, 1, 5])
@pytest.mark.parametrize("rule", [Lossless(), Chow(alpha=0.5), TokenV3(alpha=0.8)])
async def test_the_trace_says_what_the_drafter_proposed_at_each_token(
    client: AsyncOpenAI, service: ServingContext, rule: Rule, draft_tokens: int
) -> None:
    """With its own log-probabilities, of kept and of rejected tokens; over both APIs."""
    options = {"rule": asdict(rule), "draft_tokens": draft_tokens, "trace": True}
    response = await client.completions.create(
        model="pair",
        prompt="Buzz Aldrin",
        seed=2,
        max_tokens=12,
        logprobs=2,
        extra_body={"return_token_ids": True, "cascade": options},
    )
    found = extra(response.choices[0])
    prompt, tokens, cascade = found["prompt_token_ids"], found["token_ids"], found["cascade"]
    generation = pb.Generation(
        text="Buzz Aldrin", seed=2, max_tokens=12, logprob_count=2, trace=True
    )
    generation.fixed_draft_length = draft_tokens
    grpc_convert.convert.encode_rule(rule, generation.rule)
    completions = Completions(grpc_convert.call(generation, service), service)
    await completions.run()
    (one,) = completions.all
    over_grpc = grpc_convert.choice(one, one.output)
    assert list(over_grpc.token_ids) == tokens

    expected = logprobs_of(demo.DRAFTER, prompt + tokens)[len(prompt) - 1 :]
    known = set[int]()
    for at, draft in enumerate(cascade["drafts"]):
        proposed = over_grpc.drafts[at]
        assert math.isnan(proposed.logprob) == (draft is None)
        if draft is None:
            continue
        known.add(at)
        assert draft["logprob"] == proposed.logprob
        assert draft["logprob"] == pytest.approx(expected[at, proposed.token_id].item(), abs=2e-3)
        best = draft["top_logprobs"][0]["logprob"]
        assert best == pytest.approx(expected[at].max().item(), abs=2e-3)
        if cascade["origins"][at] in "dk":
            assert proposed.token_id == tokens[at]
    drafted = set[int]()
    for entry in cascade["trace"]:  # a token that the drafter's own rule defers is not sent
        sent = entry["drafted"] - (entry["deferred"] if isinstance(rule, Chow) else 0)
        drafted |= set(range(entry["position"], entry["position"] + min(sent, entry["tokens"])))
    assert known == drafted


async def test_drafts_are_only_in_a_trace_with_logprobs(client: AsyncOpenAI) -> None:
    for trace, logprobs in ((False, 1), (True, None)):
        response = await client.completions.create(
            model="pair",
            prompt="The Moon",
            max_tokens=2,
            logprobs=logprobs,
            extra_body={"cascade": {"trace": trace}},
        )
        assert "drafts" not in extra(response.choices[0])["cascade"]


async def test_echo_logprobs_are_the_experts(lenient: AsyncOpenAI, service: ServingContext) -> None:
    """Evaluation harnesses use them as the likelihood of a given text."""
    text = "Buzz Aldrin is an American"
    response = await lenient.completions.create(
        model="pair", prompt=text, echo=True, logprobs=1, max_tokens=0
    )
    logprobs = response.choices[0].logprobs
    assert logprobs is not None
    tokens = list(service.tokenizer.encode(text))
    expected = logprobs_of(demo.EXPERT, tokens)
    scored = logprobs.token_logprobs or []
    assert scored[0] is None
    for at, token in enumerate(tokens[1:]):
        assert scored[at + 1] == pytest.approx(expected[at, token].item(), abs=2e-3)
    assert response.choices[0].text == text


@pytest.mark.parametrize("options", OPTIONS, ids=str)
async def test_every_rule_and_mode_has_consistent_counts(
    client: AsyncOpenAI, options: dict[str, Any]
) -> None:
    """Conformance 35, 37, 38."""
    response = await client.chat.completions.create(
        model="pair",
        messages=ALDRIN,
        n=2,
        max_tokens=16,
        extra_body={"cascade": options | {"trace": True}},
    )
    usage = response.usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    origins = [extra(choice)["cascade"]["origins"] for choice in response.choices]
    cost = extra(usage)["cascade"]
    assert sum(map(len, origins)) == usage.completion_tokens
    details = usage.completion_tokens_details
    accepted, rejected = details.accepted_prediction_tokens, details.rejected_prediction_tokens
    assert accepted is not None
    assert rejected is not None
    assert min(accepted, rejected) >= 0
    assert accepted + rejected == cost["drafted"]
    assert all(choice.message.content for choice in response.choices)


@pytest.mark.parametrize(
    "options",
    [{}, {"rule": RULES[-2], "draft_tokens": 4}, {"rule": RULES[3], "draft_tokens": 4}],
    ids=str,
)
async def test_a_seed_gives_the_same_text_streamed_or_not_over_http_and_grpc(
    client: AsyncOpenAI, service: ServingContext, options: dict[str, Any]
) -> None:
    """Conformance 5, 17, 40."""
    body: dict[str, Any] = {"model": "pair", "messages": ALDRIN, "seed": 7, "n": 3}
    body |= {"max_tokens": 24, "temperature": 1.5, "extra_body": {"cascade": options}}
    whole = await client.chat.completions.create(**body)
    texts = [choice.message.content or "" for choice in whole.choices]
    assert len(set(texts)) > 1
    streamed = ["", "", ""]
    async for chunk in await client.chat.completions.create(**body, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts
    by_grpc = await over_grpc(service, options)
    assert [choice.text for choice in by_grpc.choices] == texts
    assert whole.usage is not None
    assert by_grpc.usage.completion_token_count == whole.usage.completion_tokens
    assert by_grpc.usage.prompt_token_count == whole.usage.prompt_tokens


async def over_grpc(service: ServingContext, options: dict[str, Any]) -> pb.GenerateResponse:
    rule = None
    length: Any = options.get("draft_tokens")  # None leaves the field unset
    match options.get("rule"):
        case {"kind": "token_v3", "alpha": alpha}:
            rule = tokens_pb2.Rule(token_v3=tokens_pb2.TokenV3(alpha=alpha))
        case {"kind": "chow", "alpha": alpha}:
            rule = tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=alpha))
        case _:
            assert not options
    server = grpc.aio.server()
    rpc.add_GenerationServiceServicer_to_server(GenerationServicer(lambda: service), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    messages = [pb.ChatMessage(**message) for message in ALDRIN]
    generation = pb.Generation(
        chat=pb.Chat(messages=messages),
        seed=7,
        choice_count=3,
        max_tokens=24,
        sampling=tokens_pb2.Sampling(temperature=1.5),
        rule=rule,
        fixed_draft_length=length,
    )
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = rpc.GenerationServiceStub(channel)
        response = await stub.Generate(pb.GenerateRequest(generation=generation))
    await server.stop(None)
    return response


@pytest.mark.parametrize("stop", ["Aldrin", "zz", '"', " Americ", "an American"])
async def test_a_stop_string_ends_the_text_where_it_begins(
    client: AsyncOpenAI, pair: LocalServer, stop: str
) -> None:
    """Conformance 14, 15, with drafted blocks; afterwards no tier holds a session."""
    body: dict[str, Any] = {"model": "pair", "messages": ALDRIN, "temperature": 0}
    whole = await client.chat.completions.create(**body, max_tokens=40)
    response = await client.chat.completions.create(**body, max_tokens=40, stop=stop)
    text = whole.choices[0].message.content or ""
    assert response.choices[0].message.content == text.split(stop)[0]
    assert response.usage is not None
    cost = extra(response.usage)["cascade"]
    assert cost["rounds"] > 0
    assert len(extra(response.choices[0])["cascade"]["origins"]) == response.usage.completion_tokens
    await wait_until_free(pair)


async def wait_until_free(pair: LocalServer) -> None:
    """Wait until neither tier holds a session; fail after a second (conformance 27)."""
    async with asyncio.timeout(1):
        while pair.drafter.num_sessions or pair.expert.num_sessions:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0)


@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_disconnects_frees_both_tiers(
    pair: LocalServer, listen: Callable[..., Awaitable[str]], n: int
) -> None:
    """Conformance 27."""
    body = {"prompt": "The Moon", "stream": True, "max_tokens": 900, "n": n, "ignore_eos": True}
    async with httpx2.AsyncClient(base_url=await listen()) as http:
        async with http.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    break
        await wait_until_free(pair)


async def test_the_stream_helper_runs_to_its_end(client: AsyncOpenAI) -> None:
    """Conformance 19, 20, over real blocks."""
    async with client.chat.completions.stream(
        model="pair",
        messages=ALDRIN,
        n=3,
        seed=7,
        logprobs=True,
        top_logprobs=2,
        stream_options={"include_usage": True},
    ) as stream:
        final = await stream.get_final_completion()
    assert final.usage is not None
    assert extra(final.usage)["cascade"]["rounds"] > 0
    for choice in final.choices:
        assert choice.logprobs is not None
        data = b"".join(bytes(token.bytes or []) for token in choice.logprobs.content or [])
        assert data.decode() == choice.message.content


async def test_a_right_prediction_is_accepted(client: AsyncOpenAI) -> None:
    """With the text of the completion as prediction, almost all of it is accepted."""
    body: dict[str, Any] = {"model": "pair", "messages": ALDRIN, "temperature": 0, "max_tokens": 30}
    whole = await client.chat.completions.create(**body)
    text = whole.choices[0].message.content or ""
    again = await client.chat.completions.create(
        **body, prediction={"type": "content", "content": text}
    )
    assert again.choices[0].message.content == text
    assert again.usage is not None
    assert again.usage.completion_tokens_details is not None
    accepted = again.usage.completion_tokens_details.accepted_prediction_tokens or 0
    assert accepted >= 0.9 * again.usage.completion_tokens
