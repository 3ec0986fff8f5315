from __future__ import annotations

import math

import pytest

from cascade.router.retry import SERVED, Failure, RetryPolicy, RetryState

PATIENCE = RetryPolicy(pauses_s=(0.0, 1.0, 2.0), entry_s=2.0, loss_s=30.0)


def after(*failures: Failure, start: RetryState = SERVED) -> RetryState:
    """Return how things stand when each failure comes as soon as the tier is asked again."""
    for failure in failures:
        start = start.after_failure(failure, PATIENCE, now_s=start.resume_s)
    return start


def test_pauses_grow_and_the_last_repeats() -> None:
    lost = [after(*[Failure.LOST] * count).resume_s for count in range(1, 6)]
    assert lost == [0.0, 1.0, 3.0, 5.0, 7.0]


@pytest.mark.parametrize(("start", "longest_s"), [(RetryState(), 2.0), (SERVED, 30.0)])
def test_a_tier_is_given_up_when_it_was_away_too_long(start: RetryState, longest_s: float) -> None:
    standing = start
    while not standing.given_up(PATIENCE):
        standing = standing.after_failure(Failure.LOST, PATIENCE, now_s=standing.resume_s)
    assert longest_s < standing.resume_s - standing.since_s <= longest_s + 2.0


def test_the_time_in_which_a_lease_was_sought_counts() -> None:
    tried = SERVED.after_failure(Failure.LOST, PATIENCE, now_s=38.0, since_s=8.0)
    assert tried.given_up(PATIENCE)
    assert not SERVED.after_failure(Failure.LOST, PATIENCE, now_s=38.0).given_up(PATIENCE)


def test_a_session_that_has_not_begun_is_given_up_by_when_it_was_sought() -> None:
    """However many replicas fail it in that time, and by a wait that goes on."""
    sought = RetryState(since_s=6.0)
    assert sought.give_up_s(PATIENCE) == 8.0
    assert not sought.after_failure(Failure.LOST, PATIENCE, now_s=7.9).given_up(PATIENCE)
    assert sought.after_failure(Failure.LOST, PATIENCE, now_s=8.0).given_up(PATIENCE)
    assert SERVED.give_up_s(PATIENCE) == math.inf


def test_who_finds_all_full_at_the_door_is_told_at_once() -> None:
    assert after(Failure.FULL, start=RetryState()).given_up(PATIENCE)
    assert not after(Failure.FULL).given_up(PATIENCE)


def test_a_session_that_breaks_passes_does_not_break_every_replica() -> None:
    assert not after(*[Failure.BROKEN] * 2).given_up(PATIENCE)
    assert after(*[Failure.BROKEN] * 3).given_up(PATIENCE)


def test_lateness_ends_with_any_other_failure() -> None:
    assert after(Failure.LATE).late
    assert not after(Failure.LATE, Failure.LOST).late
    assert not SERVED.late
