from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import yaml
from tests.support.evaluation_results import cell, make_results

from cascade.errors import InvalidMeasurement
from cascade.evaluation.grid import BASELINES, CURVES, Setting, validated
from cascade.evaluation.tune import Goal, Target, defaults, judged, parse, tune, yaml_fragment
from cascade.evaluation.tune_report import page
from cascade.settings import Application
from cascade.types import Mode

COUNT = 40

RESULTS = make_results(
    cells=[
        cell("expert_only", quality=[1.0] * 30 + [0.0] * 10),
        cell("drafter_only", quality=[1.0] * 10 + [0.0] * 30),
        cell("lossless", quality=[1.0] * 30 + [0.0] * 10, rejected=[4.0] * COUNT,
             expert_passes=[4.0] * COUNT),
        cell("chow", dial=0.1, quality=[1.0] * 30 + [0.0] * 10, rejected=[2.0] * COUNT,
             expert_passes=[3.0] * COUNT),
        cell("chow", dial=0.5, quality=[1.0] * 29 + [0.0] * 11, rejected=[1.0] * COUNT,
             expert_passes=[2.0] * COUNT),
        cell("token_v3", dial=0.9, quality=[1.0] * 20 + [0.0] * 20, rejected=[0.5] * COUNT,
             expert_passes=[1.0] * COUNT),
    ],
    families="a" * COUNT,
)  # fmt: skip


@pytest.mark.parametrize("count", [1, 2, 29])
def test_a_choice_on_few_items_warns(count: int) -> None:
    few = make_results(families="a" * count)
    choice = tune(few, [parse("quality >= expert")], group="a")
    assert choice.items == count
    assert "prove nothing" in choice.warnings[0]
    assert choice.warnings[0] in yaml_fragment(choice, few)


def test_a_choice_whose_quality_may_be_far_below_its_target_warns() -> None:
    wide = tune(RESULTS, [parse("quality >= 72")], group="a", goal=Goal.QUALITY)
    assert "may be missed by" in wide.warnings[0]
    proven = tune(RESULTS, [parse("quality >= expert - 0.5")], group="a")
    assert proven.warnings == []


def chosen(*targets: str, **options: Any) -> str:
    return tune(RESULTS, [parse(text) for text in targets], group="a", **options).setting.name


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("quality >= expert - 0.5",
         {"metric": "quality", "at_least": True, "baseline": "expert", "change": -0.5}),
        ("expert_passes <= 60%",
         {"metric": "expert_passes", "at_least": False, "baseline": "expert", "share": 0.6}),
        ("rejections<=60 % of lossless",
         {"metric": "rejections", "at_least": False, "baseline": "lossless", "share": 0.6}),
        ("Quality >= 85.5", {"metric": "quality", "at_least": True, "change": 85.5}),
        ("latency <= drafter + 1",
         {"metric": "latency", "at_least": False, "baseline": "drafter", "change": 1.0}),
    ],
)  # fmt: skip
def test_a_target_is_parsed(text: str, target: dict[str, Any]) -> None:
    assert parse(text) == Target(text=text, **target)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("good", "is not a target; wanted one like"),
        ("quality > 3", "is not a target"),
        ("beauty >= 3", "no metric `beauty`; wanted one of quality"),
        ("quality >= teacher", "no baseline `teacher`; wanted one of expert"),
        ("quality >= 90% of teacher", "no baseline `teacher`"),
    ],
)
def test_the_error_for_an_invalid_target_says_what_is_wanted(text: str, message: str) -> None:
    with pytest.raises(InvalidMeasurement, match=message):
        parse(text)


def test_a_bound_on_quality_chooses_the_fewest_rejections() -> None:
    assert chosen("quality >= expert") == "chow 0.1"
    assert chosen("quality >= expert - 3") == "chow 0.5"
    assert chosen("quality >= 40") == "token_v3 0.9"


def test_a_bound_on_cost_chooses_the_best_quality() -> None:
    assert chosen("expert_passes <= 25%") == "chow 0.5"
    assert chosen("rejections <= 5") == "token_v3 0.9"


def test_targets_combine_and_the_goal_can_be_named() -> None:
    assert chosen("quality >= 50", "expert_passes <= 3", goal=Goal.QUALITY) == "chow 0.1"
    assert chosen("quality >= 50", "rejections <= 60% of lossless") == "token_v3 0.9"
    assert chosen("quality >= 60", goal=Goal.EXPERT_PASSES) == "chow 0.5"


