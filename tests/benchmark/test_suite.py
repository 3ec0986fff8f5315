"""The suite: promises, and what was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support.benchmarks import PATIENT, system_result

from cascade.benchmark.report import read_suite, suite_claims, write_suite
from cascade.benchmark.runner import Comparison
from cascade.benchmark.suite import CASES, CaseResult, Claim, SuiteOptions
from cascade.benchmark.systems import Role
from cascade.errors import InvalidMeasurement
from cascade.evaluation.environment import provenance

PAGE = Path(__file__).parents[2] / "docs" / "performance.md"
OPTIONS = SuiteOptions(settings=PATIENT, rounds=1, questions=1, router_rounds=1000)


def claim(measured: float, **bounds: float) -> Claim:
    return Claim(case="one", says="speed", measured=measured, **bounds)


@pytest.mark.parametrize(
    ("checked", "held"),
    [
        (claim(1.0, least=1.0), True),
        (claim(0.9, least=1.0), False),
        (claim(0.9, most=1.0), True),
        (claim(1.1, most=1.0), False),
        (claim(5.0), True),
    ],
)
def test_a_claim_holds_within_its_bounds(checked: Claim, *, held: bool) -> None:
    assert checked.held is held


def case_result(measured: float) -> CaseResult:
    comparison = Comparison(systems={"alone": system_result(1.0), "fast": system_result(0.5)})
    return CaseResult(
        claims=(claim(measured, least=1.5),),
        comparisons={"speed": (comparison, "It is cost-padded.")},
    )


def test_claims_are_written_with_their_comparisons(tmp_path: Path) -> None:
    where = replace(provenance(), command="cascade bench suite --only first")
    written = write_suite("first", case_result(2.0), folder=tmp_path, provenance=where)
    case = json.loads(written[0].read_text())["cases"]["first"]
    assert case["claims"][0]["held"] is True
    assert case["contests"]["speed"]["contenders"][1]["ratio"]["median"] == 2
    text = written[1].read_text()
    assert "### speed" in text
    assert "It is cost-padded." in text
    assert text.count(where.command) == 1
    page = written[2].read_text()
    order = ("1 of 1 targets are met.", "Wanted and measured", "<img", where.command)
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)


def test_a_case_measured_again_replaces_only_itself(tmp_path: Path) -> None:
    """Cases can be measured at different times, each with its own commit."""
    first, second = replace(provenance(), commit="aaa"), replace(provenance(), commit="bbb")
    write_suite("first", case_result(3.0), folder=tmp_path, provenance=first)
    write_suite("second", case_result(1.0), folder=tmp_path, provenance=first)
    path, _, page_path = write_suite("first", case_result(2.0), folder=tmp_path, provenance=second)
    lines = suite_claims(read_suite(path)).splitlines()[2:]
    assert "| one | speed | at least 1.5 | 2 | yes | bbb, " in lines[0]
    assert "| 1 | **no** | aaa, " in lines[1]
    assert "Missed: one: speed." in page_path.read_text()
    page = suite_claims(read_suite(path), with_headings=True)
    assert "**first**" in page
    assert page.startswith("| case |")


def test_another_report_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "suite.json").write_text("[]")
    with pytest.raises(InvalidMeasurement, match="another --out"):
        write_suite("first", case_result(1.0), folder=tmp_path, provenance=provenance())


def test_a_suite_without_cases_has_no_table() -> None:
    assert not suite_claims({"cases": {}})


@pytest.mark.parametrize(
    "name",
    [
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("deferrals", "grammars", "masks")
        ),
        *("wire", "router", "drafter_steps"),
    ],
)
async def test_a_case_measures_its_claims(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the claims hold depends on the machine; that they are measured does not."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    lines: list[str] = []
    result = await CASES[name](OPTIONS, lines.append)
    assert lines
    assert all(found.least is not None or found.most is not None for found in result.claims)
    for comparison, _ in result.comparisons.values():
        for system in comparison.systems.values():
            assert all(one.failed == 0 for one in system.rounds)


@pytest.mark.parametrize("name", ["one_stream", "sixteen_streams", "llama_cpp"])
def test_the_page_of_speed_says_the_targets_against_llama_cpp(name: str) -> None:
    page = PAGE.read_text()
    case: Any = CASES[name]
    for compared in case.keywords["cases"]:
        target = next(one for one in compared.speedups if one.over is Role.LLAMA_DRAFTED)
        row = f"| `{name}` | {compared.streams} | {compared.parameters} | at least {target.least} |"
        assert row in page


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "name", ["one_stream", "sixteen_streams", "llama_cpp", "apart", "draft_lengths"]
)
async def test_all_systems_of_a_long_case_give_the_same_texts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    result = await CASES[name](OPTIONS, lambda _: None)
    for comparison, note in result.comparisons.values():
        assert "cost-padded" in note
        baseline = next(iter(comparison.systems))
        for system in comparison.systems:
            assert system.startswith("token_v3") or not comparison.differences(system, baseline)
