"""What an engine does: as load for the autoscaler, and as metrics."""

from __future__ import annotations

import asyncio
import os
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from cascade.observability import metric_specs

if TYPE_CHECKING:
    from cascade.engine.stats import EngineStats
    from cascade.observability.metric_specs import MetricSpec
    from cascade.observability.metrics import MetricBackend
    from cascade.replica.replica import Replica

REPORT_INTERVAL_S = 2.0

COUNTERS: tuple[tuple[MetricSpec, str], ...] = (
    (metric_specs.ENGINE_PASSES, "passes"),
    (metric_specs.ENGINE_TOKENS, "tokens"),
    (metric_specs.ENGINE_TURNS, "turns"),
    (metric_specs.ENGINE_WAITS, "waits"),
    (metric_specs.ENGINE_WAITED_S, "waited_s"),
    (metric_specs.ENGINE_QUEUED_TOKENS, "queued_tokens"),
    (metric_specs.ENGINE_PREFIX_HITS, "prefix_hits"),
    (metric_specs.ENGINE_PREFIX_TOKENS, "prefix_tokens"),
    (metric_specs.ENGINE_PREEMPTIONS, "preemptions"),
)
"""Each counter, and the field of `EngineStats` that it exports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """What a replica reports to the autoscaler: means over the time since its last report."""

    wait_s: float = 0.0  # from a request to its first forward pass
    busy: float = 0.0  # share of the time spent in passes
    backlog: float = 0.0  # passes that the queued tokens fill
    cache: float = 0.0  # share of the KV cache that open sessions hold


class LoadTracker:
    """Measures load between reads, for one reader."""

    def __init__(self, stats: EngineStats) -> None:
        self._last = stats

    def read(self, stats: EngineStats) -> dict[str, float]:
        """Return the load since the last read, as Serve's autoscaler takes it."""
        last, self._last = self._last, stats
        passes, waits = stats.passes - last.passes, stats.waits - last.waits
        queued = (stats.queued_tokens - last.queued_tokens) / passes if passes else 0.0
        load = ReplicaLoad(
            wait_s=(stats.waited_s - last.waited_s) / waits if waits else 0.0,
            busy=stats.busy,
            backlog=queued / stats.budget_tokens,
            cache=stats.cache_tokens_live / stats.cache_tokens_capacity,
        )
        return asdict(load)


def resource_counts(**held: int) -> dict[str, int]:
    """Return the process id, the number of tasks on the event loop, and what else is held."""
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), **held}


async def keep_reporting(replica: Replica[Any], backend: MetricBackend) -> None:
    """Export the metrics of a replica every two seconds, until cancelled."""
    metrics = EngineMetrics(backend, tier=replica.kind.name)
    while True:
        metrics.report(replica.engine.stats(), leases=len(replica.leases))
        await asyncio.sleep(REPORT_INTERVAL_S)


class EngineMetrics:
    """Exports the statistics of one engine."""

    def __init__(self, backend: MetricBackend, *, tier: str) -> None:
        self._backend = backend
        self._tier = tier
        self._reported: dict[str, float] = {}

    def report(self, stats: EngineStats, *, leases: int) -> None:
        """Add what counters have grown by, and set the gauges."""
        for spec, name in COUNTERS:
            total = getattr(stats, name)
            growth = total - self._reported.get(name, 0)
            if growth > 0:
                self._reported[name] = total
                self._backend.add(spec, growth, self._tier)
        idle = stats.cache_tokens_used - stats.cache_tokens_live
        free = stats.cache_tokens_capacity - stats.cache_tokens_used
        set_gauge, tier = self._backend.set, self._tier
        set_gauge(metric_specs.ENGINE_BUSY, stats.busy, tier)
        set_gauge(metric_specs.ENGINE_WAITING, stats.waiting, tier)
        set_gauge(metric_specs.ENGINE_SESSIONS, stats.sessions, tier)
        set_gauge(metric_specs.ENGINE_LEASES, leases, tier)
        set_gauge(metric_specs.ENGINE_BUDGET, stats.budget_tokens, tier)
        set_gauge(metric_specs.CACHE_TOKENS, stats.cache_tokens_live, tier, "live")
        set_gauge(metric_specs.CACHE_TOKENS, max(idle, 0), tier, "idle")
        set_gauge(metric_specs.CACHE_TOKENS, max(free, 0), tier, "free")
