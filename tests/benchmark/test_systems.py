"""Tiers in their own processes."""

from __future__ import annotations

import shutil
import sys

import pytest
from tests.support.shipped_pair import SETTINGS

from cascade.benchmark.systems import tier_processes
from cascade.errors import StartupError

BODY = {
    "messages": [{"role": "user", "content": "Who is Buzz Aldrin?"}],
    "temperature": 0,
    "max_tokens": 24,
    "cascade": {"draft_tokens": 3},
}


@pytest.mark.slow
async def test_busy_seconds_of_tier_processes_are_their_own() -> None:
    """Slow: it starts two processes, as the termination test of `cascade bench` does."""
    async with tier_processes(SETTINGS) as tiers:
        before_s = tiers.busy_s()
        assert all(seconds > 0 for seconds in before_s.values())
        async with tiers.routed("apart", (0.0,)) as (system,):
            answer = await system.client.complete(BODY)
        assert answer.statistics["drafted"] > 0
        assert all(tiers.busy_s()[tier] >= before_s[tier] for tier in ("drafter", "expert"))


async def test_a_tier_that_ends_before_it_serves_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(StartupError, match="the drafter ended before it served"):
        async with tier_processes(SETTINGS):
            raise AssertionError


async def test_a_tier_that_takes_too_long_is_an_error_and_is_stopped() -> None:
    with pytest.raises(StartupError, match=r"did not start within 0\.01 s"):
        async with tier_processes(SETTINGS, start_timeout_s=0.01):
            raise AssertionError
