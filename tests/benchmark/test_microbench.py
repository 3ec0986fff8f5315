from __future__ import annotations

import pytest

from cascade import demo
from cascade.benchmark.microbench import Work, measure_step
from cascade.engine.settings import EngineSettings
from cascade.types import DecodingParams, SamplingParams

SETTINGS = EngineSettings(threads=1, cache_tokens=2048)


@pytest.mark.parametrize(("work", "tokens"), [(Work.DRAFT, 1), (Work.JUDGE, 4)])
@pytest.mark.parametrize("temperature", [0, 1])
def test_each_number_of_sessions_has_its_row(work: Work, tokens: int, temperature: float) -> None:
    policy = DecodingParams(sampling=SamplingParams(temperature=temperature))

    found = measure_step(
        str(demo.DRAFTER),
        work=work,
        sessions=(1, 3),
        context_tokens=20,
        block_tokens=3,
        passes=2,
        policy=policy,
        settings=SETTINGS,
    )

    assert [row.sessions for row in found] == [1, 3]
    assert {row.step_tokens for row in found} == {tokens}
    for row in found:
        assert 0 < row.least_ms <= min(row.step_ms, row.mean_ms)
        assert 0 < row.head_share < 1
