from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest

from cascade.router.circuit_breaker import CircuitBreaker

if TYPE_CHECKING:
    from collections.abc import Callable

HERE = "drafter:1"


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def draft(trust: CircuitBreaker, *, rate: float, blocks: int, chance: random.Random) -> int:
    """Let blocks of four be judged where each token stands so often; return those until a ban."""
    for block in range(blocks):
        stood = next((i for i in range(4) if chance.random() >= rate), 4)
        trust.record(HERE, drafted=4, accepted=stood)
        if trust.is_open(HERE):
            return block + 1
    return blocks


@pytest.fixture
def chance() -> random.Random:
    return random.Random(7)  # noqa: S311 - reproducible luck, no secret


def test_a_collapse_is_seen_within_rounds(chance: random.Random) -> None:
    for before in (0, 1000):
        trust = CircuitBreaker(clock=Clock())
        assert draft(trust, rate=0.8, blocks=before, chance=chance) == before
        assert draft(trust, rate=0.0, blocks=1000, chance=chance) <= 40


@pytest.mark.parametrize("rate", [0.25, 0.5, 0.9])
def test_a_drafter_of_some_use_is_kept(rate: float, chance: random.Random) -> None:
    assert draft(CircuitBreaker(clock=Clock()), rate=rate, blocks=5_000, chance=chance) == 5_000


def test_who_is_shunned_is_tried_again_and_then_shunned_for_longer(
    chance: random.Random, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock()
    trust = CircuitBreaker(clock=clock)
    bans_s = list[float]()
    for _ in range(3):
        draft(trust, rate=0.0, blocks=100, chance=chance)
        bans_s.append(_wait(clock, until=lambda: not trust.is_open(HERE)))
    assert bans_s == [10, 20, 40]
    assert draft(trust, rate=0.9, blocks=50, chance=chance) == 50
    draft(trust, rate=0.0, blocks=100, chance=chance)
    assert _wait(clock, until=lambda: not trust.is_open(HERE)) == 10
    assert HERE in caplog.text
    assert not trust.is_open("another:1")


def _wait(clock: Clock, *, until: Callable[[], bool]) -> float:
    began_s = clock.now_s
    while not until():
        clock.now_s += 1
    return clock.now_s - began_s
