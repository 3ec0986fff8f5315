from __future__ import annotations

import html
import json
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from cascade.errors import InvalidMeasurement
from cascade.evaluation import report
from cascade.evaluation.client import connect_http
from cascade.evaluation.grid import GridBlock, merge_blocks
from cascade.evaluation.results import ALL, Results, load
from cascade.evaluation.run import Run, evaluate, write
from cascade.evaluation.workloads import Workload
from cascade.evaluation.workloads import load as workload

if TYPE_CHECKING:
    from pathlib import Path

    from cascade.evaluation.client import InProcessClient

ITEMS = Workload(  # with a corpus BLEU, a program, and neither
    name="three families",
    items=tuple(
        item
        for family in ("translation", "functions", "facts")
        for item in workload(family, count=1).items
    ),
)

CURVES = {
    "chow": [0.3], "token_v3": [0.95], "lossy": [0.9], "token_cascade": [0.3],
    "sequence_cascade": [-0.1],
}  # fmt: skip

SETTINGS = merge_blocks([GridBlock(temperatures=[1.0], curves=CURVES)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
async def results(shipped: InProcessClient, folder: Path) -> Results:
    return await evaluate(ITEMS, SETTINGS, shipped, run=Run(folder=folder))


async def test_an_evaluation_of_the_shipped_pair_has_plausible_rates(results: Results) -> None:
    assert [cell.setting for cell in results.cells] == SETTINGS
    assert results.groups == (ALL, *ITEMS.families)
    metrics = results.metrics[ALL]
    rates = {cell.setting.name: metrics.estimate(cell, "rejection_rate") for cell in results.cells}
    assert rates["expert_only"].value == 1
    assert rates["drafter_only"].value == 0
    assert 0 <= rates["token_v3 0.95"].value <= rates["lossless"].value < 1
    expert = results.find("expert_only", temperature=1)
    assert metrics.estimate(expert, "tokens_per_expert_pass").value == pytest.approx(1)
    assert metrics.estimate(expert, "latency").value == 1


async def test_the_cost_of_every_kind_of_pass_is_measured(results: Results) -> None:
    costs = results.about["costs"]
    assert {"expert_only", "speculative 5"} <= set(costs["expert_s"])
    assert set(costs["drafter_s"]) == {"drafter_only", "token_cascade", "speculative 5"}
    assert all(cost > 0 for found in costs.values() for cost in found.values())


async def test_translation_has_a_corpus_bleu_too(results: Results) -> None:
    expert = results.find("expert_only", temperature=1)
    assert set(expert.corpus_bleu) == {"translation"}
    assert 0 <= expert.corpus_bleu["translation"] <= 100.001


async def test_a_finished_evaluation_sends_no_more_requests(
    shipped: InProcessClient, results: Results, folder: Path
) -> None:
    run = Run(folder=folder)
    silent: Any = SimpleNamespace(name=shipped.name)  # cannot complete anything
    again = await evaluate(ITEMS, SETTINGS, silent, run=run)
    assert again.about["costs"] == results.about["costs"]
    assert [list(cell.columns["quality"]) for cell in again.cells] == [
        list(cell.columns["quality"]) for cell in results.cells
    ]


async def test_the_folder_of_another_workload_is_refused(
    shipped: InProcessClient, results: Results, folder: Path
) -> None:
    del results
    with pytest.raises(InvalidMeasurement, match="another evaluation"):
        await evaluate(workload("facts", count=1), SETTINGS, shipped, run=Run(folder=folder))


async def test_a_server_is_evaluated_over_http(shipped_url: str, tmp_path: Path) -> None:
    """At temperature 0 lossless speculation equals the expert, in no more expert passes."""
    settings = merge_blocks([GridBlock(temperatures=[0.0], curves={"opt": [0.2]})])
    async with connect_http(shipped_url) as server:
        found = await evaluate(
            workload("facts", count=2), settings, server, run=Run(folder=tmp_path)
        )
    expert, lossless = (found.find(name, temperature=0, draft_tokens=length)
                        for name, length in (("expert_only", None), ("lossless", 5)))  # fmt: skip
    assert list(expert.columns["quality"]) == list(lossless.columns["quality"])
    assert (lossless.columns["expert_passes"] <= expert.columns["expert_passes"]).all()
    assert found.groups == ("facts",)


async def test_json_plots_tables_and_an_html_page_are_written(
    results: Results, tmp_path: Path
) -> None:
    written = write(results, tmp_path)
    names = {path.name for path in written}
    assert names == {
        "results.json", "quality-rejection-t1-d5.png", "quality-latency-t1-d5.png", "tables.md",
        "report.html",
    }  # fmt: skip
    for path in written:
        if path.suffix == ".png":
            assert path.read_bytes().startswith(b"\x89PNG")
            assert path.stat().st_size > 50_000  # panels with curves, not an empty sheet
    page = html.unescape((tmp_path / "report.html").read_text())
    assert page.count("data:image/svg+xml;base64,") == 2 * len(results.groups)
    (found,) = report.conclusions(results)
    order = ("<h1", found.headline, found.warning, "<img", "<h2>Settings", "<h2>Provenance")
    assert [page.index(part) for part in order] == sorted(page.index(part) for part in order)
    assert page.index("<h2>Provenance") < page.index(">command</th>")
    assert "{'" not in page
    assert not re.search(r"\d\.\d{7}", re.sub(r"base64,[^\"]*", "", page))
    assert not re.search(r"(src|href|url)\W{0,2}(?!data:)(https?:|//)", page)
    assert "token_v3 0.95" in page
    assert "rejections of lossless speculation on" in page
    tables = (tmp_path / "tables.md").read_text()
    assert "| chow |" in tables
    assert "BLEU" in tables
    document = json.loads((tmp_path / "results.json").read_text())
    assert len(document["figures"]) == len(SETTINGS) * len(results.groups)
    assert load(tmp_path).families == results.families
