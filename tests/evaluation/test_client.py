from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from openai import AsyncOpenAI

from cascade.errors import InvalidMeasurement, Unavailable
from cascade.evaluation.client import (
    CompletionResult,
    HttpClient,
    InProcessClient,
    connect_http,
    model_identity,
    request_body,
)
from cascade.evaluation.tasks import Scorer
from cascade.evaluation.workloads import Item, Message

if TYPE_CHECKING:
    from pathlib import Path

ITEM = Item(
    id="1",
    family="facts",
    messages=(Message(role="user", content="What is the capital of France?"),),
    references=("Paris",),
    scorer=Scorer.CONTAINS,
    max_tokens=24,
)

CASCADE = {"rule": {"kind": "token_v3", "alpha": 0.9}, "draft_tokens": 4, "coupling": "maximal"}

TIMING_DEPENDENT = (  # on when a draft arrived, or on earlier requests
    "drafter_s", "expert_s", "sent_bytes", "received_bytes", "cached_prompt_tokens",
    "drafter_passes", "branched_rounds", "cost",
)  # fmt: skip


def deterministic_statistics(answer: CompletionResult) -> dict[str, object]:
    return {
        name: value for name, value in answer.statistics.items() if name not in TIMING_DEPENDENT
    }


async def test_http_and_in_process_clients_give_the_same_answer(
    shipped: InProcessClient, shipped_url: str
) -> None:
    body = request_body(ITEM, seed=3, temperature=1, cascade=CASCADE)
    in_process = await shipped.complete(body)
    async with connect_http(shipped_url) as server:
        over_http = await server.complete(body)
    assert over_http.text == in_process.text
    assert over_http.finish_reason == in_process.finish_reason
    assert deterministic_statistics(over_http) == deterministic_statistics(in_process)
    assert (over_http.prompt_tokens, over_http.completion_tokens) == (
        in_process.prompt_tokens,
        in_process.completion_tokens,
    )
    for answer in (in_process, over_http):
        assert (
            0
            < answer.ttft_s
            == answer.chunk_times_s[0]
            <= answer.chunk_times_s[-1]
            <= answer.latency_s
        )
        assert answer.statistics["expert_passes"] > 0
        assert answer.statistics["sent_bytes"] > 0


async def test_both_clients_can_continue_a_text(shipped: InProcessClient, shipped_url: str) -> None:
    item = replace(ITEM, completion=True, max_tokens=5)
    body = request_body(item, temperature=0)
    assert body["prompt"] == "What is the capital of France?"
    async with connect_http(f"{shipped_url}/v1/") as server:
        assert (await server.complete(body)).text == (await shipped.complete(body)).text


async def test_a_refused_request_says_why(shipped: InProcessClient, shipped_url: str) -> None:
    body = request_body(ITEM, cascade={"rule": {"kind": "chow", "alpha": 7}})
    with pytest.raises(InvalidMeasurement, match="alpha"):
        await shipped.complete(body)
    async with connect_http(shipped_url) as server:
        with pytest.raises(InvalidMeasurement, match=r"the server refuses.*alpha"):
            await server.complete(body)


async def test_an_unknown_model_is_an_invalid_measurement(shipped_url: str) -> None:
    async with connect_http(shipped_url, model="other") as server:
        with pytest.raises(InvalidMeasurement, match="No model `other`"):
            await server.complete(request_body(ITEM))


async def test_the_error_without_a_server_says_how_to_start_one() -> None:
    with pytest.raises(InvalidMeasurement, match=r"serve run cluster/local\.yaml"):
        async with connect_http("http://127.0.0.1:9"):
            pass


async def test_an_error_of_the_server_is_not_said_to_be_no_server(shipped_url: str) -> None:
    with pytest.raises(InvalidMeasurement, match=r"the server at http.*/other answers 404"):
        async with connect_http(f"{shipped_url}/other"):
            pass


async def test_a_server_that_cannot_be_reached_is_unavailable() -> None:
    async with AsyncOpenAI(base_url="http://127.0.0.1:9", api_key="none", max_retries=0) as client:
        gone = HttpClient(client, url="http://127.0.0.1:9", model="cascade")
        with pytest.raises(Unavailable, match="cannot reach the server"):
            await gone.complete(request_body(ITEM))


def test_a_models_identity_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = model_identity(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert model_identity(str(tmp_path), None) != first
    assert model_identity("org/model", None) == "org/model"
    assert model_identity("org/model", "v1") == "org/model@v1"


async def test_traced_rounds_say_how_many_tokens_were_drafted(shipped: InProcessClient) -> None:
    body = request_body(ITEM, temperature=0)
    assert not (await shipped.complete(body)).draft_lengths
    traced = await shipped.complete(body | {"cascade": {"trace": True}})
    assert len(traced.draft_lengths) == traced.statistics["rounds"] > 0
    assert sum(traced.draft_lengths) == traced.statistics["drafted"]
