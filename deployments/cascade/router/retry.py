"""When a session asks a tier again after a failure, and when it gives the tier up.

Pure functions over immutable values: a `RetryState` is given each failure and the time. Sessions of
both tiers use it for every kind of failure.

| failure | the session on the replica | asked again |
|---|---|---|
| `LOST`: the stream broke or went silent, or the lease ended | closed | after a pause |
| `FULL`: the replica or the whole tier has no room | closed | after a pause |
| `BROKEN`: its forward passes fail | closed | after a pause, a few times only |
| `COLLAPSED`: the circuit breaker of the drafter is open | closed | after a pause |
| `LATE`: a draft missed its deadline | kept | after a pause, or when the late draft arrives |
| `CONTEXT`: the answer is too long for the drafter | closed | never |
| none: a reply came | kept | at once; earlier failures are forgotten |

A session that needs the tier waits for the pause to end, until `given_up`. A session without a
drafter goes on with the expert alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum

STAY_S = 2.0  # a replica that was reachable for longer resets the count of failures
MAX_BREAKDOWNS = 3  # failed passes of one session, which may itself be what makes them fail


class Failure(StrEnum):
    """How a replica failed a session."""

    LOST = "lost"
    FULL = "full"
    BROKEN = "broken"
    COLLAPSED = "collapsed"
    LATE = "late"
    CONTEXT = "context"


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryPolicy:
    """How long a session waits for a tier, in seconds."""

    # The first retry is immediate: only later ones need the time in which a death becomes known.
    pauses_s: tuple[float, ...] = (0.0, 0.1, 0.2, 0.4, 1.0)  # the last one repeats
    entry_s: float = 2.0  # without the tier since the session began, until it is given up
    loss_s: float = 30.0  # without the tier since its last reply, until it is given up
    lease_s: float = 8.0  # for room on a tier that is full, before the session begins
    reply_timeout_s: float = 2.0  # until a message is sent again; doubles each time
    deadline_s: float | None = None  # of one attempt, for a tier that the session can do without
    queues: bool = False  # a session that has not begun waits for room too

    @property
    def required(self) -> bool:
        """Whether the session needs the tier and retries until it is given up."""
        return self.deadline_s is None


@dataclass(frozen=True, slots=True, kw_only=True)
class RetryState:
    """The failures of a tier since its last reply to a session."""

    served: bool = False  # the tier has replied before
    failures: int = 0
    breakdowns: int = 0
    last: Failure | None = None
    since_s: float = 0.0  # time of the first failure; before any reply, of the first attempt
    resume_s: float = 0.0  # when the tier may be asked again

    @property
    def late(self) -> bool:
        """Whether a reply that missed its deadline is still expected."""
        return self.last is Failure.LATE

    def after_failure(
        self, failure: Failure, policy: RetryPolicy, *, now_s: float, since_s: float | None = None
    ) -> RetryState:
        """Return the state after one more failure.

        Args:
            failure: What happened.
            policy: Gives the pause that follows.
            now_s: The present time, in seconds of any one clock.
            since_s: When the failed attempt began, if before `now_s`; of a session that has begun.
        """
        pauses_s, first_s = policy.pauses_s, now_s if since_s is None else since_s
        pause_s = pauses_s[min(self.failures, len(pauses_s) - 1)]
        return replace(
            self,
            failures=self.failures + 1,
            breakdowns=self.breakdowns + (failure is Failure.BROKEN),
            last=failure,
            since_s=self.since_s if self.failures or not self.served else first_s,
            resume_s=math.inf if failure is Failure.CONTEXT else now_s + pause_s,
        )

    def after_stay(self, *, now_s: float) -> RetryState:
        """Return the state after a replica was reachable for a while, though it never replied."""
        return replace(self, failures=0, since_s=now_s)

    def give_up_s(self, policy: RetryPolicy) -> float:
        """Return the time at which a session that needs the tier fails without it."""
        if self.served:
            return self.since_s + policy.loss_s if self.failures else math.inf
        return self.since_s + policy.entry_s

    def given_up(self, policy: RetryPolicy) -> bool:
        """Return whether a session that needs the tier fails now.

        A session that has not begun fails at once if the tier is full, since it has queued already,
        unless the policy says otherwise.
        """
        if self.last is Failure.FULL and not self.served and not policy.queues:
            return True
        expired = self.resume_s >= self.give_up_s(policy)
        return self.failures > 0 and (expired or self.breakdowns >= MAX_BREAKDOWNS)


SERVED = RetryState(served=True)
"""The state after a reply."""
