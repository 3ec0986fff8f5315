"""Who loses rows of the cache to the steps of one plan."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cascade.engine.kv_cache import CachedSequence, KVCacheManager
    from cascade.engine.scheduler import ScheduledStep, Scheduler


@dataclass(slots=True, kw_only=True)
class Preemptor:
    """Makes room for steps one by one; what was reserved stays while the plan is made."""

    store: KVCacheManager
    scheduler: Scheduler
    stunted: list[ScheduledStep] = field(
        default_factory=list["ScheduledStep"]
    )  # branches that found none
    _reserved: set[CachedSequence] = field(default_factory=set["CachedSequence"])

    def reserve(self, job: ScheduledStep) -> bool:
        """Give a step room; False where it has to wait, or to be given up because it is stunted."""
        sequence = job.sequence
        if sequence.trunk is not None and not self._keeps(job):
            self.stunted.append(job)
            return False
        if not self.store.reserve(sequence, tokens=job.end, victims=self._victims(job)):
            return False
        self._reserved.add(sequence)
        return True

    def _keeps(self, branch: ScheduledStep) -> bool:
        """Return whether a branch has its rows still, and room that no session has to give up."""
        if branch.sequence.extent is None:
            return False
        return self.store.reserve(branch.sequence, tokens=branch.end, victims=())

    def _victims(self, job: ScheduledStep) -> Iterator[CachedSequence]:
        """Yield sequences that may lose their rows for `job`: resting ones, then younger steps'."""
        for sequence in self.store.least_recent():
            waiting = self.scheduler.find(sequence.session)
            if waiting is None and sequence not in self._reserved:
                yield sequence
        for other in sorted(self.scheduler, key=_number, reverse=True):
            if other.number > job.number and other.sequence not in self._reserved:
                yield other.sequence


def _number(job: ScheduledStep) -> int:
    return job.number
