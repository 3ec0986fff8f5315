"""Where the time of a round goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascade.benchmark.plan import greedy, parse_ask
from cascade.benchmark.timeline import (
    STAGES,
    Note,
    Pass,
    Timeline,
    page,
    picture,
    record,
    rounds_of,
)
from cascade.errors import InvalidMeasurement
from cascade.evaluation.environment import provenance
from cascade.settings import Application

if TYPE_CHECKING:
    from pathlib import Path

QUESTION = "Felix fills 9 boxes with 7 coins each and has 7 more. How many coins does he have?"


def settings() -> Application:
    engine = {"threads": 1}
    return Application.model_validate(
        {
            "drafter": {"engine": engine},
            "expert": {"engine": engine},
            "router": {"draft_deadline_s": 120},
        }
    )


def notes(*pairs: tuple[float, str]) -> list[Note]:
    return [Note(what=what, at_s=at_s) for at_s, what in pairs]


def test_a_round_is_cut_where_it_changes_hands() -> None:
    told = notes(
        (0, "sent Judge"), (1, "received Judge"), (3, "heard Judgement"),
        (3, "sent Propose"), (4, "heard Proposal"),
        (5, "sent Judge"), (6, "received Judge"), (10.5, "heard Judgement"),
    )  # fmt: skip
    passes = [
        Pass(tier="expert", began_s=1.5, ended_s=2.5),
        Pass(tier="drafter", began_s=3.2, ended_s=3.9),
        Pass(tier="expert", began_s=6.5, ended_s=10),
    ]
    (found,) = rounds_of(told, passes)
    stages = found.stages_ms()
    assert stages == {"draft": 2000, "send": 1000, "queue": 500, "pass": 3500, "return": 500}


def test_a_verdict_heard_before_the_head_is_done_ends_the_pass() -> None:
    told = notes(
        (0, "heard Judgement"), (1, "sent Judge"), (2, "received Judge"), (4, "heard Judgement")
    )
    (found,) = rounds_of(told, [Pass(tier="expert", began_s=3, ended_s=4.5)])
    assert found.stages_ms()["pass"] == 1000
    assert found.stages_ms()["return"] == 0


async def test_the_stages_of_a_real_answer_add_up_to_it(tmp_path: Path) -> None:
    body = greedy(QUESTION) | {"cascade": parse_ask("lossless@2")}
    found = await record(settings(), body)
    assert len(found.rounds) == found.statistics["rounds"] - 1
    for one in found.rounds:
        stages = one.stages_ms()
        assert all(stages[name] >= 0 for name in STAGES)
        assert sum(stages.values()) == pytest.approx(1e3 * (one.heard_s - one.began_s))
    assert {one.tier for one in found.passes} == {"drafter", "expert"}
    picture(found, tmp_path / "timeline.png")
    assert (tmp_path / "timeline.png").read_bytes().startswith(b"\x89PNG")


async def test_a_delay_is_seen_on_both_ways() -> None:
    body = greedy(QUESTION) | {"cascade": parse_ask("lossless@2")}
    stages = (await record(settings(), body, delay_s=0.02)).stages_ms()
    assert stages["send"] >= 20
    assert stages["return"] >= 20


async def test_an_answer_of_one_round_shows_nothing() -> None:
    body = greedy(QUESTION) | {"max_tokens": 2, "cascade": parse_ask("lossless@8")}
    with pytest.raises(InvalidMeasurement, match="too few"):
        await record(settings(), body)


def test_the_page_has_every_figure_and_where_it_was_measured() -> None:
    told = notes(
        (0, "heard Judgement"), (1, "sent Judge"), (2, "received Judge"), (5, "heard Judgement")
    )
    passes = (Pass(tier="expert", began_s=3, ended_s=4),)
    timeline = Timeline(rounds=rounds_of(told, passes), passes=passes, statistics={})
    where = provenance()
    text = page(timeline, provenance=where, notes=["It is cost-padded."])
    assert "| round | | 5000.00 | 100 % |" in text
    assert "| 1000.00 | 20.0 % |" in text
    assert "It is cost-padded." in text
    assert where.commit in text
    assert "{" not in text
