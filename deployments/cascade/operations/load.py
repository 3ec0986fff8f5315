"""How loaded a replica was between two looks at its engine."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascade.engine.stats import EngineStats


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
