"""Words and tokens that an answer may not have: what is served is what `transformers` generates."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import pytest
import torch
from tests.support.rpc_errors import error_info

from cascade.api.grpc import GenerationServicer
from cascade.api.http import create_app
from cascade.rules import Ensemble, Rule, TokenV3
from cascade.types import Coupling, DecodingParams, Mode, Request, SamplingParams, TokenConstraints
from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc as rpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.conftest import Pair

    from cascade.local import LocalServer

STOP, LENGTH = 6, 14

PROMPTS: tuple[tuple[int, ...], ...] = ((3, 1, 4), (7, 7, 0), (2, 0), (5, 6, 3))

GREEDY = SamplingParams(temperature=0.0)

# The constraints, and how `generate` spells them. No prompt ends as a bad word begins:
# transformers looks for bad words across the end of the prompt, this server as vLLM does not.
CASES: dict[str, tuple[TokenConstraints, dict[str, Any]]] = {
    "min_tokens": (TokenConstraints(min_tokens=9), {"min_new_tokens": 9}),
    "one_word": (TokenConstraints(bad_words=((7,), (4,))), {"bad_words_ids": [[7], [4]]}),
    "phrases": (
        TokenConstraints(bad_words=((7, 7, 3), (1, 1, 4), (2, 2), (7, 1))),
        {"bad_words_ids": [[7, 7, 3], [1, 1, 4], [2, 2], [7, 1]]},
    ),
    "allowed": (
        TokenConstraints(allowed_ids=(0, 1, 3, STOP)),
        {"suppress_tokens": [2, 4, 5, 7]},
    ),
    "all": (
        TokenConstraints(min_tokens=12, bad_words=((7,), (3, 3)), allowed_ids=(0, 1, 3, 6, 7)),
        {"min_new_tokens": 12, "bad_words_ids": [[7], [3, 3]], "suppress_tokens": [2, 4, 5]},
    ),
}


def generated(pair: Pair, prompt: Sequence[int], **settings: Any) -> tuple[int, ...]:
    """Return what `transformers` generates greedily."""
    ids = torch.tensor([prompt])
    model: Any = pair.expert.model
    found = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        do_sample=False,
        eos_token_id=STOP,
        pad_token_id=0,
        **settings,
    )
    return tuple(found[0, len(prompt) :].tolist())


async def served(server: LocalServer, request: Request) -> tuple[int, ...]:
    chunks = [chunk async for chunk in server.router.generate(request)]
    return tuple(token for chunk in chunks for token in chunk.tokens)


@pytest.mark.parametrize("name", CASES)
async def test_greedy_text_is_that_of_generate_at_every_block_length(
    toy: Pair, toy_stack: LocalServer, name: str
) -> None:
    """In shared batches; without a drafter too."""
    constraints, settings = CASES[name]
    policy = DecodingParams(sampling=GREEDY, constraints=constraints, stop_ids=(STOP,))
    expected = [generated(toy, prompt, **settings) for prompt in PROMPTS]
    assert expected != [generated(toy, prompt) for prompt in PROMPTS]
    hows: list[dict[str, Any]] = [{"draft_tokens": count} for count in (1, 2, 3, 5, 8)]
    for how in (*hows, {"mode": Mode.EXPERT_ONLY}):
        more: dict[str, Any] = {"mode": Mode.SPECULATIVE, "max_tokens": LENGTH} | how
        requests = [Request(prompt=prompt, policy=policy, **more) for prompt in PROMPTS]
        found = await asyncio.gather(*(served(toy_stack, request) for request in requests))
        assert found == expected, how


@pytest.mark.parametrize("rule", [Ensemble(weight=0.5), TokenV3(alpha=0.9)], ids=str)
@pytest.mark.parametrize("coupling", Coupling)
async def test_a_prediction_brings_no_word_into_the_answer(
    toy_stack: LocalServer, rule: Rule, coupling: Coupling
) -> None:
    """Whatever rule would keep it."""
    policy = DecodingParams(
        constraints=TokenConstraints(min_tokens=8, bad_words=((2,), (1, 3))),
        stop_ids=(STOP,),
        rule=rule,
        coupling=coupling,
    )
    for prediction in ((2, 2, 2, 2), (1, 3, 1, 3, 1), (0, STOP, 0), (1, 0, 1, 3)):
        request = Request(
            prompt=(3, 1, 4), policy=policy, max_tokens=12, draft_tokens=3, prediction=prediction
        )
        answer = await served(toy_stack, request)
        assert 2 not in answer
        assert (1, 3) not in set(pairwise(answer))
        assert STOP not in answer[:8]


@pytest.fixture
async def http(toy_stack: LocalServer) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=create_app(toy_stack.service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


@pytest.fixture
async def stub(toy_stack: LocalServer) -> AsyncIterator[rpc.GenerationServiceAsyncStub]:
    server = grpc.aio.server()
    rpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(lambda: toy_stack.service), server
    )
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield rpc.GenerationServiceStub(channel)
    await server.stop(None)


MODES = [pb.MODE_CASCADE, pb.MODE_EXPERT_ONLY, pb.MODE_DRAFTER_ONLY, pb.MODE_TOKEN_CASCADE]


@pytest.mark.parametrize("mode", MODES, ids=pb.Mode.Name)
async def test_both_apis_give_the_same_choices_in_every_mode(
    http: httpx2.AsyncClient, stub: rpc.GenerationServiceAsyncStub, mode: pb.Mode.ValueType
) -> None:
    """With several choices, seeds, log-probabilities, an echo, and as a stream."""
    common: dict[str, Any] = {
        "min_tokens": 4,
        "bad_words": ["C", "AB"],
        "allowed_token_ids": [0, 1, 2, 3, 6],
        "stop_token_ids": [STOP],
        "seed": 11,
        "max_tokens": 9,
        "echo": True,
    }
    name = pb.Mode.Name(mode).removeprefix("MODE_").lower()
    body = common | {
        "prompt": "DBE",
        "n": 3,
        "logprobs": 1,
        "cascade": {"mode": name, "draft_tokens": 3},
    }
    generation = pb.Generation(
        text="DBE", mode=mode, choice_count=3, logprob_count=1, fixed_draft_length=3, **common
    )
    response = await stub.Generate(pb.GenerateRequest(generation=generation))
    plain = (await http.post("/v1/completions", json=body)).json()["choices"]
    texts = [choice["text"] for choice in plain]
    assert texts == [choice.text for choice in response.choices]
    for choice, text in zip(response.choices, texts, strict=True):
        answer = list(choice.token_ids)[3:]
        assert set(answer) <= {0, 1, 3, STOP}
        assert STOP not in answer[:4]
        assert "AB" not in text.removeprefix("DBE")
    frames = stub.GenerateStream(pb.GenerateStreamRequest(generation=generation))
    streamed = [""] * 3
    async for frame in frames:
        for choice in frame.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


async def test_the_logprobs_of_a_prompt_are_the_experts(
    toy: Pair, http: httpx2.AsyncClient, stub: rpc.GenerationServiceAsyncStub
) -> None:
    prompt = [3, 1, 4, 1, 5]
    body = {"prompt": prompt, "prompt_logprobs": 3, "max_tokens": 1, "n": 2}
    choices = (await http.post("/v1/completions", json=body)).json()["choices"]
    generation = pb.Generation(
        tokens=pb.TokenIds(token_ids=prompt), prompt_logprob_count=3, max_tokens=1
    )
    answer = await stub.Generate(pb.GenerateRequest(generation=generation))
    for at in range(1, len(prompt)):
        own = toy.expert.logits(prompt[:at]).log_softmax(0)
        best = own.topk(3)
        for choice in choices:
            entry = choice["prompt_logprobs"][at]
            values = {int(token): one["logprob"] for token, one in entry.items()}
            assert values.keys() == {prompt[at], *best.indices.tolist()}
            assert all(
                value == pytest.approx(float(own[id_]), abs=1e-4) for id_, value in values.items()
            )
        one = answer.choices[0].prompt_logprobs[at]
        assert one.logprob == pytest.approx(float(own[prompt[at]]), abs=1e-4)
        assert list(one.top_token_ids) == best.indices.tolist()


async def test_what_is_refused_is_named(stub: rpc.GenerationServiceAsyncStub) -> None:
    generation = pb.Generation(text="A", min_tokens=9, max_tokens=8)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.Generate(pb.GenerateRequest(generation=generation))
    assert error_info(caught.value).metadata["param"] == "min_tokens"
