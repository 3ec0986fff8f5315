"""A circuit breaker per drafter and rule: where all drafts are rejected, hardly any are asked for.

It sums log-likelihood ratios of "hardly any token is accepted" to "a fair share is accepted". The
sum grows with each rejected token, shrinks with each accepted one, and never falls below 0 (the
CUSUM test of Page, 1954). It almost never opens where a tenth of the tokens are accepted.

What one caller repeats must not take the drafter from the others. So a rejected token counts only
beyond the first of its answer, and a prompt counts for a few tokens, however often it is sent. An
open breaker lets two answers a second draft a few blocks, and the next one at once while tokens are
accepted, and so closes by itself within seconds.
"""

from __future__ import annotations

import logging
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from math import log
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.rules import Rule
    from cascade.types import Session, Verdict

COLLAPSED_RATE, FAIR_RATE = 0.02, 0.3  # acceptance rates of the two hypotheses
ACCEPTED_SCORE = log(COLLAPSED_RATE / FAIR_RATE)
REJECTED_SCORE = log((1 - COLLAPSED_RATE) / (1 - FAIR_RATE))
OPEN_SCORE = 10.0
CLOSE_SCORE = 5.0  # two accepted tokens below the score at which it opens
PROMPT_TOKENS = 6  # rejected tokens of one prompt that count, so that it takes five prompts to open
PROBE_PERIOD_S = 0.5
ALLOWED_BLOCKS = 4  # of an answer, since its first block may well be rejected
MAX_BREAKERS = 1024  # callers choose the parameters of rules

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Breaker:
    score: float = 0.0
    prompts: Counter[int] = field(default_factory=Counter[int])  # rejected tokens of each
    open: bool = False
    probe_s: float = 0.0  # while open, when the next answer may draft


class CircuitBreaker:
    """The breakers of all drafters that a router has asked, by address and rule."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._breakers: OrderedDict[tuple[str, Rule], _Breaker] = OrderedDict()

    def record(self, address: str, session: Session, verdict: Verdict, *, prompt: int) -> None:
        """Record one verified block.

        Args:
            address: Of the drafter.
            session: What the block followed.
            verdict: On the block.
            prompt: A hash of the session's prompt.
        """
        rule, accepted = session.rule, verdict.accepted
        breaker = self._breakers.setdefault((address, rule), _Breaker())
        self._breakers.move_to_end((address, rule))
        if len(self._breakers) > MAX_BREAKERS:
            self._breakers.popitem(last=False)
        rejected = verdict.judged > accepted and session.position + accepted > 0
        if rejected and not breaker.open:
            breaker.prompts[prompt] += 1
            rejected = breaker.prompts[prompt] <= PROMPT_TOKENS
        score = breaker.score + accepted * ACCEPTED_SCORE + rejected * REJECTED_SCORE
        breaker.score = min(max(0.0, score), OPEN_SCORE)
        if breaker.open and accepted:
            breaker.probe_s = self._clock()
        if breaker.open and breaker.score <= CLOSE_SCORE:
            breaker.open, breaker.score = False, 0.0
            logger.warning("The expert accepts drafts of %s again under %s.", address, rule)
        elif breaker.score == OPEN_SCORE and not breaker.open:
            breaker.open = True
            logger.warning(
                "The expert rejects all tokens of the drafter at %s under %s; an answer "
                "drafts with it every %g s only. Check that the two models are a pair.",
                *(address, rule, PROBE_PERIOD_S),
            )
        if breaker.open or not breaker.score:
            breaker.prompts.clear()

    def allows(self, address: str, rule: Rule) -> bool:
        """Return whether an answer may ask the drafter for its next `ALLOWED_BLOCKS`."""
        breaker = self._breakers.get((address, rule))
        if breaker is None or not breaker.open:
            return True
        if self._clock() < breaker.probe_s:
            return False
        breaker.probe_s = self._clock() + PROBE_PERIOD_S
        return True

    def suspects(self) -> Counter[str]:
        """Return how many breakers are open, by the kind of their rule."""
        return Counter(rule.kind for (_, rule), one in self._breakers.items() if one.open)
