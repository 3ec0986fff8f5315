"""What sessions take of forward passes: each token of a pass costs the same."""

from __future__ import annotations

import pytest
from tests.engine.architectures import build
from tests.engine.harness import EngineHarness
from tests.engine.test_engine import SMALL, numbers

from cascade.types import SessionId


@pytest.fixture
def harness() -> EngineHarness:
    return EngineHarness(build("llama"), SMALL)


def taken_s(harness: EngineHarness, session: str) -> float:
    return harness.engine.taken_s(SessionId(session))


def test_sessions_in_a_pass_share_its_duration_by_their_tokens(harness: EngineHarness) -> None:
    long = harness.submit("long", numbers(12), num_logits=1)
    short = harness.submit("short", numbers(4, start=5), num_logits=4)
    harness.engine.step()
    assert long.ended
    assert short.ended
    assert taken_s(harness, "short") > 0
    assert taken_s(harness, "long") == pytest.approx(3 * taken_s(harness, "short"))


def test_what_sessions_take_is_no_more_than_the_engine_was_busy(harness: EngineHarness) -> None:
    for length in (1, 3, 200, 2):
        harness.run("a", numbers(length))
        harness.run("b", numbers(length, start=9))
    total = taken_s(harness, "a") + taken_s(harness, "b")
    assert 0 < total <= harness.engine.stats().busy_s


def test_a_branch_counts_for_its_session_also_after_it_is_dropped(harness: EngineHarness) -> None:
    harness.run("a", numbers(20))
    before = taken_s(harness, "a")
    harness.run_until_done(harness.branch("a/1", numbers(1, start=8), parent="a", base=20))
    branched = taken_s(harness, "a")
    assert before < branched == taken_s(harness, "a/1")
    harness.adopt("a", branch="a/1")
    harness.run("a", numbers(1))
    assert taken_s(harness, "a") > branched


def test_a_session_that_has_ended_has_taken_nothing(harness: EngineHarness) -> None:
    harness.run("a", numbers(20))
    harness.release("a")
    harness.run("b", numbers(2))
    assert taken_s(harness, "a") == 0
    assert taken_s(harness, "b") > 0
