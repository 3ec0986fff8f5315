from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
from tests.support.evaluation_results import cell, make_results

from cascade.evaluation.compare import View, better, curve_points, equal, matched

if TYPE_CHECKING:
    from cascade.evaluation.results import Cell, Results

COUNT = 40

FEW, MANY = np.full(COUNT, 1.0).tolist(), np.full(COUNT, 4.0).tolist()


def share(right: int) -> list[float]:
    """Return qualities of which the first `right` are 1."""
    return [1.0] * right + [0.0] * (COUNT - right)


def view(*cells: Cell) -> View:
    results: Results = make_results(cells=cells, families="a" * COUNT)
    return View(results=results, group="a", temperature=0, draft_tokens=5)


EXPERT = cell("expert_only", quality=share(30))

LOSSLESS = cell("lossless", quality=share(30), rejected=MANY)


def test_the_fewest_rejections_at_the_experts_quality_are_found() -> None:
    compared = view(
        EXPERT,
        LOSSLESS,
        cell("chow", dial=0.1, quality=share(30), rejected=FEW),
        cell("chow", dial=0.5, quality=share(10), rejected=[0.0] * COUNT),
        cell("opt", dial=0.1, quality=share(30), rejected=MANY),
    )
    found = matched(compared)
    assert found.cell is not None
    assert found.cell.setting.name == "chow 0.1"
    assert found.ratio.value == pytest.approx(0.25)
    assert found.pays
    assert found.halves == (pytest.approx(0.25), pytest.approx(0))
    of_opt = matched(compared, curve="opt")
    assert of_opt.ratio.value == 1
    assert not of_opt.pays


def test_a_rule_that_never_keeps_the_quality_has_no_matching_setting() -> None:
    compared = view(EXPERT, LOSSLESS, cell("chow", dial=0.9, quality=share(3), rejected=FEW))
    found = matched(compared)
    assert found.cell is None
    assert not found.pays
    assert found.lossless_rate.value == pytest.approx(0.4)


def test_a_small_loss_within_the_interval_counts_as_the_experts_quality() -> None:
    near = cell("chow", dial=0.1, quality=share(29), rejected=FEW)
    assert matched(view(EXPERT, LOSSLESS, near)).cell is not None
    assert matched(view(EXPERT, LOSSLESS, near)).difference.value == pytest.approx(-2.5)


def test_curves_are_compared_at_the_rejection_rates_that_both_reach() -> None:
    """Lossy falls in a straight line from 75 to 25 points; token_v3 stays 10 points above it."""
    compared = view(
        EXPERT,
        LOSSLESS,
        cell("lossy", dial=0.9, quality=share(10), rejected=[0.0] * COUNT),
        cell("token_v3", dial=0.5, quality=share(30), rejected=[3.2] * COUNT),
        cell("token_v3", dial=0.9, quality=share(22), rejected=[1.6] * COUNT),
    )
    found = equal(compared, curve="token_v3", lossy="lossy")
    assert found is not None
    assert (found.low, found.high) == (pytest.approx(0.16), pytest.approx(0.32))
    assert found.difference.value == pytest.approx((10 + 10) / 2)


def test_curves_without_a_common_range_are_not_compared() -> None:
    lossy = cell("lossy", dial=0.5, quality=share(30), rejected=MANY)
    chow = cell("chow", dial=0.5, quality=share(30), rejected=FEW)
    assert equal(view(EXPERT, LOSSLESS, lossy, chow), curve="chow", lossy="lossy") is None
    assert equal(view(EXPERT, LOSSLESS, chow), curve="chow", lossy="lossy") is None


def test_curves_that_reach_lossless_include_its_point() -> None:
    compared = view(LOSSLESS, cell("chow", dial=0.5), cell("token_v3", dial=0.5))
    assert curve_points(compared, "chow")[0].shape[0] == 2
    assert curve_points(compared, "token_v3")[0].shape[0] == 1


def test_only_settings_whose_interval_is_above_the_expert_beat_it() -> None:
    compared = view(
        EXPERT,
        cell("chow", dial=0.1, quality=share(38)),
        cell("chow", dial=0.2, quality=share(31)),
        cell("opt", dial=0.1, quality=share(40)),
        cell("lossy", dial=0.1, quality=share(40)),
    )
    assert [cell.setting.name for cell, _ in better(compared)] == ["opt 0.1", "chow 0.1"]
