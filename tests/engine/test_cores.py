from __future__ import annotations

import os

import psutil
import pytest

from cascade.engine.cores import IdleCores
from cascade.engine.loop import Engine
from cascade.engine.settings import EngineSettings
from cascade.engine.weights import adopt

from .architectures import build
from .test_loop import Chain


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the machine is found to be busy with, in percent; the last repeats."""
    found: list[float] = [0.0]
    monkeypatch.setattr(psutil, "cpu_percent", lambda: found[-1])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return found


def test_idle_cores_are_looked_up_now_and_then(shares: list[float]) -> None:
    now_s = 0.0
    idle = IdleCores(clock=lambda: now_s)
    shares.append(25.0)
    assert idle() == 3
    shares.append(100.0)
    assert idle() == 3
    now_s = 1.0
    assert idle() == 0


@pytest.mark.parametrize(("busy", "spare"), [(0.0, 1.0), (75.0, 1.0), (80.0, 0.0), (100.0, 0.0)])
def test_an_engine_has_nothing_to_spare_where_no_core_is_left(
    shares: list[float], busy: float, spare: float
) -> None:
    settings = EngineSettings(cache_tokens=64)
    engine = Engine(adopt(build("llama"), name="tiny"), head=Chain(length=1), settings=settings)
    shares.append(busy)
    assert engine.spare == spare
