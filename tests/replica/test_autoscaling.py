"""The scaling policy: monotone, bounded, without oscillation, and blind to nothing it is told."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cascade.replica.autoscaling import FASTEST, TOLERANCE, Targets, TierPolicy, loads_of, wanted
from cascade.replica.metrics import Load

DRAFTER = Targets(wait_s=0.05, busy=0.9, sessions=48)

EXPERT = Targets(wait_s=0.1, backlog=1.0, cache=0.8, busy=0.9, sessions=48)

shares = st.floats(0, 1)

load = st.builds(Load, wait_s=st.floats(0, 10), busy=shares, backlog=st.floats(0, 50), cache=shares)

many = st.lists(load, min_size=1, max_size=20)

tiers = st.sampled_from([DRAFTER, EXPERT])


def even(one: Load, *, replicas: int, sessions: float, targets: Targets = EXPERT) -> int:
    """Return what is wanted where every replica has the same load."""
    return wanted([one] * replicas, replicas=replicas, sessions=sessions, targets=targets)


def spread(total: Load, *, over: int) -> Load:
    """Return the load of each of so many replicas that share a total."""
    return Load(**{name: value / over for name, value in asdict(total).items()})


@given(loads=many, targets=tiers)
def test_without_sessions_nothing_is_needed(loads: list[Load], targets: Targets) -> None:
    assert wanted(loads, replicas=len(loads), sessions=0, targets=targets) == 0


@given(loads=st.lists(load, max_size=20), sessions=st.floats(0.01, 1e4), targets=tiers)
def test_a_session_needs_a_replica(loads: list[Load], sessions: float, targets: Targets) -> None:
    assert wanted(loads, replicas=0, sessions=sessions, targets=targets) >= 1


@given(loads=many, more=load, targets=tiers)
def test_more_load_never_needs_fewer(loads: list[Load], more: Load, targets: Targets) -> None:
    before = wanted(loads, replicas=len(loads), sessions=1, targets=targets)
    for name in asdict(more):
        value = getattr(loads[0], name) + getattr(more, name)
        heavier = [replace(loads[0], **{name: value}), *loads[1:]]
        assert wanted(heavier, replicas=len(loads), sessions=1, targets=targets) >= before


@given(loads=many, targets=tiers)
def test_a_tier_grows_no_faster_than_it_may(loads: list[Load], targets: Targets) -> None:
    count = wanted(loads, replicas=len(loads), sessions=1, targets=targets)
    assert count <= FASTEST * len(loads)


@given(
    total=st.builds(
        Load,
        wait_s=st.floats(0, 2),
        busy=st.floats(0, 20),
        backlog=st.floats(0, 30),
        cache=st.floats(0, 10),
    ),
    replicas=st.integers(1, 30),
    sessions=st.floats(0.1, 500),
    targets=tiers,
)
def test_load_that_is_shared_evenly_finds_one_count_and_keeps_it(
    total: Load, replicas: int, sessions: float, targets: Targets
) -> None:
    """From any count, and what grows to meet a load does not shrink again."""
    counts = [replicas]
    for _ in range(12):
        one = spread(total, over=counts[-1])
        one = replace(one, busy=min(one.busy, 1.0), cache=min(one.cache, 1.0))
        counts.append(even(one, replicas=counts[-1], sessions=sessions, targets=targets))
    assert counts[-1] == counts[-2]
    grown = [later > earlier for earlier, later in pairwise(counts)]
    shrunk = [later < earlier for earlier, later in pairwise(counts)]
    assert not (any(grown) and any(shrunk))


@pytest.mark.parametrize(
    ("one", "count"),
    [
        (Load(), 1),
        (Load(wait_s=0.2), 7),  # twice, and each may bear the tolerance
        (Load(backlog=1.5), 6),
        (Load(cache=1.0), 5),
        (Load(busy=1.0), 4),  # a busy engine asks for no other
        (Load(busy=0.45), 2),
    ],
)
def test_four_experts_under_one_kind_of_load(one: Load, count: int) -> None:
    assert even(one, replicas=4, sessions=1) == count


def test_sessions_alone_grow_a_tier() -> None:
    assert even(Load(), replicas=1, sessions=48 * 5 * (1 + TOLERANCE)) == 5


def test_one_long_stream_does_not_keep_four_replicas() -> None:
    count, counts = 4, list[int]()
    for _ in range(4):
        busy = [Load(busy=1.0), *[Load()] * (count - 1)]
        count = wanted(busy, replicas=count, sessions=1, targets=EXPERT)
        counts.append(count)
    assert counts == [1, 1, 1, 1]


@given(
    loads=st.lists(load, max_size=20),
    starting=st.integers(1, 10),
    sessions=st.sampled_from([0.0, 1.0]),
    targets=tiers,
)
def test_replicas_that_start_are_waited_for(
    loads: list[Load], starting: int, sessions: float, targets: Targets
) -> None:
    """They are neither taken away nor asked for twice, even if who wanted them has gone."""
    count = len(loads) + starting
    now = wanted(loads, replicas=count, sessions=sessions, targets=targets)
    alone = wanted(loads, replicas=len(loads), sessions=sessions, targets=targets)
    assert now == max(count, alone)


def test_a_replica_counts_once_it_has_reported_all() -> None:
    metrics = {"wait_s": {"a": 1.0, "b": 2.0}, "busy": {"a": 0.5}, "backlog": {"a": 3.0}}
    assert loads_of(metrics) == []
    assert loads_of({**metrics, "cache": {"a": 0.25}}) == [
        Load(wait_s=1.0, busy=0.5, backlog=3.0, cache=0.25)
    ]


def context(metrics: Any, *, requests: float) -> AutoscalingContext:
    known: dict[str, Any] = dict.fromkeys(
        ("deployment_id", "app_name", "raw_metrics", "last_scale_up_time", "last_scale_down_time")
    )
    return AutoscalingContext(
        **known,
        deployment_name="Expert",
        current_num_replicas=1,
        target_num_replicas=1,
        running_replicas=[],
        total_num_requests=requests,
        total_queued_requests=0.0,
        aggregated_metrics=metrics,
        capacity_adjusted_min_replicas=0,
        capacity_adjusted_max_replicas=4,
        policy_state={},
        current_time=0.0,
        config=AutoscalingConfig(),
    )


def test_serve_calls_the_policy_with_what_replicas_reported() -> None:
    policy = TierPolicy(**asdict(EXPERT))
    metrics = {name: {"r": value} for name, value in asdict(Load(backlog=2.0)).items()}
    assert policy(context(metrics, requests=3)) == (2, {})
    assert policy(context(metrics, requests=0)) == (0, {})
    assert policy(context({}, requests=0)) == (1, {})


def test_a_target_that_is_none_is_named() -> None:
    with pytest.raises(TypeError, match="latency"):
        TierPolicy(latency=1.0)
