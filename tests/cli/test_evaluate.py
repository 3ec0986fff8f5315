from __future__ import annotations

import json
from contextlib import nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

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


def test_a_workload_is_evaluated_resumed_and_tuned(
    two: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    first = run("evaluate", two, "--out", str(out), *GRID)
    assert first.exit_code == 0, first.output
    assert "token_v3 0.9" in first.output
    assert "2 items prove nothing about quality" in first.output
    assert "none proven" in first.output
    lines = first.stderr.splitlines()
    assert [line for line in lines if line and not line.startswith("Loading weights")] == [
        "loading torch and transformers",
        "loading the pair",
        "measuring the cost of a forward pass",
        "answering",
        "writing the report",
    ]
    assert (out / "report.html").exists()
    written = {path.name: path.stat().st_mtime_ns for path in (out / "cells").iterdir()}
    assert set(written) == {
        "expert_only_t0.json", "drafter_only_t0.json", "lossless_t0_d3.json",
        "token_v3_0.9_t0_d3.json",
    }  # fmt: skip

    name = json.loads((out / "run.json").read_text())["answered_by"]
    # A client that cannot complete anything: finished settings are not run again.
    silent = nullcontext(SimpleNamespace(name=name))
    monkeypatch.setattr("cascade.evaluation.client.start_in_process", Mock(return_value=silent))
    again = run("evaluate", two, "--out", str(out), *GRID)
    assert again.exit_code == 0, again.output
    assert {p.name: p.stat().st_mtime_ns for p in (out / "cells").iterdir()} == written

    tuned = run("tune", str(out), "--target", "quality >= 0", "--out", str(tmp_path / "t.yaml"))
    assert tuned.exit_code == 0, tuned.output
    Application.model_validate(yaml.safe_load((tmp_path / "t.yaml").read_text()))
    assert "met with probability 1.00" in (out / "tune.html").read_text()
    shown = run("tune", str(out), "--target", "quality >= 0", "--goal", "rejections")
    assert "all met with probability 1.00" in shown.output
    assert "2 items prove nothing about quality" in shown.stderr

    other = tmp_path / "other.jsonl"
    other.write_text(LINES[0])
    changed = run("evaluate", str(other), "--out", str(out), *GRID)
    assert changed.exit_code == 2
    assert "holds another evaluation" in changed.stderr
    page = tmp_path / "missed.html"
    missed = run("tune", str(out), "--target", "quality >= 101", "--report", str(page))
    assert missed.exit_code == 2
    assert "the nearest is" in missed.stderr
    assert "No setting meets" in page.read_text()
    nowhere = run("tune", str(out), "--target", "quality >= 0", "--report", str(out / "no" / "t"))
    assert nowhere.exit_code == 2
    assert "cannot be written" in nowhere.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (LINES[0] + "\n" + LINES[1][:-1], "line 2: Invalid JSON"),
        (LINES[0].replace("contains", "blue"), 'line 1: `scorer` is "blue"; wanted one of exact'),
    ],
)
def test_an_invalid_workload_is_one_error(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    result = run("evaluate", str(path), "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--rule", "chaw", "--alpha", "1"], "did you mean `chow`?"),
        (["--rule", "chow"], "--rule and --alpha go together"),
        (["--rule", "chow", "--alpha", "2"], "`chow` has no dial 2.0"),
        (["--grid", "none.yaml"], "cannot be read"),
        (["--grid", "none.yaml", "--temperature", "1"], "--grid excludes"),
        (["--config", "none.yaml"], "none.yaml cannot be used"),
        (["--url", "http://127.0.0.1:9", "--config", "x"], "give one"),
        (["--url", "http://127.0.0.1:9"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_wrong_options_are_a_one_line_error(
    two: str, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run("evaluate", two, "--out", str(tmp_path / "out"), *options)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error ")
    assert "Traceback" not in result.stderr


def test_a_yaml_without_applications_is_refused(two: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("applications: []")
    result = run("evaluate", two, "--config", str(path))
    assert result.exit_code == 2
    assert "wanted a file like cluster/local.yaml" in result.stderr


def test_a_server_that_refuses_requests_ends_the_evaluation(
    two: str, serving: Serving, tmp_path: Path
) -> None:
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


def test_tuning_without_results_says_what_to_give(tmp_path: Path) -> None:
    result = run("tune", str(tmp_path), "--target", "quality >= 1")
    assert result.exit_code == 2
    assert "give the folder of `cascade evaluate`" in result.stderr


@pytest.mark.parametrize("option", [["--target", "good"], ["--target", "quality >= 1", "--goal=x"]])
def test_an_invalid_target_or_goal_is_refused(tmp_path: Path, option: list[str]) -> None:
    (tmp_path / "results.json").write_text(
        '{"format": 2, "about": {}, "families": [], "cells": []}'
    )
    result = run("tune", str(tmp_path), *option)
    assert result.exit_code == 2
    assert "wanted one" in result.stderr
