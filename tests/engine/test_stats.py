from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.engine.architectures import build

from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.request import ForwardRequest, LogitsOutput
from cascade.engine.settings import EngineSettings
from cascade.engine.stats import BusyMeter
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_the_share_follows_what_time_is_spent_on() -> None:
    clock = Clock()
    meter = BusyMeter(clock=clock)
    assert meter.share() == 0

    for _ in range(1000):
        clock.now_s += 0.1
        meter.record(busy=True)
        clock.now_s += 0.3
        meter.record(busy=False)

    assert meter.share() == pytest.approx(0.25, abs=0.02)
    assert meter.busy_s == pytest.approx(100)


def test_time_without_a_note_is_idle() -> None:
    clock = Clock()
    meter = BusyMeter(clock=clock)
    clock.now_s += 100
    meter.record(busy=True)
    assert meter.share() > 0.99

    clock.now_s += 100

    assert meter.share() < 0.01


class Deaf:
    """A head that wants nothing more."""

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        del outputs, logits_NV
        return []

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        raise AssertionError(request) from error


def test_waits_and_queues_are_summed_over_what_ran() -> None:
    clock = Clock()
    settings = EngineSettings(cache_tokens=1024, max_step_tokens=64)
    engine = Engine(adopt(build("llama")), handler=Deaf(), settings=settings, clock=clock)
    for session, count in (("a", 10), ("b", 60)):
        tokens = [3] * count
        engine.submit(
            ForwardRequest(session=SessionId(session), base=0, tokens=tokens, num_logits=1)
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
