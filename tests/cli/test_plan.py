from __future__ import annotations

import re

import pytest
import torch
from typer.testing import CliRunner

from cascade.cli import app
from cascade.demo import DRAFTER, EXPERT


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def test_each_model_has_a_row_of_what_it_needs_and_holds() -> None:
    code, text = run(str(DRAFTER), str(EXPERT), "--gpu", "24", "--session-tokens", "512")
    assert code == 0
    assert "90% of a GPU of 24 GiB" in text
    rows = [line for line in text.splitlines() if "GiB" in line and "KiB" in line]
    sessions = [int(row.split("│")[-2].replace(",", "")) for row in rows]
    assert len(sessions) == 2
    assert sessions[0] > sessions[1] > 1000
    _, text = run(str(EXPERT), "--gpu", "24", "--session-tokens", "512", "--num-gpus", "0.25")
    shared = int(re.findall(r"│ *([\d,]+) *│\n", text)[0].replace(",", ""))
    assert shared == pytest.approx(sessions[1] / 4, rel=0.02)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_its_size_has_to_be_given() -> None:
    code, text = run(str(DRAFTER))
    assert code == 2
    assert "--gpu" in text


def test_what_is_no_model_is_named() -> None:
    code, text = run("/nowhere/at/all", "--gpu", "24")
    assert code == 2
    assert "/nowhere/at/all" in text
    assert "config.json" in text
