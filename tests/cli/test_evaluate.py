from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from typer.testing import CliRunner, Result

from cascade.cli import app
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    Serving = Callable[[Any], Any]

LINES = (
    '{"prompt": "What is the capital of France?", "reference": "Paris", "scorer": "contains"}',
    '{"prompt": "Who is Buzz Aldrin?", "references": ["astronaut"], "scorer": "contains"}',
)
GRID = ("--rule", "token_v3", "--alpha", "0.9", "--temperature", "0", "--draft-tokens", "3")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def two(tmp_path: Path) -> str:
    path = tmp_path / "two.jsonl"
    path.write_text("\n".join(LINES))
    return str(path)


def test_two_lines_are_evaluated_gone_on_with_and_tuned(two: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = run("evaluate", two, "--out", str(out), *GRID)
    assert first.exit_code == 0, first.output
    assert "token_v3 0.9" in first.output
    assert "Fewest rejections at the expert's quality" in first.output
    assert (out / "report.html").exists()
    written = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert set(written) == {
        "expert_only_t0.json", "drafter_only_t0.json", "lossless_t0_d3.json",
        "token_v3_0.9_t0_d3.json",
    }  # fmt: skip

    again = run("evaluate", two, "--out", str(out), *GRID)
    assert again.exit_code == 0, again.output
    assert {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()} == written

    tuned = run("tune", str(out), "--target", "quality >= 0", "--out", str(tmp_path / "t.yaml"))
    assert tuned.exit_code == 0, tuned.output
    Application.model_validate(yaml.safe_load((tmp_path / "t.yaml").read_text()))
    shown = run("tune", str(out), "--target", "quality >= 0", "--goal", "rejections")
    assert "all met with probability 1.00" in shown.output

    other = tmp_path / "other.jsonl"
    other.write_text(LINES[0])
    changed = run("evaluate", str(other), "--out", str(out), *GRID)
    assert changed.exit_code == 2
    assert "holds another evaluation" in changed.stderr
    missed = run("tune", str(out), "--target", "quality >= 101")
    assert missed.exit_code == 2
    assert "the nearest is" in missed.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "is empty"),
        (LINES[0] + "\n" + LINES[1][:-1], "line 2: Invalid JSON"),
        (LINES[0].replace("contains", "blue"), 'line 1: `scorer` is "blue"; wanted one of exact'),
    ],
)
def test_a_broken_file_is_named_in_one_error(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    result = run("evaluate", str(path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert told in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--rule", "chaw", "--alpha", "1"], "no curve `chaw`"),
        (["--rule", "chow"], "--rule and --alpha go together"),
        (["--rule", "chow", "--alpha", "2"], "`chow` has no dial 2.0"),
        (["--grid", "none.yaml"], "cannot be read"),
        (["--grid", "none.yaml", "--temperature", "1"], "--grid says all"),
        (["--config", "none.yaml"], "none.yaml cannot be taken"),
        (["--url", "http://127.0.0.1:9", "--config", "x"], "give one"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_wrong_options_are_told_in_one_line(
    two: str, tmp_path: Path, options: list[str], told: str
) -> None:
    result = run("evaluate", two, "--out", str(tmp_path / "out"), *options)
    assert result.exit_code == 2
    assert told in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_yaml_without_applications_is_no_configuration(two: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("applications: []")
    result = run("evaluate", two, "--config", str(path))
    assert result.exit_code == 2
    assert "wanted a file like cluster/local.yaml" in result.stderr


def test_a_refusing_server_ends_the_evaluation(two: str, serving: Serving, tmp_path: Path) -> None:
    error = {"error": {"message": "alpha is bad", "type": "invalid_request_error", "param": None}}
    models = {"object": "list", "data": [{"id": "m", "object": "model", "created": 1}]}
    responses = {
        "/v1/models": (200, "application/json", json.dumps(models).encode()),
        "/v1/chat/completions": (400, "application/json", json.dumps(error).encode()),
    }
    with serving(responses) as server:
        result = run("evaluate", two, "--url", server.url, "--out", str(tmp_path / "o"), *GRID)
    assert result.exit_code == 2
    assert "the server refuses" in result.stderr
    assert "alpha is bad" in result.stderr


def test_tuning_what_was_never_evaluated_says_what_to_give(tmp_path: Path) -> None:
    result = run("tune", str(tmp_path), "--target", "quality >= 1")
    assert result.exit_code == 2
    assert "give the folder of `cascade evaluate`" in result.stderr


@pytest.mark.parametrize("option", [["--target", "good"], ["--target", "quality >= 1", "--goal=x"]])
def test_a_target_or_goal_that_is_none_is_told(tmp_path: Path, option: list[str]) -> None:
    (tmp_path / "results.json").write_text(
        '{"format": 1, "about": {}, "families": [], "cells": []}'
    )
    result = run("tune", str(tmp_path), *option)
    assert result.exit_code == 2
    assert "wanted one" in result.stderr
