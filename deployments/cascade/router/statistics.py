"""What an answer cost, written down round by round."""

from __future__ import annotations

import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cascade.speculation.cost_model import RoundSample
from cascade.types import Origin, Round, Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from cascade.router.drafters import Draft
    from cascade.router.verifiers import VerifyResult
    from cascade.types import Session, Verdict


class RoundRecorder:
    """Fills one `Statistics`; `trace` keeps a `Round` for each block.

    `draft_s` and `judge_s` are the last round's waits, in seconds.
    """

    def __init__(
        self,
        statistics: Statistics,
        *,
        trace: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.statistics = statistics
        self._trace = trace
        self._clock = clock
        self.draft_s = 0.0
        self.judge_s = 0.0

    @contextmanager
    def time_draft(self) -> Generator[None]:
        """Time the wait for a block."""
        began_s = self._clock()
        try:
            yield
        finally:
            self.draft_s = self._clock() - began_s
            self.statistics.drafter_s += self.draft_s

    @contextmanager
    def time_verify(self) -> Generator[None]:
        """Time the wait for a verdict."""
        began_s = self._clock()
        try:
            yield
        finally:
            self.judge_s = self._clock() - began_s
            self.statistics.expert_s += self.judge_s

    def sample(self, offer: Draft, judged: VerifyResult) -> RoundSample:
        """Return what the last round teaches of draft lengths; a client's words teach nothing."""
        return RoundSample(
            drafted=0 if offer.predicted else offer.block.length,
            accepted=judged.verdict.accepted,
            draft_s=self.draft_s,
            judge_s=self.judge_s,
            draft=offer.timing,
            judge=judged.timing,
        )

    def record(
        self,
        before: Session,
        after: Session,
        offer: Draft,
        verdict: Verdict,
        *,
        reason: str,
    ) -> None:
        """Write down one round: from session `before` to session `after`."""
        entry = self.statistics
        length = offer.block.length
        fresh = after.origins[before.position :]
        accepted = min(verdict.accepted, len(fresh))
        entry.rounds += 1
        entry.draft_length_reason = reason
        entry.drafted += length
        entry.accepted += accepted
        entry.judged += verdict.judged
        entry.deferred += verdict.deferred
        entry.branched_rounds += offer.branched
        entry.drafter_passes += offer.passes
        entry.drafter_tokens += fresh.count(Origin.DRAFTER)
        entry.kept_tokens += fresh.count(Origin.KEPT)
        entry.expert_tokens += fresh.count(Origin.EXPERT)
        if offer.predicted:
            entry.predicted_accepted += accepted
            entry.predicted_rejected += length - accepted
        if length:
            _count(entry.accepted_lengths, accepted, upto=length)
        if self._trace:
            entry.trace.append(
                Round(
                    position=before.position,
                    drafted=length,
                    accepted=accepted,
                    deferred=verdict.deferred,
                    tokens=len(fresh),
                    draft_ms=1e3 * self.draft_s,
                    judge_ms=1e3 * self.judge_s,
                )
            )


def _count(histogram: list[int], value: int, *, upto: int) -> None:
    histogram.extend([0] * (upto + 1 - len(histogram)))
    histogram[value] += 1
