from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner

from cascade.benchmark import synthetic_model
from cascade.cli import app
from cascade.demo import EXPERT

if TYPE_CHECKING:
    from pathlib import Path

MIB = 2**20
FIGURES = r"(\w+): weights (\d+) MiB; peak (\d+) MiB .*; afterwards (\d+) MiB "


def figures(*arguments: str) -> tuple[str, int, int, int]:
    """Return the runner, and the MiB of weights, peak and afterwards."""
    result = CliRunner().invoke(app, ["bench", "load", *arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    found = re.search(FIGURES, result.output)
    assert found, result.output
    return found[1], int(found[2]), int(found[3]), int(found[4])


@pytest.mark.parametrize(
    ("path", "runner", "dtype"),
    [
        ("auto", "CpuLlamaRunner", "float32"),
        pytest.param("auto", "CpuLlamaRunner", "bfloat16", marks=pytest.mark.slow),
        pytest.param("flat", "VarlenRunner", "float32", marks=pytest.mark.slow),
        pytest.param("flat", "VarlenRunner", "bfloat16", marks=pytest.mark.slow),
        pytest.param("padded", "PaddedRunner", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_a_model_is_loaded_into_its_final_layout(
    path: str, runner: str, dtype: str, tmp_path: Path
) -> None:
    """Libraries and passes take up to 200 MiB whatever the model is."""
    shape = synthetic_model.ModelShape(hidden=768, intermediate=3072, layers=8, heads=12, groups=6)
    synthetic_model.write(str(EXPERT), out=tmp_path, shape=shape, dtype=torch.bfloat16)
    chosen, weights, peak, after = figures(str(tmp_path), "--dtype", dtype, "--path", path)
    assert chosen == runner
    # Bfloat16 weights may stay mapped from their file, whose pages are not counted.
    least = weights if dtype == "float32" else 0
    assert least <= after <= peak <= 1.15 * weights + 200


def test_an_unknown_path_is_named() -> None:
    result = CliRunner().invoke(app, ["bench", "load", str(EXPERT), "--path", "flatt"])
    assert result.exit_code == 2
    assert "--path is 'flatt'" in result.output


@pytest.mark.slow
def test_what_is_no_model_is_named(tmp_path: Path) -> None:
    missing = CliRunner().invoke(app, ["bench", "load", str(tmp_path / "nothing")])
    assert missing.exit_code == 2
    assert "nothing" in missing.output
