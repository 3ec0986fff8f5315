"""The suite: promises, and what was measured of them."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.benchmark.test_runner import standing

from cascade.benchmark.runner import Contest
from cascade.benchmark.suite import (
    CASES,
    Claim,
    Outcome,
    Scale,
    claim_table,
    promised,
    read,
    summary,
    write,
)
from cascade.errors import InvalidMeasurement
from cascade.evaluation.environment import provenance
from cascade.settings import Application

if TYPE_CHECKING:
    from pathlib import Path


def scale() -> Scale:
    engine = {"threads": 1}
    settings = Application.model_validate(
        {
            "drafter": {"engine": engine},
            "expert": {"engine": engine},
            "router": {"draft_deadline_s": 120},
        }
    )
    return Scale(settings=settings, rounds=1, questions=1, router_rounds=1000)


def claim(measured: float, **bounds: float) -> Claim:
    return Claim(case="one", says="speed", measured=measured, **bounds)


@pytest.mark.parametrize(
    ("told", "held"),
    [
        (claim(1.0, least=1.0), True),
        (claim(0.9, least=1.0), False),
        (claim(0.9, most=1.0), True),
        (claim(1.1, most=1.0), False),
        (claim(5.0), True),
    ],
)
def test_a_claim_is_held_within_its_bounds(told: Claim, *, held: bool) -> None:
    assert told.held is held


def test_the_table_says_which_claims_do_not_hold() -> None:
    lines = claim_table([claim(0.97, least=0.93), claim(1.2, most=1)]).splitlines()
    assert lines[2] == "| one | speed | at least 0.93 | 0.97 | yes |"
    assert lines[3] == "| one | speed | at most 1 | 1.2 | **no** |"


def outcome(measured: float) -> Outcome:
    contest = Contest(standings=(standing("alone", 1.0), standing("fast", 0.5)))
    return Outcome(
        claims=(claim(measured, least=1.5),), contests={"race": (contest, "It is cost-padded.")}
    )


def test_claims_are_written_with_the_contests_behind_them(tmp_path: Path) -> None:
    where = provenance()
    written = write("racing", outcome(2.0), folder=tmp_path, provenance=where)
    case = json.loads(written[0].read_text())["cases"]["racing"]
    assert case["claims"][0]["held"] is True
    assert case["contests"]["race"]["contenders"][1]["ratio"]["median"] == 2
    text = written[1].read_text()
    assert "### race" in text
    assert "It is cost-padded." in text
    assert text.count(where.command) == 1


def test_a_case_measured_again_takes_its_own_place_alone(tmp_path: Path) -> None:
    """Cases are measured in several goes, each with its own commit."""
    first, second = replace(provenance(), commit="aaa"), replace(provenance(), commit="bbb")
    write("racing", outcome(1.0), folder=tmp_path, provenance=first)
    write("walking", outcome(3.0), folder=tmp_path, provenance=first)
    (path, _) = write("racing", outcome(2.0), folder=tmp_path, provenance=second)
    lines = summary(read(path)).splitlines()[2:]
    assert ["| 2 | yes | bbb, " in lines[0], "| 3 | yes | aaa, " in lines[1]] == [True, True]
    page = promised(read(path))
    assert "**racing**" in page
    assert page.startswith("| case |")


def test_a_folder_with_another_report_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text("[]")
    with pytest.raises(InvalidMeasurement, match="another --out"):
        write("racing", outcome(1.0), folder=tmp_path, provenance=provenance())


def test_nothing_measured_promises_nothing() -> None:
    assert not promised({"cases": {}})


@pytest.mark.parametrize("name", ["deferrals", "wire", "router", "drafter_steps"])
async def test_a_case_measures_what_it_claims(name: str) -> None:
    """What it measures is left to a quiet machine; that it measures is not."""
    lines: list[str] = []
    outcome = await CASES[name](scale(), lines.append)
    assert lines
    assert all(found.least is not None or found.most is not None for found in outcome.claims)
    for contest, _ in outcome.contests.values():
        assert all(figures.failed == 0 for one in contest.standings for figures in one.rounds)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["one_stream", "sixteen_streams", "apart", "draft_lengths"])
async def test_a_long_case_gives_the_same_texts_to_everyone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    outcome = await CASES[name](replace(scale(), questions=1), lambda _: None)
    for contest, note in outcome.contests.values():
        assert "cost-padded" in note
        baseline = contest.standings[0].name
        for one in contest.standings:
            assert one.name.startswith("token_v3") or not contest.differences(one.name, baseline)
