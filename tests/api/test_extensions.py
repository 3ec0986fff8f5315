"""Our extensions of OpenAI's API, which its client must ignore (conformance 35 to 39)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cascade.rules import TokenV3

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2
    from openai import AsyncOpenAI
    from tests.support.scripted_generator import ScriptedGenerator

HI: Any = [{"role": "user", "content": "hi"}]

RULE = {"rule": {"kind": "token_v3", "alpha": 0.8}, "draft_tokens": 5, "trace": True}


def extra(model: Any) -> dict[str, Any]:
    return model.model_extra or {}


async def test_the_cascade_object_reaches_the_generator(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    """Conformance 35."""
    await client.completions.create(model="pair", prompt="x", extra_body={"cascade": RULE})
    (request,) = generator.requests
    assert (request.policy.rule, request.draft_tokens) == (TokenV3(alpha=0.8), 5)


async def test_a_request_can_set_its_deadline(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    for options in ({}, {"deadline_s": 2.5}):
        body = {"cascade": options}
        await client.completions.create(model="pair", prompt="x", extra_body=body)
    assert [request.deadline_s for request in generator.requests] == [None, 2.5]


async def test_a_request_can_choose_what_happens_on_expert_loss(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    for options in ({}, {"on_expert_loss": "drafter"}):
        response = await client.completions.create(
            model="pair", prompt="x", extra_body={"cascade": options}
        )
        assert extra(response.usage)["cascade"]["expert_losses"] == 0
    assert [request.on_expert_loss for request in generator.requests] == ["fail", "drafter"]


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("path", ["completions", "chat/completions"])
async def test_return_token_ids_has_those_of_the_prompt_too(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]], path: str, count: int
) -> None:
    """As vLLM: in the choice of a text, beside the choices of a chat, and first in a stream."""
    prompt = {"prompt": "hi"} if path == "completions" else {"messages": HI}
    body = prompt | {"return_token_ids": True, "n": count, "max_tokens": 5, "seed": 7}
    whole = (await http.post(f"/v1/{path}", json=body)).json()
    stream = events((await http.post(f"/v1/{path}", json=body | {"stream": True})).text)[:-1]
    found: list[list[int]] = []
    for index in range(count):
        chunks = [chunk for chunk in stream if chunk["choices"][0]["index"] == index]
        for answer, first in ((whole, True), *((chunk, chunk is chunks[0]) for chunk in chunks)):
            choice = answer["choices"][index if answer is whole else 0]
            holder = choice if path == "completions" else answer
            assert ("prompt_token_ids" in holder) is first
            found.append(holder.get("prompt_token_ids", []))
        ids = [id_ for chunk in chunks for id_ in chunk["choices"][0].get("token_ids", [])]
        assert ids == whole["choices"][index]["token_ids"]
    (ids,) = {tuple(ids) for ids in found if ids}
    assert len(ids) == whole["usage"]["prompt_tokens"]


async def test_a_request_can_choose_what_happens_on_drafter_loss(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    for options in ({}, {"on_drafter_loss": "wait"}):
        response = await client.completions.create(
            model="pair", prompt="x", extra_body={"cascade": options}
        )
        assert extra(response.usage)["cascade"]["undrafted_rounds"] == {}
        assert extra(response.choices[0])["cascade"]["undrafted_rounds"] == {}
    assert [request.on_drafter_loss for request in generator.requests] == ["expert", "wait"]


async def test_choices_usage_and_response_have_extensions(client: AsyncOpenAI) -> None:
    """Conformance 36."""
    response = await client.chat.completions.create(
        model="pair", messages=HI, extra_body={"cascade": RULE}
    )
    (choice,) = response.choices
    cascade = extra(choice)["cascade"]
    assert "".join(cascade["tokens"]) == choice.message.content
    assert [entry["position"] for entry in cascade["trace"]][:3] == [0, 3, 4]
    cost = extra(response.usage)["cascade"]
    assert cost["rounds"] == len(cascade["trace"])
    assert "trace" not in cost
    speculative = extra(response)["metrics"]["speculative_decoding"]
    assert speculative["num_spec_steps"] == cost["rounds"] == sum(cost["accepted_lengths"])
    assert (
        speculative["num_draft_tokens"] == extra(response)["timings"]["draft_n"] == cost["drafted"]
    )
    assert speculative["acceptance_histogram"] == cost["accepted_lengths"]
    assert speculative["per_step_drafted"] == [entry["drafted"] for entry in cascade["trace"]]


@pytest.mark.parametrize("stop", [None, "Moon"])
@pytest.mark.parametrize("n", [1, 3])
async def test_origins_and_draft_counts_agree(
    client: AsyncOpenAI, n: int, stop: str | None
) -> None:
    """Conformance 37, 38: also where a stop string cuts a block."""
    response = await client.completions.create(
        model="pair", prompt=["x", "y"], n=n, max_tokens=40, stop=stop
    )
    usage = response.usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    origins = "".join(extra(choice)["cascade"]["origins"] for choice in response.choices)
    assert len(origins) == usage.completion_tokens
    cost = extra(usage)["cascade"]
    accepted = usage.completion_tokens_details.accepted_prediction_tokens
    rejected = usage.completion_tokens_details.rejected_prediction_tokens
    assert accepted is not None
    assert rejected is not None
    assert accepted + rejected == cost["drafted"]
    assert accepted == origins.count("d") + origins.count("k")
    written = [cost["drafter_tokens"], cost["kept_tokens"], cost["expert_tokens"]]
    assert written == [origins.count(letter) for letter in "dke"]


async def test_a_stream_has_the_same_extensions(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]]
) -> None:
    body: Any = {"prompt": "x", "seed": 7, "cascade": RULE}
    whole = (await http.post("/v1/completions", json=body)).json()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, _ = events((await http.post("/v1/completions", json=body)).text)
    parts = [chunk["choices"][0]["cascade"] for chunk in chunks]
    assert "".join(part["origins"] for part in parts) == whole["choices"][0]["cascade"]["origins"]
    for part, chunk in zip(parts, chunks, strict=True):
        assert "".join(part["tokens"]) == chunk["choices"][0]["text"]
        assert len(part["tokens"]) == len(part["origins"])
    assert parts[-1]["trace"] == whole["choices"][0]["cascade"]["trace"]
    assert [last[name] for name in ("usage", "metrics", "timings")] == [
        whole[name] for name in ("usage", "metrics", "timings")
    ]


async def test_no_extension_is_inside_a_delta(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]]
) -> None:
    """Conformance 39: the stream helper would accumulate it or fail."""
    body = {"messages": HI, "stream": True, "n": 2, "cascade": {"trace": True}, "logprobs": True}
    *chunks, _ = events((await http.post("/v1/chat/completions", json=body)).text)
    names = {name for chunk in chunks for name in chunk["choices"][0]["delta"]}
    assert names == {"role", "content"}


async def test_a_completion_without_drafts_has_figures_too(
    client: AsyncOpenAI,
) -> None:
    """No division by zero."""
    response = await client.completions.create(model="pair", prompt="x", max_tokens=0)
    speculative = extra(response)["metrics"]["speculative_decoding"]
    assert (speculative["draft_acceptance_rate"], speculative["num_spec_tokens"]) == (0.0, 0)
    assert extra(response.usage)["cascade"]["deferral_rate"] == 0.0
