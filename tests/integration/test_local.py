"""The router over calls gives the answers and errors of gRPC, and rounds leave no memory behind."""

from __future__ import annotations

import gc
from dataclasses import replace
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


async def test_calls_and_grpc_give_the_same_tokens(toy: Pair) -> None:
    answers: list[tuple[int, ...]] = []
    for direct in (True, False):
        settings = toy.settings(router={"draft_deadline_s": 60})
        async with local_server(settings, direct=direct) as server:
            chunks = [chunk async for chunk in server.router.generate(request(max_tokens=30))]
            answers.append(tuple(token for chunk in chunks for token in chunk.tokens))
            if direct:
                assert (server.drafter.num_sessions, server.expert.num_sessions) == (0, 0)
    assert answers[0] == answers[1]


async def test_a_refusal_is_raised_without_grpc_too(toy: Pair) -> None:
    async with local_server(toy.settings(), direct=True) as server:
        too_long = replace(request(max_tokens=1), prompt=(1,) * 600)
        with pytest.raises(ContextTooLong, match="512"):
            _ = [chunk async for chunk in server.router.generate(too_long)]


async def test_rounds_are_counted_and_leave_no_objects_behind() -> None:
    await microbench.measure_router(streams=4, rounds=64)
    gc.collect()
    before = len(gc.get_objects())
    found = await microbench.measure_router(streams=4, rounds=500)
    gc.collect()
    assert len(gc.get_objects()) - before < 256
    assert found.rounds == 512
    assert found.per_second > 0


@pytest.mark.slow
async def test_a_hundred_thousand_rounds_do_not_grow_memory() -> None:
    found = await microbench.measure_router(streams=64, rounds=100_000)
    assert found.grown_bytes < 2**22
