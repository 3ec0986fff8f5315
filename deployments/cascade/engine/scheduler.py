"""Which waiting steps the next forward pass runs, and how much of each.

Blocks to decode or verify go first; what is left of the token budget is shared by long prefills, so
neither stalls the other. Where blocks leave nothing for some passes, one prefill a pass goes before
them, so none starves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from cascade.engine.kv_cache import CachedSequence
    from cascade.engine.request import ForwardRequest
    from cascade.types import SessionId

_SHORT = 64  # tokens up to which a step is a block rather than a prefill
_PATIENCE = 4  # passes without a token after which a step goes first
_LEAST_SHARE = 64  # tokens of a prefill below which a pass is not worth its overhead


@dataclass(slots=True, kw_only=True, eq=False)
class ScheduledStep:
    """A step on its way; its sequence already has the step's tokens."""

    step: ForwardRequest
    sequence: CachedSequence
    number: int  # order of arrival
    whole: bool = False  # must run in one pass from the first token
    prefill: bool = False  # came with more tokens than a block has
    delivered: int = 0  # rows that the head has had
    passed_over: int = 0

    @property
    def end(self) -> int:
        """Return the length of the sequence when the step is done."""
        return len(self.sequence.tokens)

    @property
    def remaining(self) -> int:
        """Return the tokens that are still to run."""
        return self.end - self.sequence.cached

    @property
    def long(self) -> bool:
        """Whether this is a prefill, be it the end of one, rather than a block."""
        return self.prefill or self.remaining > _SHORT

    @property
    def starves(self) -> bool:
        """Whether it has waited for longer than is fair."""
        return self.passed_over >= _PATIENCE


@dataclass(frozen=True, slots=True, kw_only=True)
class StepChunk:
    """The next `count` tokens of a job."""

    job: ScheduledStep
    count: int


class Scheduler:
    """The waiting steps, at most one per session."""

    def __init__(self, *, budget: int) -> None:
        self._budget = budget
        self._jobs: dict[SessionId, ScheduledStep] = {}
        self._number = 0

    def __len__(self) -> int:
        return len(self._jobs)

    def __iter__(self) -> Iterator[ScheduledStep]:
        return iter(self._jobs.values())

    def find(self, session: SessionId | None) -> ScheduledStep | None:
        """Return the waiting step of `session`."""
        return None if session is None else self._jobs.get(session)

    def add(
        self, step: ForwardRequest, *, sequence: CachedSequence, whole: bool = False
    ) -> ScheduledStep:
        """Queue a step whose tokens are already in `sequence`."""
        assert step.session not in self._jobs, "a session has one step at a time"
        self._number += 1
        job = ScheduledStep(step=step, sequence=sequence, number=self._number, whole=whole)
        job.prefill = job.remaining > _SHORT
        self._jobs[step.session] = job
        return job

    def remove(self, session: SessionId) -> ScheduledStep | None:
        """Forget the step of `session`, done or not."""
        return self._jobs.pop(session, None)

    def rename(self, session: SessionId, *, to: SessionId) -> None:
        """Let the step of `session`, if it has one, go on under another name."""
        job = self._jobs.pop(session, None)
        if job is not None:
            job.step.session = to
            self._jobs[to] = job

    def plan(self, *, reserve: Callable[[ScheduledStep], bool]) -> list[StepChunk]:
        """Return what the next pass runs: at most the budget, unless one whole step exceeds it.

        Args:
            reserve: gives a job room in the cache; where it cannot, the job waits.
        """
        slices: list[StepChunk] = []
        room = self._budget
        jobs = self._order()
        prefills = sum(job.long for job in jobs)
        blocks = sum(job.remaining for job in jobs if not job.long)
        for job in jobs:
            share = max(_LEAST_SHARE, room // max(prefills, 1))
            if room - blocks >= _LEAST_SHARE:
                share = min(share, room - blocks) if job.long else share
            prefills -= job.long
            blocks -= 0 if job.long else job.remaining
            count = self._take(job, room=room, share=share)
            if not count or not reserve(job):
                continue
            # Making room may have dropped the job's own rows.
            count = self._take(job, room=room, share=share)
            if count:
                slices.append(StepChunk(job=job, count=count))
                room = max(0, room - count)
        # A crumb left over by blocks does not count: prefills would live on crumbs under load.
        least = min(_LEAST_SHARE, self._budget)
        self._age(
            {piece.job.number for piece in slices if piece.count >= min(least, piece.job.remaining)}
        )
        return slices

    def _order(self) -> list[ScheduledStep]:
        """Return the jobs in the order of their turns.

        Of the prefills that starve only one a pass goes before the blocks: many prompts at once
        must not hold up every verdict.
        """
        long = [job for job in self._jobs.values() if job.long and job.starves]
        first = max(long, key=_patience_lost, default=None)
        return sorted(self._jobs.values(), key=lambda job: (_rank(job, first=first), job.number))

    def _take(self, job: ScheduledStep, *, room: int, share: int) -> int:
        """Return how many tokens of `job` run; rows that fit a pass are not split."""
        most = min(room, share)
        if job.whole:
            return job.remaining if room == self._budget or job.remaining <= room else 0
        if job.remaining <= min(room, max(share, _SHORT)):
            return job.remaining
        fill = job.remaining - job.step.num_logits
        if job.sequence.cached < job.end - job.step.num_logits:
            return min(fill, most)
        if job.step.num_logits > self._budget:
            return min(job.remaining, most)
        return job.remaining if job.remaining <= room else 0

    def _age(self, served: set[int]) -> None:
        for job in self._jobs.values():
            job.passed_over = 0 if job.number in served else job.passed_over + 1


def _patience_lost(job: ScheduledStep) -> tuple[int, int]:
    return job.passed_over, -job.number


def _rank(job: ScheduledStep, *, first: ScheduledStep | None) -> int:
    if job is first:
        return 0 if job.whole else 2
    if job.long:
        return 4
    return 1 if job.starves else 3
