"""The CPU half of the GPU report: the same code with tiny sizes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.gpu.report import SECTIONS, run
from tests.gpu.sections import scale_of

HERE = Path(__file__).parent
SCALE = scale_of("cpu")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What the script prints."""
    printed = subprocess.run(  # noqa: S603 - our own script
        [HERE / "run.sh", "--device", "cpu", "--limit-s", "1200"],
        env=os.environ | {"PYTHON": sys.executable},
        stdout=subprocess.PIPE,
        check=True,
    ).stdout
    return json.loads(printed)


def findings(found: dict[str, Any], section: str) -> list[dict[str, Any]]:
    return found["sections"][section]["findings"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_section_ends_without_an_error(found: dict[str, Any]) -> None:
    assert list(found["sections"]) == list(SECTIONS)
    assert {name: one["error"] for name, one in found["sections"].items()} == dict.fromkeys(
        SECTIONS
    )
    assert all(one["findings"] for one in found["sections"].values())
    assert found["ok"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_path_gives_the_logits_of_the_cpu(found: dict[str, Any]) -> None:
    paths = findings(found, "paths")
    assert {one["path"] for one in paths} == {"captured", "flat", "padded"}
    assert {one["model"] for one in paths} == {*SCALE.architectures, *SCALE.padded}
    for one in paths:
        assert one["ok"], one
        if not one.get("deterministic"):
            assert one["rows"] > 100
            assert one["median"] <= max(2 * one["plain_median"], 1e-6)
        assert bool(one.get("graphs")) == (one["path"] == "captured")


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_steps_are_timed_for_every_number_of_sessions(found: dict[str, Any]) -> None:
    steps = findings(found, "steps medium")[1:]
    timed = {(one["sessions"], one["block_tokens"]) for one in steps}
    assert timed == {(sessions, block) for sessions in SCALE.sessions for block in (0, 5)}
    assert all(one["step_ms"] > 0 < one["floor_ms"] for one in steps)
    assert all(0 < one["verification_share"] < 1 for one in steps)
    graphs = findings(found, "graphs")
    assert {one["sessions"] for one in graphs} == set(SCALE.sessions)
    assert all(one["captured_ms"] > 0 < one["flat_ms"] for one in graphs)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_blocks_drafted_with_one_read_are_those_drafted_by_token(found: dict[str, Any]) -> None:
    blocks = findings(found, "blocks")
    assert {one["sessions"] for one in blocks} == set(SCALE.sessions)
    for one in blocks:
        assert one["ok"]
        assert one["same_blocks"] == 1
        assert one["by_token_ms"] > 0 < one["ahead_ms"]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_two_processes_write_the_experts_text(found: dict[str, Any]) -> None:
    modes = findings(found, "pair large")
    for mode in ("expert_only", "lossless", "token_v3"):
        of_mode = [one for one in modes if one["mode"] == mode]
        assert [one["streams"] for one in of_mode] == list(SCALE.streams)
        assert all(one["tokens_per_s"] > 0 for one in of_mode)
    for one in modes:
        if one["mode"] == "token_v3":
            continue
        assert one["same_text"] == 1
        assert (one["drafted"] > 0) == (one["mode"] == "lossless")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("section", "limit_s", "error"),
    [("steps unknown", 120, "KeyError: 'unknown'"), ("device", 0.2, "it was not done after 0 s")],
)
def test_a_section_that_fails_or_takes_too_long_is_reported(
    section: str, limit_s: float, error: str
) -> None:
    assert error in run(section, device="cpu", limit_s=limit_s)["error"]
