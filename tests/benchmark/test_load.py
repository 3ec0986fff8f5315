"""When requests start."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade.benchmark.load import Closed, Open, drive, poisson, read_trace
from cascade.errors import InvalidMeasurement, Unavailable
from cascade.evaluation.client import Answer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


class Echo:
    """Answers with its prompt after a few turns of the loop, and counts who is inside."""

    name = "echo"

    def __init__(self) -> None:
        self.inside = 0
        self.most = 0

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        self.inside += 1
        self.most = max(self.most, self.inside)
        for _ in range(3):
            await asyncio.sleep(0)
        self.inside -= 1
        if body["prompt"] == "nonsense":
            raise InvalidMeasurement("refused")
        if body["prompt"] == "fail":
            raise Unavailable("gone")
        return Answer(
            text=body["prompt"],
            finish="stop",
            statistics={},
            prompt_tokens=1,
            completion_tokens=1,
            latency_s=0.0,
            ttft_s=0.0,
        )


def bodies(*prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": prompt} for prompt in prompts]


@pytest.mark.parametrize("concurrency", [1, 3, 5])
async def test_a_closed_loop_keeps_so_many_inside(concurrency: int) -> None:
    echo = Echo()
    asked = bodies(*(str(number) for number in range(9)))
    run = await drive(echo, asked, Closed(concurrency=concurrency))
    assert echo.most == concurrency
    assert [answer.text for answer in run.answers] == [body["prompt"] for body in asked]


async def test_open_arrivals_wait_for_nobody() -> None:
    echo = Echo()
    run = await drive(echo, bodies("a", "b", "c"), Open(starts_s=(0.0, 0.0, 0.0)))
    assert echo.most == 3
    assert [answer.text for answer in run.answers] == ["a", "b", "c"]


async def test_a_failure_is_counted_and_ends_nothing() -> None:
    run = await drive(Echo(), bodies("a", "fail", "c"), Closed())
    assert [asked.error for asked in run.asked] == [None, "gone", None]
    assert len(run.answers) == 2


@pytest.mark.parametrize("arrivals", [Closed(concurrency=2), Open(starts_s=(0.0, 0.0))])
async def test_a_request_that_is_refused_ends_the_run(arrivals: Closed | Open) -> None:
    with pytest.raises(InvalidMeasurement, match="refused"):
        await drive(Echo(), bodies("a", "nonsense"), arrivals)


@given(seed=st.integers(0, 2**32), rate=st.floats(0.01, 1000))
def test_poisson_arrivals_are_the_seeds_own_and_in_order(seed: int, rate: float) -> None:
    arrivals = poisson(rate=rate, count=50, seed=seed)
    assert arrivals == poisson(rate=rate, count=50, seed=seed)
    assert list(arrivals.starts_s) == sorted(arrivals.starts_s)
    assert arrivals != poisson(rate=rate, count=50, seed=seed + 1)


def test_poisson_arrivals_have_the_rate_on_average() -> None:
    assert poisson(rate=20, count=20_000).starts_s[-1] == pytest.approx(1000, rel=0.05)


def test_a_rate_of_nothing_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="0 requests a second"):
        poisson(rate=0, count=1)


def test_a_trace_is_read_in_order_of_time(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(
        '{"at_s": 2, "prompt_tokens": 3, "max_tokens": 5}\n\n{"at_s": 0.5, "prompt": "2 + 2?"}\n'
    )
    read, arrivals = read_trace(path, filler=range)
    assert arrivals.starts_s == (0.5, 2.0)
    assert read == [
        {"messages": [{"role": "user", "content": "2 + 2?"}], "max_tokens": 96},
        {"prompt": [0, 1, 2], "max_tokens": 5},
    ]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "is empty"),
        ("nonsense", "line 1"),
        ('{"prompt": "a"}', "`at_s`"),
        ('{"at_s": 1}', "`prompt` or `prompt_tokens`"),
        ('{"at_s": 1, "prompt": "a", "wait": 3}', "`wait`"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(InvalidMeasurement, match=said):
        read_trace(path, filler=range)


def test_a_missing_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidMeasurement, match="cannot be read"):
        read_trace(tmp_path / "none.jsonl", filler=range)
