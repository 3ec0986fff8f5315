"""Where the time of a round goes."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from tests.support.benchmarks import PATIENT

from cascade.benchmark.plan import greedy, parse_variant
from cascade.benchmark.timeline import page, picture, record, timeline_of
from cascade.errors import InvalidMeasurement
from cascade.evaluation.environment import provenance

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "Felix fills 9 boxes with 7 coins each and has 7 more. How many coins does he have?"

TWO_ROUNDS = {
    "delivered": [0.0, 5.0, 10.0], "sent": [1.0, 6.0], "received": [2.0, 7.0],
    "expert began": [3.0, 8.0], "expert ended": [4.0, 9.0],
    "drafter began": [5.2], "drafter ended": [0.1, 5.9],
}  # fmt: skip


def test_a_round_is_divided_where_it_changes_hands() -> None:
    times_s = TWO_ROUNDS | {"expert began": [2.5, 8.0], "delivered": [0.0, 4.2, 10.0]}
    found = timeline_of(times_s, statistics={})
    assert found.drafter_passes == ((5.2, 5.9),)
    assert found.rounds == ((0.0, 1.0, 2.0, 2.5, 4.0, 4.2), (4.2, 6.0, 7.0, 8.0, 9.0, 10.0))
    assert found.stages_ms() == pytest.approx(
        {"draft": 1400, "send": 1000, "queue": 750, "pass": 1250, "return": 600}
    )


def test_the_first_round_has_no_verdict_before_it_and_is_left_out() -> None:
    times_s = TWO_ROUNDS | {"delivered": [5.0, 10.0, 15.0], "sent": [1.0, 6.0, 11.0]}
    times_s |= {"received": [2.0, 7.0, 12.0], "expert began": [3.0, 8.0, 13.0]}
    assert [times[0] for times in timeline_of(times_s, statistics={}).rounds] == [5.0, 10.0]


def test_a_verdict_delivered_before_the_logits_handler_returns_ends_the_pass() -> None:
    stages = timeline_of(TWO_ROUNDS | {"expert ended": [5.5, 10.5]}, statistics={}).stages_ms()
    assert stages["pass"] == 2000
    assert stages["return"] == 0


def test_a_single_round_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="too few"):
        timeline_of(TWO_ROUNDS | {"sent": [1.0]}, statistics={"rounds": 2})


async def test_the_stages_of_a_real_answer_add_up_and_contain_the_delay(tmp_path: Path) -> None:
    body = greedy(QUESTION) | {"cascade": parse_variant("lossless@2")}
    found = await record(PATIENT, body, rtt_ms=40)
    assert len(found.rounds) == found.statistics["rounds"] - 1
    for times in found.rounds:
        assert all(start <= end for start, end in pairwise(times))
    assert found.drafter_passes
    stages = found.stages_ms()
    assert stages["send"] >= 20
    assert stages["return"] >= 20
    picture(found, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_has_every_number_and_where_it_was_measured() -> None:
    where = provenance()
    timeline = timeline_of(TWO_ROUNDS, statistics={})
    text = page(timeline, provenance=where, notes=["It is cost-padded."])
    assert "| round | | 5000.00 | 100 % |" in text
    assert "| 1000.00 | 20.0 % |" in text
    assert "It is cost-padded." in text
    assert where.commit in text
    assert "{" not in text
