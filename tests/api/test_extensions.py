"""What this server says beyond OpenAI, and that nobody trips over it (conformance 35 to 39)."""

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


async def test_the_cascade_object_reaches_the_rule(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    """Conformance 35."""
    await client.completions.create(model="pair", prompt="x", extra_body={"cascade": RULE})
    (heard,) = generator.heard
    assert (heard.policy.rule, heard.draft_tokens) == (TokenV3(alpha=0.8), 5)


async def test_a_request_may_set_its_own_deadline(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    for wish in ({}, {"deadline_s": 2.5}):
        await client.completions.create(model="pair", prompt="x", extra_body={"cascade": wish})
    assert [heard.deadline_s for heard in generator.heard] == [None, 2.5]


async def test_a_request_may_outlive_the_expert(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    for wish in ({}, {"on_expert_loss": "drafter"}):
        answer = await client.completions.create(
            model="pair", prompt="x", extra_body={"cascade": wish}
        )
        assert extra(answer.usage)["cascade"]["expert_losses"] == 0
    assert [heard.on_expert_loss for heard in generator.heard] == ["fail", "drafter"]


async def test_extensions_are_seen_by_those_who_look(client: AsyncOpenAI) -> None:
    """Conformance 36: at the choice, in the usage, and at the top."""
    answer = await client.chat.completions.create(
        model="pair", messages=HI, extra_body={"cascade": RULE}
    )
    (choice,) = answer.choices
    said = extra(choice)["cascade"]
    assert "".join(said["tokens"]) == choice.message.content
    assert [row["position"] for row in said["trace"]][:3] == [0, 3, 4]
    cost = extra(answer.usage)["cascade"]
    assert cost["rounds"] == len(said["trace"])
    assert "trace" not in cost
    speculative = extra(answer)["metrics"]["speculative_decoding"]
    assert speculative["num_spec_steps"] == cost["rounds"] == sum(cost["accepted_lengths"])
    assert speculative["num_draft_tokens"] == extra(answer)["timings"]["draft_n"] == cost["drafted"]
    assert speculative["acceptance_histogram"] == cost["accepted_lengths"]
    assert speculative["per_step_drafted"] == [row["drafted"] for row in said["trace"]]


@pytest.mark.parametrize("stop", [None, "Moon"])
@pytest.mark.parametrize("n", [1, 3])
async def test_origins_and_drafts_add_up(client: AsyncOpenAI, n: int, stop: str | None) -> None:
    """Conformance 37, 38: also where a stop string cuts a block."""
    answer = await client.completions.create(
        model="pair", prompt=["x", "y"], n=n, max_tokens=40, stop=stop
    )
    usage = answer.usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    origins = "".join(extra(choice)["cascade"]["origins"] for choice in answer.choices)
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


async def test_the_same_is_told_in_a_stream(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]]
) -> None:
    body: Any = {"prompt": "x", "seed": 7, "cascade": RULE}
    whole = (await http.post("/v1/completions", json=body)).json()
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    *chunks, last, _ = events((await http.post("/v1/completions", json=body)).text)
    said = [chunk["choices"][0]["cascade"] for chunk in chunks]
    assert "".join(part["origins"] for part in said) == whole["choices"][0]["cascade"]["origins"]
    for part, chunk in zip(said, chunks, strict=True):
        assert "".join(part["tokens"]) == chunk["choices"][0]["text"]
        assert len(part["tokens"]) == len(part["origins"])
    assert said[-1]["trace"] == whole["choices"][0]["cascade"]["trace"]
    assert [last[name] for name in ("usage", "metrics", "timings")] == [
        whole[name] for name in ("usage", "metrics", "timings")
    ]


async def test_nothing_of_ours_is_inside_a_delta(
    http: httpx2.AsyncClient, events: Callable[[str], list[Any]]
) -> None:
    """Conformance 39: the stream helper would add it up or trip over it."""
    body = {"messages": HI, "stream": True, "n": 2, "cascade": {"trace": True}, "logprobs": True}
    *chunks, _ = events((await http.post("/v1/chat/completions", json=body)).text)
    names = {name for chunk in chunks for name in chunk["choices"][0]["delta"]}
    assert names == {"role", "content"}


async def test_an_answer_that_asked_for_no_speculation_has_figures_too(
    client: AsyncOpenAI,
) -> None:
    """No draft, no division by zero."""
    answer = await client.completions.create(model="pair", prompt="x", max_tokens=0)
    speculative = extra(answer)["metrics"]["speculative_decoding"]
    assert (speculative["draft_acceptance_rate"], speculative["num_spec_tokens"]) == (0.0, 0)
    assert extra(answer.usage)["cascade"]["deferral_rate"] == 0.0
