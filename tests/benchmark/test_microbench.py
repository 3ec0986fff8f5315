"""Engine steps alone: what a step consists of, and that its time is measured."""

from __future__ import annotations

import pytest

from cascade import demo
from cascade.benchmark.microbench import StepBenchmark
from cascade.engine.settings import EngineSettings
from cascade.types import DecodingParams, SamplingParams


@pytest.mark.parametrize(("block_tokens", "step_tokens"), [(None, 1), (3, 4)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_steps_of_one_and_of_several_sessions_are_timed(
    block_tokens: int | None, step_tokens: int, temperature: float
) -> None:
    bench = StepBenchmark(
        str(demo.DRAFTER),
        policy=DecodingParams(sampling=SamplingParams(temperature=temperature)),
        settings=EngineSettings(threads=1, cache_tokens=2048),
    )
    for sessions in (1, 3):
        found = bench.time(
            sessions=sessions, block_tokens=block_tokens, context_tokens=20, passes=2
        )
        assert found.step_tokens == step_tokens
        assert 0 < found.handler_ms < found.step_ms
        assert found.mean_ms > 0
        assert 0 < found.handler_share < 1
