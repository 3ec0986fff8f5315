from __future__ import annotations

import pytest

from cascade.engine.stats import BusyMeter


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
        meter.note(busy=True)
        clock.now_s += 0.3
        meter.note(busy=False)

    assert meter.share() == pytest.approx(0.25, abs=0.02)


def test_time_without_a_note_is_idle() -> None:
    clock = Clock()
    meter = BusyMeter(clock=clock)
    clock.now_s += 100
    meter.note(busy=True)
    assert meter.share() > 0.99

    clock.now_s += 100

    assert meter.share() < 0.01
