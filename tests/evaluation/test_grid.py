from __future__ import annotations

from pathlib import Path

import pytest

from cascade.api.schema import Options
from cascade.errors import InvalidMeasurement
from cascade.evaluation import grid
from cascade.evaluation.grid import (
    BASELINES,
    CURVES,
    DEFAULT_CURVES,
    GridBlock,
    Setting,
    merge_blocks,
    read_grid,
)
from cascade.types import Bonus, Mode

DOCS = Path(__file__).parents[2] / "docs"

DIALS = dict.fromkeys(CURVES, 0.5) | {"sequence_cascade": -0.1}


def read(folder: Path, text: str) -> list[Setting]:
    path = folder / "grid.yaml"
    path.write_text(text)
    return read_grid(path)


def test_the_server_accepts_the_request_of_every_curve() -> None:
    curves = {curve: [dial] for curve, dial in DIALS.items()}
    settings = GridBlock(curves=curves, bonus=Bonus.TARGET).settings()
    options = {setting.curve: Options.model_validate(setting.options()) for setting in settings}
    assert set(options) == {*CURVES, *BASELINES}
    assert {option.mode for option in options.values()} == set(Mode)
    assert {curve for curve, option in options.items() if option.draft_tokens is None} == {
        "expert_only", "drafter_only", "token_cascade", "sequence_cascade",
    }  # fmt: skip


def test_the_module_docstring_describes_every_mode() -> None:
    for name in ("lossy_solved", *(mode.value for mode in Mode)):
        assert name in (grid.__doc__ or "")


def test_every_grid_has_the_baselines_and_no_duplicates() -> None:
    settings = GridBlock(temperatures=[0, 1], draft_tokens=[3, 5], curves={"chow": [0.1, 0.1]})
    found = settings.settings()
    assert len(found) == len(set(found)) == 2 * (2 + 2 * (1 + 1))
    assert len({setting.key for setting in found}) == len(found)


def test_the_default_grid_has_the_default_curves() -> None:
    curves = {setting.curve for setting in merge_blocks([GridBlock()])}
    assert curves == {*DEFAULT_CURVES, *BASELINES}


def test_a_file_may_have_several_blocks(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        "- {temperatures: [0], curves: {chow: [0.1]}}\n"
        "- {temperatures: [1], curves: {lossy: [0.1]}, draft_tokens: [3]}\n",
    )
    dialled = {setting.key for setting in settings if setting.dial is not None}
    assert dialled == {"chow_0.1_t0_d5", "lossy_0.1_t1_d3"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("curves: {chaw: [0.1]}", "no curve `chaw`.*chow"),
        ("curves: {chow: [1.5]}", "`chow` has no dial 1.5.*less than or equal to 1"),
        ("curves: {lossy: [1]}", "`lossy` has no dial 1.*less than 1"),
        ("curves: {opt: [.nan]}", "`opt` has no dial nan"),
        ("curves: {chow: [high]}", "`0.curves.chow.0`|`curves.chow.0`: input should be a valid"),
        ("temperatures: [3]", "temperatures.0.*less than or equal to 2"),
        ("temperatures: []", "temperatures.*at least 1 item"),
        ("draft_tokens: [0]", "draft_tokens.0.*greater than or equal to 1"),
        ("alphas: [1]", "alphas.*a block has temperatures, draft_tokens, curves, bonus, phases"),
        ("phases: {tool: chaw 0.1}", "no rule `chaw 0.1` for `tool`.*did you mean `chow`"),
        ("phases: {tool: chow 2}", "`chow` has no dial 2"),
        ("phases: {tool: chow}", "`chow` has no dial None"),
        ("phases: {tool: chow high}", "`chow` has no dial high; wanted a number"),
        ("phases: {tools: lossless}", "phases.tools"),
        ("- 1", "valid dictionary"),
        ("{", "cannot be read"),
    ],
)
def test_an_invalid_grid_is_refused_with_the_reason(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InvalidMeasurement, match=message):
        read(tmp_path, text)


def test_a_block_may_have_other_rules_for_phases(tmp_path: Path) -> None:
    settings = read(
        tmp_path,
        "{curves: {token_v3: [0.9], lossy: [0.2]}, phases: {tool: lossless, answer: chow 0.3}}",
    )
    assert len(settings) == len(BASELINES) + 2
    (cascade,) = [one for one in settings if one.phases]
    assert cascade.name == "token_v3 0.9, tool lossless, answer chow 0.3"
    assert cascade.key == "token_v3_0.9_t0_d5_tool-lossless_answer-chow-0.3"
    assert Options.model_validate(cascade.options()).phases is not None
    assert cascade.options()["phases"] == {
        "tool": {"kind": "lossless"}, "answer": {"kind": "chow", "alpha": 0.3},
    }  # fmt: skip


def test_a_missing_grid_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidMeasurement, match="cannot be read"):
        read_grid(tmp_path / "none.yaml")


def test_the_grid_in_the_docs_has_every_default_curve() -> None:
    settings = read_grid(DOCS / "evaluate-grid.yaml")
    for temperature in (0, 1):
        found = {one.curve for one in settings if one.temperature == temperature}
        assert found == {*DEFAULT_CURVES, *BASELINES}
