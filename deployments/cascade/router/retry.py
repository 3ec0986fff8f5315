"""What becomes of a session whose tier has failed it: when to ask again, when to give the tier up.

Pure: a `Standing` is told what happened and when. All sessions follow it on both tiers, whatever
went wrong: a death, a downscale, an eviction, a preemption or a drafter that nobody should trust.

| event | the replica's place | asked again |
|---|---|---|
| `LOST`: its stream broke or fell silent, or its lease ended | left | after a pause |
| `FULL`: it, or the whole tier, has no room | left | after a pause |
| `BROKEN`: its passes fail | left | after a pause, not often |
| `COLLAPSED`: what it drafts is refused | left | after a pause |
| `LATE`: a draft came after its deadline | kept | after a pause, unless it answers before |
| an answer | kept | at once: all is forgotten |

A session that cannot do without the tier waits for the pause to end, until it is `given_up`; one
without a drafter goes on with the expert alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum

STAY_S = 2.0  # after which a replica that lives counts as one that was there

MOST_BREAKDOWNS = 3  # passes of one session that fail; the session itself may be what breaks them


class Failure(StrEnum):
    """How a replica failed a session."""

    LOST = "lost"
    FULL = "full"
    BROKEN = "broken"
    COLLAPSED = "collapsed"
    LATE = "late"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a session bears with a tier, in seconds."""

    # The first move is free: only those after it need the time in which a death becomes known.
    pauses_s: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 1.0)  # the last repeats
    entry_s: float = 2.0  # without the tier since the session began, until it is given up
    loss_s: float = 30.0  # without the tier since its last answer
    reply_timeout_s: float = (
        2.0  # for an answer, until it is asked for again: twice as long each time
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryState:
    """How a session stands with a tier: failures since the last answer, and what follows."""

    served: bool = False  # the tier has answered before
    failures: int = 0
    breakdowns: int = 0
    last: Failure | None = None
    since_s: float = 0.0  # the first of the failures
    resume_s: float = 0.0  # when the tier may be asked again

    @property
    def late(self) -> bool:
        """Whether an answer is awaited that came too late."""
        return self.last is Failure.LATE

    def after_failure(
        self, failure: Failure, patience: RetryPolicy, *, now_s: float, since_s: float | None = None
    ) -> RetryState:
        """Return how things stand after a failure, which began earlier if `since_s` says so."""
        pauses_s = patience.pauses_s
        return replace(
            self,
            failures=self.failures + 1,
            breakdowns=self.breakdowns + (failure is Failure.BROKEN),
            last=failure,
            since_s=self.since_s if self.failures else now_s if since_s is None else since_s,
            resume_s=now_s + pauses_s[min(self.failures, len(pauses_s) - 1)],
        )

    def after_stay(self) -> RetryState:
        """Return how things stand where a replica lived for a while, though it gave no answer."""
        return replace(self, failures=0)

    def given_up(self, patience: RetryPolicy) -> bool:
        """Return whether a session that needs the tier ends here.

        One that has not begun is told at once that all is full: it has stood in the queue already.
        """
        if self.last is Failure.FULL and not self.served:
            return True
        longest_s = patience.loss_s if self.served else patience.entry_s
        late = self.resume_s - self.since_s > longest_s
        return self.failures > 0 and (late or self.breakdowns >= MOST_BREAKDOWNS)


SERVED = RetryState(served=True)

"""After an answer."""
