"""Load is a mean over the time between two reads; counters end where the engine is."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict, fields, replace
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.observability.test_metrics import exposed, key
from tests.observability.test_observer import asked

from cascade.engine.stats import EngineStats
from cascade.observability.metric_specs import ENGINE
from cascade.observability.metrics import PrometheusMetrics
from cascade.replica.metrics import (
    COUNTERS,
    EngineMetrics,
    LoadTracker,
    ReplicaLoad,
    resource_counts,
)

if TYPE_CHECKING:
    from cascade.local import LocalServer

IDLE = EngineStats(
    busy=0.0,
    **{
        field.name: 0
        for field in fields(EngineStats)
        if field.name not in {"busy", "budget_tokens", "cache_tokens_capacity"}
    },
    budget_tokens=100,
    cache_tokens_capacity=1000,
)


def test_an_idle_engine_has_no_load() -> None:
    assert LoadTracker(IDLE).read(IDLE) == asdict(ReplicaLoad())


def test_load_is_a_mean_since_the_last_read() -> None:
    before = replace(IDLE, passes=10, queued_tokens=5000, waits=4, waited_s=8.0)
    now = replace(before, passes=14, queued_tokens=6000, waits=6, waited_s=8.5)
    now = replace(now, busy=0.5, cache_tokens_live=250)
    tracker = LoadTracker(before)
    expected = ReplicaLoad(wait_s=0.25, busy=0.5, backlog=2.5, cache=0.25)
    assert tracker.read(now) == asdict(expected)
    assert tracker.read(now) == asdict(replace(expected, wait_s=0.0, backlog=0.0))
    assert all(isinstance(value, float) for value in tracker.read(now).values())


@given(growths=st.lists(st.integers(0, 50), min_size=1))
def test_counters_equal_the_engines_however_often_they_are_reported(growths: list[int]) -> None:
    backend, passes = PrometheusMetrics(ENGINE), 0
    metrics = EngineMetrics(backend, tier="expert")
    for more in growths:
        passes += more
        metrics.report(replace(IDLE, passes=passes), leases=0)
    name = key("cascade_engine_passes_total", tier="expert")
    assert exposed(backend.registry).get(name, 0) == passes


def test_every_part_of_the_cache_is_exported() -> None:
    backend = PrometheusMetrics(ENGINE)
    now = replace(IDLE, cache_tokens_live=300, cache_tokens_used=500)
    EngineMetrics(backend, tier="drafter").report(now, leases=3)
    found = exposed(backend.registry)
    states = {"live": 300, "idle": 200, "free": 500}
    for state, count in states.items():
        assert found[key("cascade_engine_cache_tokens", tier="drafter", state=state)] == count
    assert found[key("cascade_engine_leases", tier="drafter")] == 3


def test_each_counter_is_a_field_of_the_stats() -> None:
    assert {name for _, name in COUNTERS} <= {field.name for field in fields(EngineStats)}


async def test_a_real_expert_reports_its_work(toy_stack: LocalServer) -> None:
    before = toy_stack.expert.engine.stats()
    tracker, backend = LoadTracker(before), PrometheusMetrics(ENGINE)
    async for _ in toy_stack.router.generate(asked(max_tokens=20)):
        pass
    after = toy_stack.expert.engine.stats()
    EngineMetrics(backend, tier="expert").report(after, leases=0)
    read = tracker.read(after)
    assert read["wait_s"] > 0
    assert 0 < read["backlog"] < 1
    assert 0 < read["busy"] <= 1
    assert exposed(backend.registry)[key("cascade_engine_tokens_total", tier="expert")] == (
        pytest.approx(after.tokens)
    )


async def test_a_task_counts_until_it_ends() -> None:
    before = resource_counts(leases=2)
    assert before["pid"] == os.getpid()
    assert before["leases"] == 2
    task = asyncio.create_task(asyncio.Event().wait())
    assert resource_counts()["tasks"] == before["tasks"] + 1
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert resource_counts()["tasks"] == before["tasks"]
