"""Contests: contenders take turns, and ratios are paired by round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.benchmark.test_metrics import answer, run

from cascade.benchmark.load import Closed
from cascade.benchmark.metrics import figures
from cascade.benchmark.report import document, table, write
from cascade.benchmark.runner import Contest, Standing, compete
from cascade.benchmark.systems import Contender
from cascade.errors import InvalidMeasurement
from cascade.evaluation.environment import command_line, commit, provenance

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascade.benchmark.metrics import Figures
    from cascade.evaluation.client import Answer

BODIES = [{"prompt": "a"}, {"prompt": "b"}]


class Scribe:
    """Answers with the prompt and its own name, and writes down whose turn it was."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name = name
        self._turns = turns

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        if not self._turns or self._turns[-1] != self.name:
            self._turns.append(self.name)
        mode = body.get("cascade", {}).get("mode", "")
        return answer(text=f"{body['prompt']}{mode}{body.get('cascade', {}).get('seed', '')}")


def standing(name: str, *walls_s: float, texts: tuple[str | None, ...] = ("a",)) -> Standing:
    rounds = tuple(figures(run(answer(), wall_s=wall_s)) for wall_s in walls_s)
    return Standing(name=name, rounds=rounds, texts=texts)


async def test_contenders_take_turns_in_an_order_that_rotates() -> None:
    turns: list[str] = []
    contenders = [Contender(name=name, answerer=Scribe(name, turns)) for name in "xyz"]
    await compete(contenders, BODIES, Closed(), rounds=3)
    assert "".join(turns) == "xyz" + "xyz" + "yzx" + "zxy", "and a first turn that does not count"


async def test_each_contender_is_asked_in_its_own_way() -> None:
    plain = Contender(name="plain", answerer=Scribe("s", []))
    asked = [{**body, "cascade": {"seed": 7}} for body in BODIES]
    contest = await compete([plain, plain.asked("other", mode="m")], asked, Closed(), rounds=1)
    assert contest["plain"].texts == ("a7", "b7")
    assert contest["other"].texts == ("am7", "bm7")


async def test_busy_seconds_are_of_the_round() -> None:
    spent_s = iter(range(100, 200))
    one = Contender(
        name="one",
        answerer=Scribe("one", []),
        busy_s=lambda: {"expert": float(next(spent_s))},
    )
    contest = await compete([one], BODIES, Closed(), rounds=2)
    for found in contest["one"].rounds:
        assert found.busy["expert"] * found.wall_s == pytest.approx(1)


async def test_a_gauge_is_read_after_each_round_and_sees_its_figures() -> None:
    turns: list[str] = []
    contenders = [Contender(name=name, answerer=Scribe(name, turns)) for name in "xy"]

    def gauge(found: Mapping[str, Figures]) -> float:
        turns.append("|")
        return float(found["x"].requests)

    contest = await compete(contenders, BODIES, Closed(), rounds=2, gauge=gauge)
    assert "".join(turns) == "xyxy|yx|"
    assert contest.gauged == (len(BODIES),) * 2


async def test_contenders_with_one_name_are_refused() -> None:
    one = Contender(name="same", answerer=Scribe("s", []))
    with pytest.raises(InvalidMeasurement, match="name them apart"):
        await compete([one, one], BODIES, Closed(), rounds=1)


def test_ratios_are_paired_by_round() -> None:
    """A machine that slows down in the second round changes no ratio."""
    contest = Contest(standings=(standing("fast", 1, 10, 1), standing("slow", 2, 20, 4)))
    ratio = contest.ratio("fast", "slow")
    assert (ratio.median, ratio.least, ratio.most) == pytest.approx((2, 2, 4))


def test_texts_that_differ_are_named_by_request() -> None:
    one = standing("one", 1, texts=("a", "b", None))
    other = standing("other", 1, texts=("a", "c", None))
    assert Contest(standings=(one, other)).differences("one", "other") == [1]


def test_the_middle_of_rounds_is_taken_figure_by_figure() -> None:
    middle = standing("one", 1, 10, 2).middle
    assert middle.tokens_per_s == pytest.approx(11 / 2)
    assert middle.latency.p50_ms == pytest.approx(1200)
    assert middle.bytes_per_token == 10


def test_an_unknown_contender_is_told_from_those_there_are() -> None:
    with pytest.raises(InvalidMeasurement, match="there are one"):
        Contest(standings=(standing("one", 1),))["two"]


def test_a_report_names_machine_command_and_commit(tmp_path: Path) -> None:
    contest = Contest(standings=(standing("one", 1, 2), standing("two", 2, 4, texts=("b",))))
    told = document(contest, baseline="one", notes=["It is cost-padded."], provenance=provenance())
    paths = write(told, folder=tmp_path / "new", name="bench")
    assert [path.suffix for path in paths] == [".json", ".md", ".png"]
    text = table(told)
    assert paths[1].read_text() == text
    assert "It is cost-padded." in text
    assert told["provenance"]["commit"] in text
    assert "| two | 4.1 | 0.50 (0.50 to 0.50) |" in text
    assert text.splitlines()[-1].endswith("| 1 |"), "one text is another"


def test_a_commit_of_no_checkout_is_empty(tmp_path: Path) -> None:
    assert commit(tmp_path) == ""


def test_a_command_is_told_as_typed() -> None:
    told = command_line(["/bin/cascade", "bench", "run", "--ask", "token v3"])
    assert told == "cascade bench run --ask 'token v3'"
