from __future__ import annotations

import pytest
from tests.engine.architectures import build
from tests.engine.harness import GreedyHandler
from tests.support.clock import FakeClock

from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.engine.settings import EngineSettings
from cascade.engine.stats import BusyMeter
from cascade.types import SessionId


def test_the_busy_share_is_a_moving_average() -> None:
    clock = FakeClock(100.0)
    meter = BusyMeter(clock=clock)
    assert meter.share() == 0

    for _ in range(1000):
        clock.now_s += 0.1
        meter.record(busy=True)
        clock.now_s += 0.3
        meter.record(busy=False)

    assert meter.share() == pytest.approx(0.25, abs=0.02)
    assert meter.busy_s == pytest.approx(100)


def test_time_since_the_last_record_counts_as_idle() -> None:
    clock = FakeClock(100.0)
    meter = BusyMeter(clock=clock)
    clock.now_s += 100
    meter.record(busy=True)
    assert meter.share() > 0.99

    clock.now_s += 100

    assert meter.share() < 0.01


def test_waits_and_queued_tokens_are_summed() -> None:
    clock = FakeClock(100.0)
    settings = EngineSettings(cache_tokens=1024, max_step_tokens=64)
    engine = Engine(
        adopt(build("llama")), handler=GreedyHandler(length=1), settings=settings, clock=clock
    )
    for session, count in (("a", 10), ("b", 60)):
        tokens = [3] * count
        engine.submit(
            ForwardRequest(
                share=NOBODYS, session=SessionId(session), base=0, tokens=tokens, num_logits=1
            )
        )
        clock.now_s += 2

    engine.step()
    clock.now_s += 5
    engine.step()

    stats = engine.stats()
    assert (stats.passes, stats.turns, stats.tokens) == (2, 3, 70)
    assert stats.queued_tokens == 70 + 70 - 64
    assert (stats.waits, stats.waited_s) == (2, 4 + 2)
    assert stats.budget_tokens == 64
