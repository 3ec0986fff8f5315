"""Requests start when the load says, and every answer or error is recorded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.benchmarks import answer

from cascade.benchmark.load import ClosedLoop, OpenLoop, poisson, read_trace, run_load
from cascade.errors import InvalidMeasurement, Unavailable
from cascade.evaluation.client import CompletionResult

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Echo:
    """Answers with its prompt after a few iterations of the event loop; counts open requests."""

    name = "echo"

    def __init__(self) -> None:
        self.open = 0
        self.most_open = 0

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        self.open += 1
        self.most_open = max(self.most_open, self.open)
        for _ in range(3):
            await asyncio.sleep(0)
        self.open -= 1
        if body["prompt"] == "nonsense":
            raise InvalidMeasurement("refused")
        if body["prompt"] == "fail":
            raise Unavailable("gone")
        return answer(text=body["prompt"])


def bodies(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


@pytest.mark.parametrize("concurrency", [1, 3, 5])
async def test_a_closed_loop_keeps_its_concurrency(concurrency: int) -> None:
    echo = Echo()
    requests = bodies(*(str(number) for number in range(9)))
    run = await run_load(echo, requests, ClosedLoop(concurrency=concurrency))
    assert echo.most_open == concurrency
    assert [answer.text for answer in run.answers] == [body["prompt"] for body in requests]


async def test_an_open_loop_does_not_wait_for_answers() -> None:
    echo = Echo()
    run = await run_load(echo, bodies("a", "b", "c"), OpenLoop(starts_s=(0.0, 0.0, 0.0)))
    assert echo.most_open == 3
    assert [answer.text for answer in run.answers] == ["a", "b", "c"]


async def test_a_failed_request_is_recorded_and_the_run_continues() -> None:
    run = await run_load(Echo(), bodies("a", "fail", "c"), ClosedLoop())
    texts = [one.text if isinstance(one, CompletionResult) else str(one) for one in run.results]
    assert texts == ["a", "gone", "c"]
    assert len(run.answers) == 2


@pytest.mark.parametrize("load", [ClosedLoop(concurrency=2), OpenLoop(starts_s=(0.0, 0.0))])
async def test_a_refused_request_ends_the_run(load: ClosedLoop | OpenLoop) -> None:
    with pytest.raises(InvalidMeasurement, match="refused"):
        await run_load(Echo(), bodies("a", "nonsense"), load)


@given(seed=st.integers(0, 2**32), rate=st.floats(0.01, 1000))
def test_poisson_starts_depend_on_the_seed_and_are_in_order(seed: int, rate: float) -> None:
    load = poisson(rate=rate, count=50, seed=seed)
    assert load == poisson(rate=rate, count=50, seed=seed)
    assert list(load.starts_s) == sorted(load.starts_s)
    assert load != poisson(rate=rate, count=50, seed=seed + 1)


def test_poisson_starts_have_the_rate_on_average() -> None:
    assert poisson(rate=20, count=20_000).starts_s[-1] == pytest.approx(1000, rel=0.05)


def test_a_rate_of_zero_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="0 requests a second"):
        poisson(rate=0, count=1)


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"at_s": 2, "prompt_tokens": 3, "max_tokens": 5}\n\n{"at_s": 0.5, "prompt": "2 + 2?"}\n'
    )
    requests, load = read_trace(path, filler=range)
    assert load.starts_s == (0.5, 2.0)
    assert requests == [
        {"messages": [{"role": "user", "content": "2 + 2?"}], "max_tokens": 96},
        {"prompt": [0, 1, 2], "max_tokens": 5},
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "is empty"),
        ("nonsense", "line 1"),
        ('{"prompt": "a"}', "`at_s`"),
        ('{"at_s": 1}', "`prompt` or `prompt_tokens`"),
        ('{"at_s": 1, "prompt": "a", "wait": 3}', "`wait`"),
    ],
)
def test_an_invalid_trace_is_refused(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidMeasurement, match=message):
        read_trace(path, filler=range)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidMeasurement, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl", filler=range)
