"""`cascade bench`, from words to files."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path

import psutil
import pytest
from typer.testing import CliRunner

from cascade.benchmark.synthetic_model import is_padded
from cascade.cli import app

RUNNER = CliRunner()


def test_a_run_writes_figures_table_and_plot(tmp_path: Path) -> None:
    words = (
        "bench run facts --count 2 --rounds 1 --ask expert_only --ask lossless@2 --concurrency 2"
        " --expert-threads 1 --slo ttft=60000 --out"
    )
    ended = RUNNER.invoke(app, [*words.split(), str(tmp_path)])
    assert ended.exit_code == 0, ended.output
    told = json.loads((tmp_path / "bench.json").read_text())
    assert [one["name"] for one in told["contenders"]] == ["expert_only", "lossless@2"]
    assert all(one["other_texts"] == [] for one in told["contenders"])
    assert all(one["median"]["good_share"] == 1 for one in told["contenders"])
    assert {path.name for path in tmp_path.iterdir()} == {"bench.json", "bench.md", "bench.png"}
    assert "| lossless@2 |" in ended.output


def test_a_trace_sets_times_and_lengths(tmp_path: Path) -> None:
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"at_s": 0, "prompt_tokens": 40, "max_tokens": 3}\n'
        '{"at_s": 0.01, "prompt": "What is the capital of France?", "max_tokens": 4}\n'
    )
    words = "bench run facts --count 1 --rounds 1 --ask expert_only --expert-threads 1"
    more = ["--trace", str(trace), "--out", str(tmp_path / "out")]
    ended = RUNNER.invoke(app, [*words.split(), *more])
    assert ended.exit_code == 0, ended.output
    told = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert told["contenders"][0]["median"]["tokens"] == 3 + 4


def test_a_padded_model_is_written(tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = ["bench", "pad", "--parameters", "60M", "--out", str(out)]
    ended = RUNNER.invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert is_padded(out)
    assert "cost-padded" in ended.output


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("pad --parameters lots --out nowhere", "no number of parameters"),
        ("run nonsense.jsonl", "cannot be read"),
        ("run facts --ask warp", "no curve `warp`"),
        ("run facts --slo speed=1", "--slo"),
        ("run facts --rate 0", "requests a second"),
        ("run facts --peer telepathy --count 1", "no peer"),
        ("run facts --url http://127.0.0.1:9 --count 1", "no server answers"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_line(words: str, said: str) -> None:
    ended = RUNNER.invoke(app, ["bench", *words.split()])
    assert ended.exit_code == 2
    assert said in " ".join(ended.output.split())


async def test_a_run_that_is_terminated_leaves_no_tier(tmp_path: Path) -> None:
    """As Ctrl-C does, what ends the command ends what it started."""
    command = Path(sys.executable).with_name("cascade")
    words = ("bench", "run", "facts", "--apart", "--count", "2", "--out", str(tmp_path))
    pipe, joined = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(command, *words, stdout=pipe, stderr=joined)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while b"warm" not in await process.stdout.readline():
            assert process.returncode is None
    children = psutil.Process(process.pid).children()
    assert len(children) == 2
    process.terminate()
    await process.communicate()
    assert process.returncode != 0
    assert not psutil.wait_procs(children, timeout=20)[1]
