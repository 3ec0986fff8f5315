from __future__ import annotations

import logging
from itertools import count
from typing import TYPE_CHECKING

from cascade.demo import DRAFTER
from cascade.engine import progress
from cascade.engine.backends import select
from cascade.engine.model_loader import load
from cascade.engine.settings import EngineSettings

if TYPE_CHECKING:
    import pytest


def test_each_stage_of_a_load_is_logged(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="cascade"):
        select.prepare(load(str(DRAFTER)), settings=EngineSettings(cache_tokens=1024))
    assert caplog.messages == [
        f"Reading the weights of {DRAFTER}",
        "Checking the lean path against the plain forward pass",
        "Warming up, with a cache of 1024 tokens",
    ]
    assert "Loading weights" not in capfd.readouterr().err


def test_long_stages_are_counted_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    seconds = count()
    with caplog.at_level(logging.INFO, logger="cascade"):
        done = list(progress.counted(range(12), "Layers packed", clock=lambda: next(seconds)))
    assert done == list(range(12))
    assert caplog.messages == ["Layers packed: 4 of 12", "Layers packed: 9 of 12"]
