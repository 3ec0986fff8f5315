"""Systems take turns, and ratios are paired by round."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.benchmarks import answer, system_result

from cascade.benchmark.load import ClosedLoop
from cascade.benchmark.report import conclusion, document, table, write
from cascade.benchmark.runner import Comparison, compare
from cascade.benchmark.systems import Role, System
from cascade.errors import InvalidMeasurement
from cascade.evaluation.environment import command_line, commit, provenance

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascade.benchmark.metrics import RunMetrics
    from cascade.benchmark.runner import SystemResult
    from cascade.evaluation.client import CompletionResult
    from cascade.evaluation.page import Finding

BODIES = [{"prompt": "a"}, {"prompt": "b"}]


class TurnRecorder:
    """Answers with the prompt and its options, and records whose turn it was."""

    def __init__(self, name: str, turns: list[str]) -> None:
        self.name = name
        self._turns = turns

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        if not self._turns or self._turns[-1] != self.name:
            self._turns.append(self.name)
        mode = body.get("cascade", {}).get("mode", "")
        return answer(text=f"{body['prompt']}{mode}{body.get('cascade', {}).get('seed', '')}")


async def test_systems_take_turns_in_an_order_that_rotates() -> None:
    turns: list[str] = []
    systems = [System(name=name, client=TurnRecorder(name, turns)) for name in "xyz"]
    await compare(systems, BODIES, ClosedLoop(), rounds=3)
    assert "".join(turns) == "xyz" + "xyz" + "yzx" + "zxy", "the warm-up, then the rounds"


async def test_each_system_has_its_own_options() -> None:
    plain = System(name="plain", client=TurnRecorder("s", []))
    other = replace(plain, name="other", options={"mode": "m"})
    requests = [{**body, "cascade": {"seed": 7}} for body in BODIES]
    comparison = await compare([plain, other], requests, ClosedLoop(), rounds=1)
    assert comparison.systems["plain"].texts == ("a7", "b7")
    assert comparison.systems["other"].texts == ("am7", "bm7")


async def test_busy_seconds_are_of_the_round() -> None:
    spent_s = iter(range(100, 200))
    one = System(
        name="one",
        client=TurnRecorder("one", []),
        busy_s=lambda: {"expert": float(next(spent_s))},
    )
    comparison = await compare([one], BODIES, ClosedLoop(), rounds=2)
    for found in comparison.systems["one"].rounds:
        assert found.busy["expert"] * found.wall_s == pytest.approx(1)


async def test_the_probe_runs_after_each_round_and_gets_its_metrics() -> None:
    turns: list[str] = []
    systems = [System(name=name, client=TurnRecorder(name, turns)) for name in "xy"]

    def probe(found: Mapping[str, RunMetrics]) -> float:
        turns.append("|")
        return float(found["x"].requests)

    comparison = await compare(systems, BODIES, ClosedLoop(), rounds=2, probe=probe)
    assert "".join(turns) == "xyxy|yx|"
    assert comparison.probed == (len(BODIES),) * 2


async def test_two_systems_of_the_same_name_are_refused() -> None:
    one = System(name="same", client=TurnRecorder("s", []))
    with pytest.raises(InvalidMeasurement, match="the same name"):
        await compare([one, one], BODIES, ClosedLoop(), rounds=1)


def test_ratios_are_paired_by_round() -> None:
    """A machine that slows down in the second round changes no ratio."""
    comparison = Comparison(
        systems={"fast": system_result(1, 10, 1), "slow": system_result(2, 20, 4)}
    )
    ratio = comparison.ratio("fast", "slow")
    assert (ratio.median, ratio.least, ratio.most) == pytest.approx((2, 2, 4))


def test_different_texts_are_listed_by_request() -> None:
    one = system_result(1, texts=("a", "b", None))
    other = system_result(1, texts=("a", "c", None))
    assert Comparison(systems={"one": one, "other": other}).differences("one", "other") == [1]


def test_the_median_is_taken_of_each_metric() -> None:
    median = system_result(1, 10, 2).median
    assert median.tokens_per_s == pytest.approx(11 / 2)
    assert median.latency["p50_ms"] == pytest.approx(1200)
    assert median.bytes_per_token == 10


def test_a_report_names_machine_command_and_commit(tmp_path: Path) -> None:
    comparison = Comparison(
        systems={"one": system_result(1, 2), "two": system_result(2, 4, texts=("b",))}
    )
    written = document(comparison, notes=["It is cost-padded."], provenance=provenance())
    paths = write(written, folder=tmp_path / "new", name="bench")
    assert [path.suffix for path in paths] == [".json", ".md", ".png", ".html"]
    text = table(written)
    assert paths[1].read_text() == text
    assert "It is cost-padded." in text
    assert written["provenance"]["commit"] in text
    assert "| two | 4.1 | 0.50 (0.50 to 0.50) |" in text
    assert text.splitlines()[-1].endswith("| 1 of 1 |"), "one text is another"
    assert "llama.cpp" not in text
    page = paths[3].read_text()
    order = ("<h1", "Nothing is faster than the first system (one)", "<img", "<h2>Provenance")
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)
    assert "It is cost-padded." in page


def test_ratios_are_over_the_fastest_that_runs_the_expert_alone() -> None:
    """And over llama.cpp with the drafter; texts are compared with the first system's."""
    comparison = Comparison(
        systems={
            "ours alone": system_result(4, role=Role.EXPERT_ALONE),
            "ours": system_result(1),
            "another alone": system_result(2, texts=("b",), role=Role.EXPERT_ALONE),
            "llama.cpp, drafts of 4": system_result(1.5, role=Role.LLAMA_DRAFTED),
        },
        notes=("none keeps a prompt",),
    )
    written = document(comparison, notes=["padded"], provenance=provenance())
    assert written["notes"] == ["padded", "none keeps a prompt"]
    ours, another = written["contenders"][1:3]
    assert (written["baseline"], written["texts_of"]) == ("another alone", "ours alone")
    assert ours["ratio"]["median"] == 2
    assert ours["to_llama"]["median"] == 1.5
    assert another["other_texts"] == [0]
    text = table(written)
    assert '"another alone"; "to llama.cpp" over "llama.cpp, drafts of 4".' in text
    assert "| ours | 11.0 | 2.00 (2.00 to 2.00) | 1.50 (1.50 to 1.50) |" in text


