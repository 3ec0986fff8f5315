from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support.evaluation_results import cell, make_results

from cascade.evaluation.compare import (
    MIN_ITEMS,
    View,
    better,
    curve_points,
    equal,
    keeps_quality,
    matched,
    recommended,
)
from cascade.evaluation.report import conclusions, finding_tables

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


@pytest.mark.parametrize(
    ("lost", "margin", "is_kept"),
    [(0, 2.0, True), (1, 2.0, False), (1, 10.0, True), (6, 10.0, False)],
)
def test_a_loss_counts_as_none_only_if_its_interval_is_within_the_margin(
    lost: int, margin: float, *, is_kept: bool
) -> None:
    near = cell("chow", dial=0.1, quality=share(30 - lost), rejected=FEW)
    found = matched(replace(view(EXPERT, LOSSLESS, near), margin=margin))
    assert (found.cell is not None) is is_kept


@settings(max_examples=40)
@given(
    qualities=st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.0, 0.5, 1.0])), min_size=1
    ),
    margin=st.floats(0, 20),
)
def test_nothing_is_called_equal_that_may_be_worse_than_the_margin(
    qualities: list[tuple[float, float]], margin: float
) -> None:
    ours, experts = (list(column) for column in zip(*qualities, strict=True))
    cells = [cell("expert_only", quality=experts), cell("chow", dial=0.5, quality=ours)]
    results = make_results(cells=cells, families="a" * len(qualities))
    compared = View(results=results, group="a", temperature=0, draft_tokens=5, margin=margin)
    found, best = matched(compared), recommended(compared)
    proven = (
        len(qualities) >= MIN_ITEMS
        and compared.metrics.difference(results.cells[-1], compared.expert).low >= -margin
    )
    assert (found.cell is not None) == proven
    assert best.setting.curve in ("lossless", "expert_only") or keeps_quality(compared, best)
    assert found.items == len(qualities)


@pytest.mark.parametrize(("count", "is_few"), [(2, True), (29, True), (30, False), (300, False)])
def test_conclusions_state_the_number_of_items_and_warn_of_few(count: int, *, is_few: bool) -> None:
    cheap = cell("chow", dial=0.5, modelled_s=[1.0] * count)
    bad = cell("drafter_only", quality=[0.0] * count)
    results = make_results(cells=[bad, cheap], families="a" * count)
    (found,) = conclusions(results)
    setting = "lossless: the expert's own distribution" if is_few else "chow 0.5: same quality"
    assert found.headline.startswith(f"Use {setting}")
    assert found.headline.endswith(f"{count} items.")
    assert ("prove nothing about quality" in found.warning) is is_few


def test_a_conclusion_states_quality_passes_and_latency_of_what_it_recommends() -> None:
    cheap = cell("chow", dial=0.5, modelled_s=[1.0] * COUNT, expert_passes=[4.0] * COUNT)
    bad = cell("drafter_only", quality=[0.0] * COUNT)
    (found,) = conclusions(make_results(cells=[cheap, bad], families="a" * COUNT), margin=1)
    assert found.headline == (
        "Use chow 0.5: same quality within 1 point, 0.40 of the expert's passes, 40 items."
    )
    assert "quality 100.0 points (the expert alone: 100.0), 0.10 of the expert's" in found.detail
    assert not found.warning


def test_where_nothing_is_faster_the_conclusion_is_the_expert_alone() -> None:
    slow = cell("lossless", modelled_s=[99.0] * COUNT)
    drafter = cell("drafter_only", quality=[0.0] * COUNT, modelled_s=[1.0] * COUNT)
    (found,) = conclusions(make_results(cells=[slow, drafter], families="a" * COUNT))
    assert found.headline.startswith("Use expert_only: nothing faster keeps its quality, 40 items")


def test_no_share_is_told_where_lossless_rejects_nothing() -> None:
    cells = [cell("lossless", rejected=[0.0] * COUNT), cell("chow", dial=0.1, rejected=FEW)]
    tables = finding_tables(make_results(cells=cells, families="a" * COUNT))
    values = {value for table in tables for row in table.rows for value in row}
    assert "chow 0.1" in values
    assert not any("inf" in value or "nan" in value for value in values)


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
