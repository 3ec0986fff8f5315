"""What commands show while they work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.cli.stages import stages

if TYPE_CHECKING:
    import pytest


def test_without_a_terminal_each_stage_is_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    with stages() as show:
        show("loading")
        for done in range(3):
            show("asking", done, 3)
        show("writing")
    assert capsys.readouterr().err.splitlines() == ["loading", "asking", "writing"]


def test_on_a_terminal_the_stage_is_a_bar_that_goes_away(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with stages() as show:
        show("asking", 1, 3)
    shown = capsys.readouterr().err
    assert "asking" in shown
    assert "1/3" in shown
    assert shown.endswith("\x1b[2K")
