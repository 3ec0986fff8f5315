"""Merged streams, summed statistics, and completions that fail."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.accounts import check_accounts
from tests.support.scripted_generator import ScriptedGenerator

from cascade.api import build_request
from cascade.api.completion import Completions, merge, sum_statistics
from cascade.api.context import ServingContext
from cascade.api.responses import figures
from cascade.api.schema import CompletionBody
from cascade.errors import Internal, Overloaded
from cascade.types import Round, Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from cascade.api.completion import Completion
    from cascade.engine.tokenizer import Tokenizer
    from cascade.types import OutputChunk, Request

ROUND = Round(position=0, drafted=1, accepted=1, deferred=0, tokens=1, draft_ms=1.0, judge_ms=1.0)


class Source:
    """A stream of numbers that knows whether it was closed."""

    def __init__(self, count: int, *, error: Exception | None = None) -> None:
        self.closed = False
        self._count = count
        self._error = error

    async def stream(self) -> AsyncGenerator[int]:
        try:
            for number in range(self._count):
                await asyncio.sleep(0)
                yield number
            if self._error is not None:
                raise self._error
        finally:
            self.closed = True


def streams_of(sources: Sequence[Source]) -> dict[int, AsyncGenerator[int]]:
    return {number: source.stream() for number, source in enumerate(sources)}


@given(counts=st.lists(st.integers(0, 5), max_size=4))
def test_merge_yields_every_item_once_and_in_order(counts: list[int]) -> None:
    sources = [Source(count) for count in counts]

    async def collect() -> list[tuple[int, int] | None]:
        return [item async for item in merge(streams_of(sources), keep_alive_s=None)]

    items = asyncio.run(collect())
    for number, count in enumerate(counts):
        assert [item[1] for item in items if item and item[0] == number] == list(range(count))
    assert len(items) == sum(counts)
    assert all(source.closed for source in sources)


async def test_the_first_error_ends_all_merged_streams() -> None:
    sources = [Source(100), Source(1, error=Overloaded("full"))]
    with pytest.raises(Overloaded):
        assert [item async for item in merge(streams_of(sources), keep_alive_s=None)]
    assert all(source.closed for source in sources)


async def test_closing_a_merge_closes_every_stream() -> None:
    sources = [Source(100), Source(100)]
    async with aclosing(merge(streams_of(sources), keep_alive_s=None)) as merged:
        await anext(merged)
    assert all(source.closed for source in sources)


async def test_merge_yields_none_while_no_item_arrives() -> None:
    gate = asyncio.Event()

    async def late() -> AsyncGenerator[int]:
        await gate.wait()
        yield 1

    items: list[tuple[int, int] | None] = []
    async for item in merge({0: late()}, keep_alive_s=0.001):
        items.append(item)
        gate.set()
    assert items[0] is None
    assert items[-1] == (0, 1)


def test_statistics_are_summed() -> None:
    causes = {"drafter late": 2}
    one = Statistics(rounds=2, drafter_s=0.5, accepted_lengths=[1, 0, 1], trace=[ROUND])
    two = Statistics(rounds=1, drafter_s=0.25, accepted_lengths=[1], draft_length_reason="fixed")
    one.failover_causes, two.failover_causes = causes, causes | {"expert lost": 1}
    both = sum_statistics([one, two])
    assert (both.rounds, both.drafter_s, both.accepted_lengths) == (3, 0.75, [2, 0, 1])
    assert (both.draft_length_reason, both.trace) == ("fixed", [ROUND])
    assert both.failover_causes == {"drafter late": 4, "expert lost": 1}
    assert sum_statistics([one]) == one


@given(
    blocks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    stop=st.lists(st.sampled_from(["Moon", "on the", "é", " ", "rger n", "zażółć"]), max_size=3),
    n=st.integers(1, 3),
    max_tokens=st.integers(1, 70),
    predicted=st.booleans(),
)
def test_accounts_agree_wherever_the_text_ends(
    tokenizer: Tokenizer, *, predicted: bool, **asked: Any
) -> None:
    """Also while text is held back: origins, counts, histogram, trace and figures, and sums."""
    words = tokenizer.encode("Buzz Aldrin walked on the Moon with café and Ärger naïve zażółć")
    generator = ScriptedGenerator(script=lambda _: words, blocks=tuple(asked.pop("blocks")))
    service = ServingContext(generator=generator, tokenizer=tokenizer, models=("pair",))
    prediction = {"type": "content", "content": "Buzz"} if predicted else None
    body = {"prompt": "x", "cascade": {"trace": True}, "prediction": prediction} | asked
    call = build_request.completion(CompletionBody.model_validate(body), service)
    completions = Completions(call, service)

    async def run() -> None:
        async with aclosing(completions.stream()) as deltas:
            async for item in deltas:
                assert item is not None
                check_choice(item[0])

    asyncio.run(run())
    usage = figures(completions.usage)
    cost, speculative = usage["usage"]["cascade"], usage["metrics"]["speculative_decoding"]
    parts = [each.statistics for each in completions.all]
    for name in ("rounds", "drafted", "accepted", "judged", "deferred", "kept_tokens"):
        assert cost[name] == sum(getattr(part, name) for part in parts)
    assert speculative["num_accepted_draft_tokens"] == cost["accepted"]
    assert usage["usage"]["completion_tokens"] == sum(len(each.tokens) for each in completions.all)
    assert sum(speculative["per_step_accepted"]) == cost["accepted"]


def check_choice(completion: Completion) -> None:
    origins = [token.origin for token in completion.tokens if token.origin is not None]
    check_accounts(completion.request, completion.statistics, origins)


NO_CHUNKS: list[OutputChunk] = []


class SilentGenerator:
    """A generator that ends without a finish reason."""

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        del request
        for chunk in NO_CHUNKS:
            yield chunk

    async def score(self, tokens: object, *, top: int, caller: object = None) -> tuple[()]:
        del tokens, top, caller
        return ()


async def test_a_generation_without_a_finish_reason_is_an_internal_error(
    service: ServingContext,
) -> None:
    call = build_request.completion(CompletionBody(prompt="x"), service)
    with pytest.raises(Internal):
        await Completions(call, replace(service, generator=SilentGenerator())).run()


async def test_requests_have_the_id_of_their_call(
    service: ServingContext,
) -> None:
    call = build_request.completion(CompletionBody(prompt="x", n=2), service)
    completions = Completions(call, service, request_id="abc")
    assert [completion.request.name for completion in completions.all] == ["abc", "abc"]
