"""A circuit breaker per drafter: one whose tokens are all rejected is not asked for a while.

It sums log-likelihood ratios of "hardly any token is accepted" to "a fair share is accepted". The
sum grows with each rejected token, shrinks with each accepted one, and never falls below 0 (the
CUSUM test of Page, 1954). It detects a collapse within about thirty tokens of all sessions, and
almost never where a tenth of the tokens are accepted.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

COLLAPSED_RATE, FAIR_RATE = 0.02, 0.3  # acceptance rates of the two hypotheses
ACCEPTED_SCORE = log(COLLAPSED_RATE / FAIR_RATE)
REJECTED_SCORE = log((1 - COLLAPSED_RATE) / (1 - FAIR_RATE))
TRIP_SCORE = 10.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 10.0, 300.0
RECOVERED_TOKENS = 30  # accepted since the last trip: the next pause is the first one again

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Breaker:
    score: float = 0.0
    accepted: int = 0  # tokens since the last trip
    pause_s: float = 0.0  # the last pause
    open_until_s: float = 0.0

    def trip(self, *, now_s: float) -> None:
        """Open for twice as long as the last time, unless the drafter has recovered since."""
        longer_s = 2 * self.pause_s if self.accepted < RECOVERED_TOKENS else 0.0
        self.pause_s = min(max(FIRST_PAUSE_S, longer_s), LONGEST_PAUSE_S)
        self.score, self.accepted = 0.0, 0
        self.open_until_s = now_s + self.pause_s


class CircuitBreaker:
    """The breakers of all drafters that a router has asked, by address."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._breakers: defaultdict[str, _Breaker] = defaultdict(_Breaker)

    def record(self, address: str, *, drafted: int, accepted: int) -> None:
        """Record one verified block.

        Args:
            address: Of the drafter.
            drafted: Tokens in the block. Those after the first rejected one are not evidence.
            accepted: Tokens accepted, 0 to `drafted`.
        """
        breaker, now_s = self._breakers[address], self._clock()
        rejected = accepted < drafted
        change = accepted * ACCEPTED_SCORE + rejected * REJECTED_SCORE
        breaker.score = max(0.0, breaker.score + change)
        breaker.accepted += accepted
        if breaker.score > TRIP_SCORE and now_s >= breaker.open_until_s:
            breaker.trip(now_s=now_s)
            logger.warning(
                "The expert rejects all tokens of the drafter at %s; it is not asked for %g s. "
                "Check that the two models are a pair.",
                address,
                breaker.pause_s,
            )

    def is_open(self, address: str) -> bool:
        """Return whether the drafter should not be asked now."""
        breaker = self._breakers.get(address)
        return breaker is not None and self._clock() < breaker.open_until_s
