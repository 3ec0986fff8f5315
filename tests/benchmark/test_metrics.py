"""The metrics of runs whose times are known."""

from __future__ import annotations

import pytest
from tests.support.benchmarks import answer, load_result

from cascade.benchmark.metrics import (
    Slo,
    parse_slo,
    percentiles,
    share_of_ideal,
    summarize,
    time_per_token_s,
)
from cascade.errors import InvalidMeasurement


def test_a_run_is_summed_over_its_answers() -> None:
    found = summarize(load_result(answer(), answer(), None), busy_s={"drafter": 0.5, "expert": 1.0})
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


def test_time_per_token_starts_at_the_first_text() -> None:
    assert time_per_token_s(answer()) == pytest.approx(0.1)
    assert time_per_token_s(answer(completion_tokens=1)) is None


def test_hidden_drafting_is_what_the_router_did_not_wait_for() -> None:
    assert summarize(load_result(answer()), busy_s={"drafter": 0.4}).hidden == pytest.approx(0.75)
    assert summarize(load_result(answer()), busy_s={"drafter": 0.05}).hidden == 0
    assert summarize(load_result(answer())).hidden is None


def test_an_ideal_round_is_one_pass_of_the_expert() -> None:
    found = summarize(load_result(answer(), answer()))
    assert found.round_ms == pytest.approx(500)
    assert share_of_ideal(found, pass_ms=450) == pytest.approx(0.9)
    alone = summarize(load_result(answer(statistics={"rounds": 1})))
    assert share_of_ideal(alone, pass_ms=450) is None


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        ({}, 2),
        ({"ttft": 250}, 1),
        ({"tpot": 85}, 0),
        ({"ttft": 400, "latency": 1300}, 2),
    ],
)
def test_goodput_counts_answers_within_the_slo(slo: Slo, good: int) -> None:
    late = answer(ttft_s=0.3)
    found = summarize(load_result(answer(), late, None), slo=slo)
    assert found.goodput_per_s == good / 2
    assert found.good_share == pytest.approx(good / 3)


def test_an_slo_is_parsed() -> None:
    assert parse_slo("ttft=200, tpot=30ms") == {"ttft": 200, "tpot": 30}
    assert parse_slo("") == {}


@pytest.mark.parametrize("text", ["speed=3", "ttft", "ttft=fast", "tpot=-1", "=3"])
def test_an_invalid_slo_is_refused(text: str) -> None:
    with pytest.raises(InvalidMeasurement, match="--slo"):
        parse_slo(text)


def test_a_run_without_answers_names_the_error() -> None:
    with pytest.raises(InvalidMeasurement, match="no replica"):
        summarize(load_result(None, None))


def test_percentiles_are_of_all_requests() -> None:
    found = percentiles(number / 1000 for number in range(101))
    assert (found["p50_ms"], found["p95_ms"], found["p99_ms"]) == pytest.approx((50, 95, 99))
    assert percentiles([])["p99_ms"] == 0


def test_a_system_without_statistics_has_no_ratios() -> None:
    found = summarize(load_result(answer(statistics={})))
    assert found.tokens_per_expert_pass is None
    assert found.bytes_per_token is None
    assert found.lengths == {"none": 1}


def test_traced_rounds_after_the_first_are_counted_by_draft_length() -> None:
    found = summarize(load_result(answer(draft_lengths=(9, 4, 0)), answer(draft_lengths=(9, 4))))
    assert found.blocks == {4: 2, 0: 1}
