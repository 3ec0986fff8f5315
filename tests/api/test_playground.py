"""What the page is given of an evaluation."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
from tests.support.evaluation_results import cell, make_results

from cascade.api.http import create_app
from cascade.api.keys import Keys
from cascade.api.playground import evaluation
from cascade.errors import StartupError
from cascade.evaluation import report, results
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from cascade.api.context import ServingContext


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What `cascade evaluate` writes."""
    found = make_results(cells=[cell("token_v3", dial=0.9, quality=[0.5] * 6)])
    results.save(found, tmp_path / "results.json", figures=report.estimates(found))
    return tmp_path


def test_the_points_are_the_settings_with_quality_and_costs_over_all_items(folder: Path) -> None:
    found = evaluation.read(str(folder))
    assert (found.items, found.workload) == (6, "made up")
    names = ["expert_only", "drafter_only", "lossless", "token_v3 0.9"]
    assert [point.name for point in found.points] == names
    point = found.points[-1]
    assert (point.curve, point.dial, point.draft_tokens) == ("token_v3", 0.9, 5)
    assert point.quality == evaluation.Estimate(value=50, low=50, high=50)
    assert point.expert_passes.value == 4
    assert point.latency is not None
    assert point.latency.value == pytest.approx(0.4)


def test_the_format_is_the_one_that_evaluations_have() -> None:
    assert evaluation.FORMAT == results.FORMAT


def test_a_setting_of_phases_and_one_without_a_value_are_no_points(folder: Path) -> None:
    def change(document: Any) -> None:
        document["cells"][0]["phases"] = [["thinking", "lossless"]]
        document["figures"][1]["quality"]["value"] = None

    _rewrite(folder, change)
    assert [point.curve for point in evaluation.read(str(folder)).points] == [
        "lossless",
        "token_v3",
    ]


def _is_old(document: Any) -> None:
    document["format"] = 1


def _has_no_families(document: Any) -> None:
    del document["families"]


def _has_a_cell_without_key(document: Any) -> None:
    del document["cells"][0]["key"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_is_old, "has format 1, not 2; evaluate again"),
        (_has_no_families, "is no results.json of `cascade evaluate`"),
        (_has_a_cell_without_key, "cells.0.key"),
    ],
)
def test_a_wrong_file_is_refused_with_what_to_do(
    folder: Path, change: Callable[[Any], None], problem: str
) -> None:
    _rewrite(folder, change)
    with pytest.raises(StartupError, match=problem):
        evaluation.read(str(folder))


def test_what_cannot_be_read_is_refused_with_what_to_do(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StartupError, match="name the folder that `cascade evaluate --out` wrote"):
        evaluation.read(str(folder / "absent"))
    monkeypatch.setattr(evaluation, "MOST_BYTES", 10)
    with pytest.raises(StartupError, match="more than 10; evaluate fewer items or settings"):
        evaluation.read(str(folder))


def test_the_settings_name_the_folder(folder: Path, service: ServingContext) -> None:
    settings = Application(evaluation=str(folder))
    context = settings.serving_context(service.generator, settings.pair())
    assert context.evaluation == evaluation.read(str(folder))


async def test_the_curve_needs_a_key_where_the_api_does(
    service: ServingContext, folder: Path
) -> None:
    evaluated = replace(service, evaluation=evaluation.read(str(folder)))
    with_key = replace(evaluated, keys=Keys(["sk-mine"]))
    mine = {"authorization": "Bearer sk-mine"}
    for context, headers, status in (
        (evaluated, {}, 200),
        (service, {}, 204),
        (with_key, {}, 401),
        (with_key, mine, 200),
    ):
        transport = httpx2.ASGITransport(app=create_app(context))
        async with httpx2.AsyncClient(transport=transport, base_url="http://s") as client:
            response = await client.get("/playground/evaluation", headers=headers)
            assert response.status_code == status


def _rewrite(folder: Path, change: Callable[[Any], None]) -> None:
    path = folder / "results.json"
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))
