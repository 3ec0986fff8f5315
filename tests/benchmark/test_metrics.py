"""Figures of runs whose times are known."""

from __future__ import annotations

from typing import Any

import pytest

from cascade.benchmark.load import Asked, Run
from cascade.benchmark.metrics import (
    Objective,
    figures,
    of_ideal,
    parse_objective,
    spread,
    time_per_token_s,
)
from cascade.errors import InvalidMeasurement
from cascade.evaluation.client import Answer


def answer(**changes: Any) -> Answer:
    """Return an answer of 11 tokens in 3 rounds: 0.2 s to the first text, 1.2 s in all."""
    plain: dict[str, Any] = {
        "text": "yes",
        "finish": "stop",
        "statistics": {
            "rounds": 3,
            "drafted": 12,
            "accepted": 8,
            "expert_passes": 2,
            "drafter_s": 0.1,
            "expert_s": 0.9,
            "sent_bytes": 60,
            "received_bytes": 50,
            "draft_length_reason": "fixed",
        },
        "prompt_tokens": 5,
        "completion_tokens": 11,
        "latency_s": 1.2,
        "ttft_s": 0.2,
    }
    return Answer(**(plain | changes))


def run(*answers: Answer | None, wall_s: float = 2.0) -> Run:
    asked = tuple(
        Asked(start_s=0, answer=one, error=None if one else "no replica") for one in answers
    )
    return Run(asked=asked, wall_s=wall_s)


def test_a_run_is_summed_over_its_answers() -> None:
    found = figures(run(answer(), answer(), None), busy_s={"drafter": 0.5, "expert": 1.0})
    assert (found.requests, found.failed, found.tokens) == (3, 1, 22)
    assert found.tokens_per_s == 11
    assert found.requests_per_s == 1
    assert found.tokens_per_expert_pass == pytest.approx(22 / 4)
    assert found.tokens_per_round == pytest.approx(22 / 6)
    assert found.acceptance == pytest.approx(2 / 3)
    assert found.drafted_per_round == 4
    assert found.bytes_per_token == 10
    assert found.busy == {"drafter": 0.25, "expert": 0.5}
    assert found.lengths == {"fixed": 2}


def test_a_time_per_token_counts_from_the_first_text() -> None:
    assert time_per_token_s(answer()) == pytest.approx(0.1)
    assert time_per_token_s(answer(completion_tokens=1)) is None


def test_hidden_drafting_is_what_nobody_waited_for() -> None:
    assert figures(run(answer()), busy_s={"drafter": 0.4}).hidden == pytest.approx(0.75)
    assert figures(run(answer()), busy_s={"drafter": 0.05}).hidden == 0
    assert figures(run(answer())).hidden is None


def test_the_ideal_round_is_one_pass_of_the_expert() -> None:
    found = figures(run(answer(), answer()))
    assert found.round_ms == pytest.approx(500)
    assert of_ideal(found, pass_ms=450) == pytest.approx(0.9)
    alone = figures(run(answer(statistics={"rounds": 1})))
    assert of_ideal(alone, pass_ms=450) is None


@pytest.mark.parametrize(
    ("objective", "good"),
    [
        (Objective(), 2),
        (Objective(ttft_ms=250), 1),
        (Objective(tpot_ms=85), 0),
        (Objective(ttft_ms=400, latency_ms=1300), 2),
    ],
)
def test_goodput_counts_answers_that_keep_the_objective(objective: Objective, good: int) -> None:
    late = answer(ttft_s=0.3)
    found = figures(run(answer(), late, None), objective=objective)
    assert found.goodput_per_s == good / 2
    assert found.good_share == pytest.approx(good / 3)


def test_an_objective_is_read_from_a_line() -> None:
    assert parse_objective("ttft=200, tpot=30ms") == Objective(ttft_ms=200, tpot_ms=30)
    assert parse_objective("") == Objective()


@pytest.mark.parametrize("text", ["speed=3", "ttft", "ttft=fast", "tpot=-1", "=3"])
def test_what_is_no_objective_is_refused(text: str) -> None:
    with pytest.raises(InvalidMeasurement, match="--slo"):
        parse_objective(text)


def test_a_run_without_answers_says_why() -> None:
    with pytest.raises(InvalidMeasurement, match="no replica"):
        figures(run(None, None))


def test_percentiles_are_of_all_requests() -> None:
    found = spread(number / 1000 for number in range(101))
    assert (found.p50_ms, found.p95_ms, found.p99_ms) == pytest.approx((50, 95, 99))
    assert spread([]).p99_ms == 0


def test_a_peer_that_counts_nothing_has_no_ratios() -> None:
    found = figures(run(answer(statistics={})))
    assert found.tokens_per_expert_pass is None
    assert found.bytes_per_token is None
    assert found.lengths == {"none": 1}


def test_traced_rounds_after_the_first_are_counted_by_their_drafts() -> None:
    found = figures(run(answer(blocks=(9, 4, 0)), answer(blocks=(9, 4))))
    assert found.blocks == {4: 2, 0: 1}