def test_more_confidence_chooses_a_surer_setting() -> None:
    """The faster setting misses one more item of 40 than the expert, 2.5 points."""
    unsure = tune(RESULTS, [parse("quality >= expert - 3")], group="a")
    assert 0.5 < unsure.probability < 0.95
    assert chosen("quality >= expert - 3", confidence=0.95) == "chow 0.1"


def test_the_error_where_no_setting_meets_a_target_names_the_nearest() -> None:
    with pytest.raises(InvalidMeasurement, match=r"nearest is .*quality >= 99: .*short by 24"):
        chosen("quality >= 99")


def test_the_error_for_an_unknown_family_or_temperature_lists_the_known() -> None:
    with pytest.raises(InvalidMeasurement, match="no family `z`; wanted one of a"):
        tune(RESULTS, [parse("quality >= 1")], group="z")
    with pytest.raises(InvalidMeasurement, match="no temperature 1; wanted one of 0"):
        chosen("quality >= 1", temperature=1.0)


def test_one_of_several_temperatures_must_be_named() -> None:
    both = make_results(
        cells=[cell("chow", dial=0.1), cell("expert_only", temperature=1)], families="aa"
    )
    with pytest.raises(InvalidMeasurement, match="temperatures 0, 1; name the one"):
        tune(both, [parse("quality >= 1")], group="a")


@pytest.mark.parametrize("curve", [*CURVES, *BASELINES])
def test_the_defaults_of_every_setting_are_valid_settings_of_a_server(curve: str) -> None:
    dial = {"sequence_cascade": -0.3}.get(curve, None if curve in BASELINES else 0.5)
    setting = validated(Setting(curve=curve, dial=dial, temperature=0.5, draft_tokens=3))
    found = Application.model_validate({"defaults": defaults(setting)}).defaults
    assert found.mode is setting.mode
    assert found.temperature == 0.5
    if setting.rule is not None:
        assert found.rule.kind == setting.rule["kind"]
    if setting.mode is Mode.SEQUENCE_CASCADE:
        assert found.confidence_threshold == -0.3
    if setting.mode is Mode.CASCADE:
        assert found.draft_tokens == 3


def test_the_yaml_has_comments_that_say_how_sure_the_choice_is() -> None:
    choice = tune(RESULTS, [parse("quality >= expert - 3")], group="a")
    text = yaml_fragment(choice, RESULTS)
    Application.model_validate(yaml.safe_load(text))
    assert "chow 0.5: rejections 10" in text
    assert "quality >= expert - 3: 72.5 [" in text
    assert f"all met with probability {choice.probability:.2f}" in text
    assert yaml.safe_load(text)["defaults"]["rule"] == {"kind": "chow", "alpha": 0.5}


def test_the_probability_is_of_all_targets_together() -> None:
    choice = tune(RESULTS, [parse("quality >= expert - 3"), parse("rejections <= 20")], group="a")
    alone = tune(RESULTS, [parse("quality >= expert - 3")], group="a")
    assert choice.probability == pytest.approx(alone.probability)
    assert np.isfinite(choice.reached.low)


def test_the_page_begins_with_the_choice_and_holds_its_yaml() -> None:
    choices = judged(RESULTS, [parse("quality >= expert - 0.5")], group="a")
    written = page(RESULTS, choices, confidence=0.5)
    (found,) = written.findings
    assert found.headline.startswith("Use chow 0.1: quality >= expert - 0.5 met with probability 1")
    assert "40 items of a" in found.headline
    yaml_section = next(one for one in written.sections if one.code)
    assert "kind: chow, alpha: 0.1" in yaml_section.code
    table = written.sections[-1].tables[0]
    assert len(table.rows) == len(RESULTS.cells) - 1, "all but the expert alone"
    assert table.marked == {"chow 0.1"}
    assert [row[1] for row in table.rows] == sorted((row[1] for row in table.rows), reverse=True)


def test_the_page_says_so_if_no_setting_meets_the_targets() -> None:
    choices = judged(RESULTS, [parse("quality >= 101")], group="a")
    written = page(RESULTS, choices, confidence=0.5)
    assert written.findings[0].headline.startswith("No setting meets quality >= 101; the nearest")
    assert "short by" in written.findings[0].detail
    assert not any(one.code for one in written.sections)
