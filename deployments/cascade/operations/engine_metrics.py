"""What an engine does, as metrics."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cascade.operations import families

if TYPE_CHECKING:
    from cascade.engine.stats import EngineStats
    from cascade.operations.families import Family
    from cascade.operations.metrics import Sink
    from cascade.operations.replica import Replica

PERIOD_S = 2.0

COUNTED: tuple[tuple[Family, str], ...] = (
    (families.ENGINE_PASSES, "passes"),
    (families.ENGINE_TOKENS, "tokens"),
    (families.ENGINE_TURNS, "turns"),
    (families.ENGINE_WAITS, "waits"),
    (families.ENGINE_WAITED_S, "waited_s"),
    (families.ENGINE_QUEUED_TOKENS, "queued_tokens"),
    (families.ENGINE_PREFIX_HITS, "prefix_hits"),
    (families.ENGINE_PREFIX_TOKENS, "prefix_tokens"),
    (families.ENGINE_PREEMPTIONS, "preemptions"),
)


async def keep_reporting(replica: Replica[Any], sink: Sink) -> None:
    """Report what a replica does every two seconds, until cancelled."""
    metrics = EngineMetrics(sink, tier=replica.kind.name)
    while True:
        metrics.report(replica.engine.stats(), leases=len(replica.leases))
        await asyncio.sleep(PERIOD_S)


class EngineMetrics:
    """Puts an engine's figures into a sink."""

    def __init__(self, sink: Sink, *, tier: str) -> None:
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
        set_(families.ENGINE_BUSY, stats.busy, tier)
        set_(families.ENGINE_WAITING, stats.waiting, tier)
        set_(families.ENGINE_SESSIONS, stats.sessions, tier)
        set_(families.ENGINE_LEASES, leases, tier)
        set_(families.ENGINE_BUDGET, stats.budget_tokens, tier)
        set_(families.CACHE_TOKENS, stats.cache_tokens_live, tier, "live")
        set_(families.CACHE_TOKENS, max(idle, 0), tier, "idle")
        set_(families.CACHE_TOKENS, max(free, 0), tier, "free")
