from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.support.evaluation_results import cell, make_results

from cascade.errors import InvalidMeasurement
from cascade.evaluation.results import ALL, Results, estimate, load, save

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def results() -> Results:
    return make_results()


def test_rates_are_quotients_of_sums_not_means_of_quotients() -> None:
    found = make_results(
        cells=[cell("chow", dial=0.1, offered=[1, 99], rejected=[1, 0])], families="aa"
    )
    metrics = found.metrics["a"]
    assert metrics.estimate(found.cells[-1], "rejection_rate").value == pytest.approx(0.01)


def test_the_first_resample_is_the_items_themselves(results: Results) -> None:
    assert (results.resamples[0] == 1).all()
    assert (results.resamples.sum(axis=1) == len(results.families)).all()


def test_families_are_resampled_separately(results: Results) -> None:
    for group in results.groups[1:]:
        share = results.resamples_of(group).sum(axis=1)
        assert (share == results.families.count(group)).all()


def test_intervals_cover_the_true_value_at_their_stated_rate() -> None:
    random = np.random.default_rng(1)
    covered = 0
    for _ in range(40):
        quality = (random.random(60) < 0.7).tolist()
        found = make_results(cells=[cell("chow", dial=0.1, quality=quality)], families="a" * 60)
        got = found.metrics["a"].estimate(found.cells[-1], "quality")
        covered += got.low <= 70 <= got.high
    assert covered >= 34


def test_a_difference_is_paired_by_item() -> None:
    """Two settings that miss the same items differ by exactly zero."""
    quality = [0, 1, 1, 0, 1, 0]
    twins = [cell("chow", dial=dial, quality=quality) for dial in (0.1, 0.2)]
    found = make_results(cells=twins, families="a" * 6)
    metrics = found.metrics["a"]
    difference = metrics.difference(found.cells[-1], found.cells[-2])
    assert (difference.low, difference.value, difference.high) == (0, 0, 0)
    assert metrics.estimate(found.cells[-1], "quality").high > 60


def test_latency_is_relative_to_the_expert_alone(results: Results) -> None:
    expert = results.find("expert_only", temperature=0)
    found = results.metrics[ALL].estimate(expert, "latency")
    assert (found.low, found.value, found.high) == (1, 1, 1)


def test_a_rate_whose_divisor_is_zero_is_undefined(results: Results) -> None:
    drafter = results.find("drafter_only", temperature=0)
    assert np.isinf(results.metrics[ALL].estimate(drafter, "tokens_per_expert_pass").value)
    assert np.isnan(estimate(np.array([np.nan, 1.0])).low)


def test_results_are_the_same_after_saving_and_loading(results: Results, tmp_path: Path) -> None:
    save(results, tmp_path / "results.json", figures=[])
    again = load(tmp_path)
    assert again.families == results.families
    assert [c.setting for c in again.cells] == [c.setting for c in results.cells]
    for one, other in zip(again.cells, results.cells, strict=True):
        for name, column_N in other.columns.items():
            np.testing.assert_allclose(one.columns[name], column_N, atol=1e-6)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "is not a results.json"),
        ("[", "is not a results.json"),
        ('{"format": 9}', "format 9"),
    ],
)
def test_a_file_that_holds_no_results_is_refused(
    tmp_path: Path, content: str, message: str
) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(InvalidMeasurement, match=message):
        load(path)


def test_the_error_for_a_missing_file_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(InvalidMeasurement, match="give the folder of `cascade evaluate`"):
        load(tmp_path)


def test_undefined_numbers_are_null_in_the_file(tmp_path: Path) -> None:
    found = make_results(cells=[cell("chow", dial=0.1, bleu=[0.5, np.nan])], families="ab")
    save(found, tmp_path / "results.json", figures=[])
    document: Any = json.loads((tmp_path / "results.json").read_text())
    assert document["cells"][-1]["columns"]["bleu"] == [0.5, None]