def compared(**systems: SystemResult) -> Finding:
    comparison = Comparison(systems=systems)
    return conclusion(document(comparison, notes=[], provenance=provenance()))


def test_a_conclusion_names_the_fastest_and_what_it_is_faster_than() -> None:
    alone = system_result(2, 4, role=Role.EXPERT_ALONE)
    found = compared(alone=alone, ours=system_result(1, 2))
    assert found.headline == (
        "ours: 2.00 times the tokens/s of the expert alone (alone), 2 rounds of 1 requests."
    )
    assert "8.2 tokens/s against 4.1; the ratio is 2.00 to 2.00" in found.detail
    assert not found.warning


def test_a_conclusion_says_where_texts_differ_where_it_may_be_noise_and_where_requests_fail() -> (
    None
):
    alone = system_result(1, 2, 4, role=Role.EXPERT_ALONE)
    noisy = system_result(1.5, 1, 2, texts=("b",))
    found = compared(alone=alone, noisy=noisy)
    assert "1 of 1 texts are not those of alone" in found.warning
    assert "may be noise" in found.warning
    rounds = tuple(replace(one, failed=3) for one in alone.rounds)
    failing = compared(alone=replace(alone, rounds=rounds), slower=system_result(9, 9, 9))
    assert failing.headline.startswith("Nothing is faster than the expert alone (alone): ")
    assert failing.warning == "Requests failed: 3 of alone."


def test_the_commit_outside_a_checkout_is_empty(tmp_path: Path) -> None:
    assert commit(tmp_path) == ""


def test_the_command_is_reported_as_typed() -> None:
    typed = command_line(["/bin/cascade", "bench", "run", "--ask", "token v3"])
    assert typed == "cascade bench run --ask 'token v3'"
