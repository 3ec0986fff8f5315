"""What an engine does, as metrics."""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What a replica tells the autoscaler. All are means over the time between two looks."""

    wait_s: float = 0.0  # of a question, until its first pass
    busy: float = 0.0  # share of the time spent in passes
    backlog: float = 0.0  # passes that the waiting tokens fill
    cache: float = 0.0  # share of the cache that open sessions hold


def between(before: EngineStats, now: EngineStats) -> Load:
    """Return the load since `before`, an earlier look at the same engine."""
    passes, waits = now.passes - before.passes, now.waits - before.waits
    queued = (now.queued_tokens - before.queued_tokens) / passes if passes else 0.0
    return Load(
        wait_s=(now.waited_s - before.waited_s) / waits if waits else 0.0,
        busy=now.busy,
        backlog=queued / now.budget_tokens,
        cache=now.cache_tokens_live / now.cache_tokens_capacity,
    )


class LoadMeter:
    """Remembers the last look, for one reader."""

    def __init__(self, stats: EngineStats) -> None:
        self._before = stats

    def read(self, stats: EngineStats) -> dict[str, float]:
        """Return the load since the last read, as Serve's autoscaler takes it."""
        before, self._before = self._before, stats
        return asdict(between(before, stats))


def resource_counts(**held: int) -> dict[str, int]:
    """Return the process id, the tasks of the running event loop, and what else is held."""
    return {"pid": os.getpid(), "tasks": len(asyncio.all_tasks()), **held}


PERIOD_S = 2.0

COUNTED: tuple[tuple[MetricSpec, str], ...] = (
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


async def keep_reporting(replica: Replica[Any], sink: MetricBackend) -> None:
    """Report what a replica does every two seconds, until cancelled."""
    metrics = EngineMetrics(sink, tier=replica.kind.name)
    while True:
        metrics.report(replica.engine.stats(), leases=len(replica.leases))
        await asyncio.sleep(PERIOD_S)


class EngineMetrics:
    """Puts an engine's figures into a sink."""

    def __init__(self, sink: MetricBackend, *, tier: str) -> None:
        self._sink = sink
        self._tier = tier
        self._known: dict[str, float] = {}

    def report(self, stats: EngineStats, *, leases: int) -> None:
        """Report what is new and what is now."""
        for family, name in COUNTED:
            total = getattr(stats, name)
            fresh = total - self._known.get(name, 0)
            if fresh > 0:
                self._known[name] = total
                self._sink.add(family, fresh, self._tier)
        self._gauges(stats, leases)

    def _gauges(self, stats: EngineStats, leases: int) -> None:
        idle = stats.cache_tokens_used - stats.cache_tokens_live
        free = stats.cache_tokens_capacity - stats.cache_tokens_used
        set_, tier = self._sink.set, self._tier
        set_(metric_specs.ENGINE_BUSY, stats.busy, tier)
        set_(metric_specs.ENGINE_WAITING, stats.waiting, tier)
        set_(metric_specs.ENGINE_SESSIONS, stats.sessions, tier)
        set_(metric_specs.ENGINE_LEASES, leases, tier)
        set_(metric_specs.ENGINE_BUDGET, stats.budget_tokens, tier)
        set_(metric_specs.CACHE_TOKENS, stats.cache_tokens_live, tier, "live")
        set_(metric_specs.CACHE_TOKENS, max(idle, 0), tier, "idle")
        set_(metric_specs.CACHE_TOKENS, max(free, 0), tier, "free")
