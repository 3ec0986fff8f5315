"""The scaling policy is monotone, bounded and stable, and uses every metric that is reported."""

from __future__ import annotations

from dataclasses import asdict, replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cascade.replica.autoscaling import (
    MAX_GROWTH,
    TOLERANCE,
    Targets,
    TierPolicy,
    desired_replicas,
    reported_loads,
)
from cascade.replica.metrics import ReplicaLoad

DRAFTER = Targets(wait_s=0.05, busy=0.9, sessions=48)

EXPERT = Targets(wait_s=0.1, backlog=1.0, cache=0.8, busy=0.9, sessions=48)

shares = st.floats(0, 1)

load = st.builds(
    ReplicaLoad, wait_s=st.floats(0, 10), busy=shares, backlog=st.floats(0, 50), cache=shares
)

many = st.lists(load, min_size=1, max_size=20)

tiers = st.sampled_from([DRAFTER, EXPERT])


def evenly(one: ReplicaLoad, *, replicas: int, sessions: float, targets: Targets = EXPERT) -> int:
    """Return the desired number of replicas where each has the same load."""
    return desired_replicas([one] * replicas, replicas=replicas, sessions=sessions, targets=targets)


def divided(total: ReplicaLoad, *, by: int) -> ReplicaLoad:
    """Return the load of each replica where so many share a total."""
    return ReplicaLoad(**{name: value / by for name, value in asdict(total).items()})


@given(loads=many, targets=tiers)
def test_a_tier_without_sessions_needs_no_replica(
    loads: list[ReplicaLoad], targets: Targets
) -> None:
    assert desired_replicas(loads, replicas=len(loads), sessions=0, targets=targets) == 0


@given(loads=st.lists(load, max_size=20), sessions=st.floats(0.01, 1e4), targets=tiers)
def test_a_session_needs_a_replica(
    loads: list[ReplicaLoad], sessions: float, targets: Targets
) -> None:
    assert desired_replicas(loads, replicas=0, sessions=sessions, targets=targets) >= 1


@given(loads=many, more=load, targets=tiers)
def test_more_load_never_needs_fewer(
    loads: list[ReplicaLoad], more: ReplicaLoad, targets: Targets
) -> None:
    before = desired_replicas(loads, replicas=len(loads), sessions=1, targets=targets)
    for name in asdict(more):
        value = getattr(loads[0], name) + getattr(more, name)
        heavier = [replace(loads[0], **{name: value}), *loads[1:]]
        assert desired_replicas(heavier, replicas=len(loads), sessions=1, targets=targets) >= before


@given(loads=many, targets=tiers)
def test_growth_in_one_decision_is_limited(loads: list[ReplicaLoad], targets: Targets) -> None:
    count = desired_replicas(loads, replicas=len(loads), sessions=1, targets=targets)
    assert count <= MAX_GROWTH * len(loads)


@given(
    total=st.builds(
        ReplicaLoad,
        wait_s=st.floats(0, 2),
        busy=st.floats(0, 20),
        backlog=st.floats(0, 30),
        cache=st.floats(0, 10),
    ),
    replicas=st.integers(1, 30),
    sessions=st.floats(0.1, 500),
    targets=tiers,
)
def test_evenly_shared_load_converges_to_one_count(
    total: ReplicaLoad, replicas: int, sessions: float, targets: Targets
) -> None:
    """From any count, either only growing or only shrinking on the way."""
    counts = [replicas]
    for _ in range(12):
        one = divided(total, by=counts[-1])
        one = replace(one, busy=min(one.busy, 1.0), cache=min(one.cache, 1.0))
        counts.append(evenly(one, replicas=counts[-1], sessions=sessions, targets=targets))
    assert counts[-1] == counts[-2]
    grown = [later > earlier for earlier, later in pairwise(counts)]
    shrunk = [later < earlier for earlier, later in pairwise(counts)]
    assert not (any(grown) and any(shrunk))


@pytest.mark.parametrize(
    ("one", "count"),
    [
        (ReplicaLoad(), 1),
        (ReplicaLoad(wait_s=0.2), 7),  # at most twice as many, less the tolerance
        (ReplicaLoad(backlog=1.5), 6),
        (ReplicaLoad(cache=1.0), 5),
        (ReplicaLoad(busy=1.0), 4),  # a busy engine adds no replica
        (ReplicaLoad(busy=0.45), 2),
    ],
)
def test_each_kind_of_load_on_four_experts(one: ReplicaLoad, count: int) -> None:
    assert evenly(one, replicas=4, sessions=1) == count


def test_sessions_alone_grow_a_tier() -> None:
    assert evenly(ReplicaLoad(), replicas=1, sessions=48 * 5 * (1 + TOLERANCE)) == 5


def test_one_long_stream_does_not_keep_four_replicas() -> None:
    count, counts = 4, list[int]()
    for _ in range(4):
        busy = [ReplicaLoad(busy=1.0), *[ReplicaLoad()] * (count - 1)]
        count = desired_replicas(busy, replicas=count, sessions=1, targets=EXPERT)
        counts.append(count)
    assert counts == [1, 1, 1, 1]


@given(
    loads=st.lists(load, max_size=20),
    starting=st.integers(1, 10),
    sessions=st.sampled_from([0.0, 1.0]),
    targets=tiers,
)
def test_starting_replicas_are_neither_removed_nor_requested_twice(
    loads: list[ReplicaLoad], starting: int, sessions: float, targets: Targets
) -> None:
    """Even if the sessions that they were started for have gone."""
    count = len(loads) + starting
    now = desired_replicas(loads, replicas=count, sessions=sessions, targets=targets)
    settled = desired_replicas(loads, replicas=len(loads), sessions=sessions, targets=targets)
    assert now == max(count, settled)


def test_a_replica_counts_once_it_has_reported_every_metric() -> None:
    metrics = {"wait_s": {"a": 1.0, "b": 2.0}, "busy": {"a": 0.5}, "backlog": {"a": 3.0}}
    assert reported_loads(metrics) == []
    assert reported_loads({**metrics, "cache": {"a": 0.25}}) == [
        ReplicaLoad(wait_s=1.0, busy=0.5, backlog=3.0, cache=0.25)
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


def test_serve_can_call_the_policy() -> None:
    policy = TierPolicy(**asdict(EXPERT))
    metrics = {name: {"r": value} for name, value in asdict(ReplicaLoad(backlog=2.0)).items()}
    assert policy(context(metrics, requests=3)) == (2, {})
    assert policy(context(metrics, requests=0)) == (0, {})
    assert policy(context({}, requests=0)) == (1, {})


def test_an_unknown_target_is_named() -> None:
    with pytest.raises(TypeError, match="latency"):
        TierPolicy(latency=1.0)
