"""Records what each round of an answer cost."""

from __future__ import annotations

import time
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from cascade.speculation.cost_model import RoundSample
from cascade.types import Origin, Round, Statistics

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from cascade.router.drafters import Draft
    from cascade.router.verifiers import VerifyResult
    from cascade.types import Session, Verdict


class RoundRecorder:
    """Adds up rounds in one `Statistics`; with `trace`, keeps a `Round` for each.

    `draft_s` and `verify_s` are the waits of the last round, in seconds.
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
        self.verify_s = 0.0

    @contextmanager
    def time_draft(self) -> Generator[None]:
        """Time the wait for a draft."""
        start_s = self._clock()
        try:
            yield
        finally:
            self.draft_s = self._clock() - start_s
            self.statistics.drafter_s += self.draft_s

    @contextmanager
    def time_verify(self) -> Generator[None]:
        """Time the wait for a verdict."""
        start_s = self._clock()
        try:
            yield
        finally:
            self.verify_s = self._clock() - start_s
            self.statistics.expert_s += self.verify_s

    def sample(self, draft: Draft, result: VerifyResult) -> RoundSample:
        """Return the last round as the draft length learns from it.

        Predictions do not count, nor forced tokens.
        """
        forced = draft.block.forced
        return RoundSample(
            drafted=0 if draft.predicted else draft.block.length - sum(forced),
            accepted=result.verdict.accepted - sum(forced[: result.verdict.accepted]),
            draft_s=self.draft_s,
            judge_s=self.verify_s,
            draft=draft.timing,
            judge=result.timing,
        )

    def record(
        self, before: Session, after: Session, draft: Draft, verdict: Verdict, *, reason: str
    ) -> None:
        """Record one round.

        Args:
            before: The session that the draft follows.
            after: The session with the verdict's tokens, cut at the length of the answer.
            draft: What was drafted.
            verdict: What the verifier said of it.
            reason: Why the draft had this length, for metrics.
        """
        statistics, length = self.statistics, draft.block.length + draft.deferred
        origins = after.origins[before.position :]
        accepted = min(verdict.accepted, len(origins))
        statistics.rounds += 1
        statistics.draft_length_reason = reason
        _count(statistics.draft_length_reasons, reason)
        if draft.undrafted:
            _count(statistics.undrafted_rounds, draft.undrafted)
        statistics.drafted += length
        statistics.accepted += accepted
        statistics.judged += verdict.judged
        statistics.deferred += verdict.deferred
        statistics.branched_rounds += draft.branched
        statistics.lost_mass += draft.lost_mass
        statistics.drafter_passes += draft.passes
        statistics.drafter_tokens += origins.count(Origin.DRAFTER)
        statistics.kept_tokens += origins.count(Origin.KEPT)
        statistics.expert_tokens += origins.count(Origin.EXPERT)
        statistics.forced_tokens += origins.count(Origin.FORCED)
        divergence, unmeasured = verdict.divergence(len(origins))
        statistics.divergence += divergence
        statistics.unmeasured_tokens += unmeasured
        statistics.spent_budgets = int(after.divergence_left == 0)
        if draft.predicted:
            statistics.predicted_accepted += accepted
            statistics.predicted_rejected += length - accepted
        if length:
            histogram = statistics.accepted_lengths
            histogram.extend([0] * (length + 1 - len(histogram)))
            histogram[accepted] += 1
        if self._trace:
            statistics.trace.append(
                Round(
                    position=before.position,
                    drafted=length,
                    accepted=accepted,
                    deferred=verdict.deferred,
                    tokens=len(origins),
                    draft_ms=1e3 * self.draft_s,
                    judge_ms=1e3 * self.verify_s,
                    undrafted=draft.undrafted,
                    divergence=None if unmeasured else divergence,
                )
            )


def discard_drafts(statistics: Statistics) -> None:
    """Count all drafts so far as deferred to the expert, which writes the answer anew."""
    statistics.deferred = statistics.drafted
    statistics.accepted = statistics.drafter_tokens = statistics.kept_tokens = 0
    statistics.forced_tokens = statistics.unmeasured_tokens = 0
    statistics.divergence = 0.0
    rounds, empty = sum(statistics.accepted_lengths), len(statistics.accepted_lengths) - 1
    statistics.accepted_lengths = [rounds, *[0] * empty]
    statistics.trace = [
        replace(one, accepted=0, deferred=one.drafted, tokens=0, divergence=0.0)
        for one in statistics.trace
    ]


def _count(counts: dict[str, int], name: str) -> None:
    counts[name] = counts.get(name, 0) + 1
