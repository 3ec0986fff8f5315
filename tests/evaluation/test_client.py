from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from openai import AsyncOpenAI

from cascade.errors import InvalidMeasurement, Unavailable
from cascade.evaluation.client import Answer, InProcess, OverHttp, body, identity, over_http
from cascade.evaluation.scoring import Scorer
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

TIMELY = (  # these depend on when a guess came, or on what was asked before
    "drafter_s", "expert_s", "sent_bytes", "received_bytes", "cached_prompt_tokens",
    "drafter_passes", "branched_rounds",
)  # fmt: skip


def told(answer: Answer) -> dict[str, object]:
    return {name: value for name, value in answer.statistics.items() if name not in TIMELY}


async def test_http_and_process_give_the_same_answer(shipped: InProcess, door: str) -> None:
    asked = body(ITEM, seed=3, temperature=1, cascade=CASCADE)
    within = await shipped.answer(asked)
    async with over_http(door) as server:
        without = await server.answer(asked)
    assert without.text == within.text
    assert without.finish == within.finish
    assert told(without) == told(within)
    assert (without.prompt_tokens, without.completion_tokens) == (
        within.prompt_tokens,
        within.completion_tokens,
    )
    for answer in (within, without):
        assert 0 < answer.ttft_s == answer.marks_s[0] <= answer.marks_s[-1] <= answer.latency_s
        assert answer.statistics["expert_passes"] > 0
        assert answer.statistics["sent_bytes"] > 0


async def test_a_text_can_be_continued_over_both(shipped: InProcess, door: str) -> None:
    item = replace(ITEM, completion=True, max_tokens=5)
    asked = body(item, temperature=0)
    assert asked["prompt"] == "What is the capital of France?"
    async with over_http(f"{door}/v1/") as server:
        assert (await server.answer(asked)).text == (await shipped.answer(asked)).text


async def test_a_refused_request_says_why(shipped: InProcess, door: str) -> None:
    asked = body(ITEM, cascade={"rule": {"kind": "chow", "alpha": 7}})
    with pytest.raises(InvalidMeasurement, match="alpha"):
        await shipped.answer(asked)
    async with over_http(door) as server:
        with pytest.raises(InvalidMeasurement, match=r"the server refuses.*alpha"):
            await server.answer(asked)


async def test_an_unknown_model_is_the_callers_mistake(door: str) -> None:
    async with over_http(door, model="other") as server:
        with pytest.raises(InvalidMeasurement, match="No model `other`"):
            await server.answer(body(ITEM))


async def test_no_server_says_how_to_start_one() -> None:
    with pytest.raises(InvalidMeasurement, match=r"serve run cluster/local\.yaml"):
        async with over_http("http://127.0.0.1:9"):
            pass


async def test_a_server_that_leaves_is_unavailable() -> None:
    async with AsyncOpenAI(base_url="http://127.0.0.1:9", api_key="none", max_retries=0) as client:
        gone = OverHttp(client, url="http://127.0.0.1:9", model="cascade")
        with pytest.raises(Unavailable, match="cannot be heard"):
            await gone.answer(body(ITEM))


def test_a_models_identity_changes_with_its_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = identity(str(tmp_path), None)
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert identity(str(tmp_path), None) != first
    assert identity("org/model", None) == "org/model"
    assert identity("org/model", "v1") == "org/model@v1"


async def test_traced_rounds_tell_how_much_was_drafted(shipped: InProcess) -> None:
    asked = body(ITEM, temperature=0)
    assert not (await shipped.answer(asked)).blocks
    traced = await shipped.answer(asked | {"cascade": {"trace": True}})
    assert len(traced.blocks) == traced.statistics["rounds"] > 0
    assert sum(traced.blocks) == traced.statistics["drafted"]
