"""The loop by calls: the same answers and the same errors as over gRPC, and memory that stays."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import pytest

from cascade.benchmark import microbench
from cascade.errors import ContextTooLong
from cascade.local import local_server
from cascade.types import DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from tests.conftest import Pair

PROMPT = (3, 1, 4, 1, 5)


def request(*, max_tokens: int) -> Request:
    policy = DecodingParams(sampling=SamplingParams(temperature=1.1), seed=5)
    return Request(
        prompt=PROMPT, policy=policy, mode=Mode.CASCADE, max_tokens=max_tokens, draft_tokens=3
    )


async def test_a_loop_by_calls_writes_what_the_wire_writes(toy: Pair) -> None:
    answers: list[tuple[int, ...]] = []
    for direct in (True, False):
        async with local_server(
            toy.settings(router={"draft_deadline_s": 60}), direct=direct
        ) as running:
            pieces = [piece async for piece in running.router.generate(request(max_tokens=30))]
            answers.append(tuple(token for piece in pieces for token in piece.tokens))
            assert (running.drafter.sessions, running.expert.sessions) == (0, 0) or not direct
    assert answers[0] == answers[1]


async def test_a_refusal_reaches_the_caller_without_a_wire_too(toy: Pair) -> None:
    async with local_server(toy.settings(), direct=True) as running:
        with pytest.raises(ContextTooLong, match="512"):
            _ = [piece async for piece in running.router.generate(request(max_tokens=600))]


@pytest.mark.parametrize("direct", [True, False])
async def test_rounds_are_counted(direct: bool) -> None:  # noqa: FBT001 - a parameter of the test
    found = await microbench.measure_router(streams=4, rounds=500, direct=direct)
    assert found.rounds == 512
    assert found.per_second > 0


async def test_rounds_leave_nothing_behind() -> None:
    await microbench.measure_router(streams=4, rounds=256)
    gc.collect()
    before = len(gc.get_objects())
    await microbench.measure_router(streams=4, rounds=1280)
    gc.collect()
    assert len(gc.get_objects()) - before < 256


@pytest.mark.slow
async def test_a_hundred_thousand_rounds_take_no_memory() -> None:
    found = await microbench.measure_router(streams=64, rounds=100_000)
    assert found.grown_bytes < 2**22
