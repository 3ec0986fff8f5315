"""Which drafters are worth asking: one whose tokens are all refused is left alone for a while.

The sum of log-likelihood ratios of "hardly any token stands" to "a fair share does" grows with each
token that is refused and shrinks with each that stands, but never below 0 (Page's CUSUM, 1954). It
finds a collapse within some thirty tokens, of all sessions together, and next to never sees one
where a tenth of the tokens stand.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from dataclasses import dataclass
from math import log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

COLLAPSED, FAIR = 0.02, 0.3  # shares of drafted tokens that stand

STANDS = log(COLLAPSED / FAIR)

REFUSED = log((1 - COLLAPSED) / (1 - FAIR))

LIMIT = 10.0

FIRST_BAN_S, LONGEST_BAN_S = 10.0, 300.0

ACQUITTED = 30  # tokens that stood since the last ban

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Record:
    doubt: float = 0.0
    stood: int = 0  # tokens since the last ban
    ban_s: float = 0.0  # how long that lasted
    until_s: float = 0.0

    def trip(self, *, now_s: float) -> None:
        """Ban the drafter, for twice as long as the last time unless it did well since."""
        longer_s = 2 * self.ban_s if self.stood < ACQUITTED else 0.0
        self.ban_s = min(max(FIRST_BAN_S, longer_s), LONGEST_BAN_S)
        self.doubt, self.stood = 0.0, 0
        self.until_s = now_s + self.ban_s


class CircuitBreaker:
    """What a router thinks of each drafter by its address."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._records: defaultdict[str, _Record] = defaultdict(_Record)

    def record(self, address: str, *, drafted: int, accepted: int) -> None:
        """Hear how many tokens of a block stood; those after the first refused one say nothing."""
        record, now_s = self._records[address], self._clock()
        refused = accepted < drafted
        record.doubt = max(0.0, record.doubt + accepted * STANDS + refused * REFUSED)
        record.stood += accepted
        if record.doubt > LIMIT and now_s >= record.until_s:
            record.trip(now_s=now_s)
            logger.warning(
                "The drafter at %s is not asked for %g s: the expert refuses all it drafts. "
                "Is it the expert's pair?",
                address,
                record.ban_s,
            )

    def is_open(self, address: str) -> bool:
        """Return whether the drafter should not be asked now."""
        record = self._records.get(address)
        return record is not None and self._clock() < record.until_s
