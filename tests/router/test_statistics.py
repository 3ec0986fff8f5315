"""What a round adds to the statistics of an answer."""

from __future__ import annotations

from cascade.router.drafters import Draft
from cascade.router.statistics import RoundRecorder, discard_drafts
from cascade.router.verifiers import VerifyResult
from cascade.speculation.cost_model import Timing
from cascade.types import (
    Block,
    DecodingParams,
    Origin,
    Session,
    SessionId,
    Statistics,
    Verdict,
    advance,
)

BEFORE = Session(id=SessionId("s"), prompt=(1,), policy=DecodingParams())
VERDICT = Verdict(
    accepted=2,
    tokens=(4, 5, 6),
    origins=(Origin.DRAFTER, Origin.KEPT, Origin.EXPERT),
    judged=3,
    deferred=1,
    divergences=(0.25, None, 0.5),
    divergence_left=0.0,
)


class Clock:
    def __init__(self, *times_s: float) -> None:
        self._times_s = list(times_s)

    def __call__(self) -> float:
        return self._times_s.pop(0)


def recorded(draft: Draft, *, limit: int = 9, trace: bool = False) -> Statistics:
    recorder = RoundRecorder(Statistics(), trace=trace)
    after = advance(BEFORE, VERDICT, limit=limit)
    recorder.record(BEFORE, after, draft, VERDICT, reason="requested")
    return recorder.statistics


def test_tokens_are_counted_by_origin() -> None:
    statistics = recorded(
        Draft(block=Block(tokens=(4, 5, 9)), passes=3, branched=True, lost_mass=0.75)
    )
    assert (statistics.drafter_tokens, statistics.kept_tokens, statistics.expert_tokens) == (
        1,
        1,
        1,
    )
    assert (statistics.rounds, statistics.drafted, statistics.accepted) == (1, 3, 2)
    assert (statistics.judged, statistics.deferred) == (3, 1)
    assert (statistics.drafter_passes, statistics.branched_rounds) == (3, 1)
    assert statistics.lost_mass == 0.75
    assert statistics.draft_length_reason == "requested"
    assert statistics.draft_length_reasons == {"requested": 1}
    assert statistics.undrafted_rounds == {}


def test_divergences_add_up_where_they_are_known() -> None:
    statistics = recorded(Draft(block=Block(tokens=(4, 5, 9))), trace=True)
    assert (statistics.divergence, statistics.unmeasured_tokens) == (0.75, 1)
    assert statistics.trace[0].divergence is None
    assert statistics.spent_budgets == 1
    cut = recorded(Draft(block=Block(tokens=(4, 5, 9))), limit=1, trace=True)
    assert (cut.divergence, cut.unmeasured_tokens, cut.trace[0].divergence) == (0.25, 0, 0.25)
    discard_drafts(statistics)
    assert (statistics.divergence, statistics.unmeasured_tokens) == (0.0, 0)


def test_tokens_beyond_the_answer_are_not_counted() -> None:
    statistics = recorded(Draft(block=Block(tokens=(4, 5, 9))), limit=1)
    assert (statistics.accepted, statistics.drafter_tokens, statistics.expert_tokens) == (1, 1, 0)


def test_accepted_lengths_are_a_histogram() -> None:
    statistics = recorded(Draft(block=Block(tokens=(4, 5, 9))))
    assert statistics.accepted_lengths == [0, 0, 1, 0]
    assert recorded(Draft()).accepted_lengths == []


def test_a_position_that_the_drafter_deferred_is_drafted_and_not_accepted() -> None:
    """So no more is judged than was drafted, and no more deferred than judged."""
    statistics = recorded(Draft(block=Block(tokens=(4, 5)), deferred=True), trace=True)
    assert (statistics.drafted, statistics.judged, statistics.deferred) == (3, 3, 1)
    assert (statistics.accepted, statistics.accepted_lengths) == (2, [0, 0, 1, 0])
    assert statistics.trace[0].drafted == 3


def test_a_draft_that_is_missing_is_counted_by_its_cause() -> None:
    statistics = recorded(Draft(undrafted="late"), trace=True)
    assert statistics.undrafted_rounds == {"late": 1}
    assert (statistics.trace[0].undrafted, statistics.accepted_lengths) == ("late", [])


def test_drafts_that_are_thrown_away_are_deferred_and_not_accepted() -> None:
    statistics = recorded(Draft(block=Block(tokens=(4, 5, 9))), trace=True)
    statistics.judged = statistics.drafted
    discard_drafts(statistics)
    assert (statistics.drafted, statistics.judged, statistics.deferred) == (3, 3, 3)
    assert (statistics.accepted, statistics.drafter_tokens, statistics.kept_tokens) == (0, 0, 0)
    assert statistics.accepted_lengths == [1, 0, 0, 0]
    (entry,) = statistics.trace
    assert (entry.drafted, entry.accepted, entry.deferred, entry.tokens) == (3, 0, 3, 0)


def test_a_prediction_is_counted_apart() -> None:
    statistics = recorded(Draft(block=Block(tokens=(4, 5, 9)), predicted=True))
    assert (statistics.predicted_accepted, statistics.predicted_rejected) == (2, 1)


def test_waits_are_timed_even_if_they_fail() -> None:
    recorder = RoundRecorder(Statistics(), trace=False, clock=Clock(0.0, 2.0, 5.0, 9.0))
    with recorder.time_draft():
        pass
    with recorder.time_verify():
        pass
    assert (recorder.draft_s, recorder.verify_s) == (2.0, 4.0)
    assert (recorder.statistics.drafter_s, recorder.statistics.expert_s) == (2.0, 4.0)


def test_a_trace_has_an_entry_per_round() -> None:
    (entry,) = recorded(Draft(block=Block(tokens=(4, 5, 9))), trace=True).trace
    assert (entry.position, entry.drafted, entry.accepted, entry.deferred, entry.tokens) == (
        *(0, 3, 2, 1),
        3,
    )


def test_the_draft_length_does_not_learn_from_predictions() -> None:
    recorder = RoundRecorder(Statistics(), trace=False)
    result = VerifyResult(verdict=VERDICT, timing=Timing(step_s=1.0))
    assert recorder.sample(Draft(block=Block(tokens=(4, 5, 9))), result).drafted == 3
    predicted = recorder.sample(Draft(block=Block(tokens=(4, 5, 9)), predicted=True), result)
    assert (predicted.drafted, predicted.accepted) == (0, 2)
