"""`cascade bench`, from the command line to files."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from tests.support.benchmarks import system_result
from typer.testing import CliRunner

from cascade.benchmark.llama_server import DraftOptions
from cascade.benchmark.load import OpenLoop
from cascade.benchmark.runner import Comparison
from cascade.benchmark.synthetic_model import LABEL
from cascade.cli import app

if TYPE_CHECKING:
    from cascade.benchmark.plan import Plan

RUNNER = CliRunner()


def test_a_run_writes_json_table_and_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.benchmark.llama_server.DRAFTING", (DraftOptions(tokens=3),))
    words = (
        "bench run facts --count 2 --rounds 1 --ask expert_only --ask lossless@2 --concurrency 2"
        " --peer llama-server --expert-threads 1 --slo ttft=60000 --out"
    )
    ended = RUNNER.invoke(app, [*words.split(), str(tmp_path)])
    assert ended.exit_code == 0, ended.output
    report = json.loads((tmp_path / "bench.json").read_text())
    alone, drafted = "llama.cpp, expert alone", "llama.cpp, drafts of 3"
    names = ["expert_only", "lossless@2", alone, drafted]
    assert [one["name"] for one in report["contenders"]] == names
    assert all(one["other_texts"] == [] for one in report["contenders"])
    assert all(one["median"]["good_share"] == 1 for one in report["contenders"])
    written = {path.name for path in tmp_path.iterdir()}
    assert written == {f"bench.{kind}" for kind in ("html", "json", "md", "png")}
    assert "| lossless@2 |" in ended.output
    assert report["baseline"] in {"expert_only", alone}, "the fastest that runs the expert alone"
    assert report["llama_drafted"] == drafted
    ratios = {one["name"]: (one["ratio"], one["to_llama"]) for one in report["contenders"]}
    assert ratios[report["baseline"]][0]["median"] == ratios[drafted][1]["median"] == 1
    prompts = {one["name"]: one["median"]["prompt_ms"] for one in report["contenders"]}
    assert prompts[alone] > 0
    assert prompts["expert_only"] is None
    assert "xllamacpp" in report["notes"][-1]


def test_a_trace_sets_times_and_lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Plan] = []

    async def run_plan(plan: Plan, **_: object) -> Comparison:
        plans.append(plan)
        return Comparison(systems={"expert_only": system_result(1.0)})

    monkeypatch.setattr("cascade.benchmark.plan.run_plan", run_plan)
    trace = tmp_path / "trace.jsonl"
    trace.write_text(
        '{"at_s": 0, "prompt_tokens": 40, "max_tokens": 3}\n'
        '{"at_s": 0.01, "prompt": "What is the capital of France?", "max_tokens": 4}\n'
    )
    words = ["bench", "run", "facts", "--trace", str(trace), "--out", str(tmp_path / "out")]
    ended = RUNNER.invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert plans[0].load == OpenLoop(starts_s=(0.0, 0.01))
    filled, asked = plans[0].bodies
    assert len(filled["prompt"]) == 40
    assert asked["messages"][0]["content"] == "What is the capital of France?"
    assert [body["max_tokens"] for body in plans[0].bodies] == [3, 4]
    assert all(body["temperature"] == 0 for body in plans[0].bodies)


def test_a_synthetic_model_is_written(tmp_path: Path) -> None:
    out = tmp_path / "model"
    words = ["bench", "pad", "--parameters", "60M", "--out", str(out)]
    ended = RUNNER.invoke(app, words)
    assert ended.exit_code == 0, ended.output
    assert LABEL in json.loads((out / "config.json").read_text())
    assert "cost-padded" in ended.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("pad --parameters lots --out nowhere", "no number of parameters"),
        ("run nonsense.jsonl", "cannot be read"),
        ("run facts --ask warp", "no curve `warp`"),
        ("run facts --slo speed=1", "--slo"),
        ("run facts --rate 0", "requests a second"),
        ("run facts --peer telepathy --count 1", "no peer"),
        ("run facts --url http://127.0.0.1:9 --count 1", "no server answers"),
        ("run facts --ask tokenv3:0.9", "did you mean `token_v3`?"),
        ("run facts --peer assistted --count 1", "did you mean `assisted`?"),
        ("run facts --peer assisted=/bin/true --count 1", "only llama-server takes a path"),
        ("run facts --peer llama-server=/no/binary --count 1", "no program /no/binary"),
        ("run facts --dtype bfloat61", "did you mean `bfloat16`?"),
        ("run facts --config none.yaml", "none.yaml cannot be used"),
        ("suite --only one_steam", "did you mean `one_stream`?"),
        ("pad --parameters 30M --out nowhere --dtype float23", "did you mean `float32`?"),
    ],
)
def test_an_error_is_one_line(words: str, message: str) -> None:
    ended = RUNNER.invoke(app, ["bench", *words.split()])
    assert ended.exit_code == 2
    assert message in " ".join(ended.output.split())


@pytest.mark.parametrize("warm", [False, pytest.param(True, marks=pytest.mark.slow)])
async def test_a_terminated_run_leaves_no_tier_process(tmp_path: Path, *, warm: bool) -> None:
    """SIGTERM to the command also ends the processes that it started, as Ctrl-C does.

    Slow: waiting until all three processes have loaded what they need.
    """
    command = Path(sys.executable).with_name("cascade")
    words = ("bench", "run", "facts", "--apart", "--count", "1", "--out", str(tmp_path))
    pipe, joined = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(command, *words, stdout=pipe, stderr=joined)
    assert process.stdout is not None
    if warm:
        while b"warm" not in (line := await process.stdout.readline()):
            assert line, "the run ended early"
    while len(tiers := tier_processes(process.pid)) < 2:
        assert process.returncode is None
        await asyncio.sleep(0.05)
    process.terminate()
    await process.communicate()
    assert process.returncode != 0
    assert not psutil.wait_procs(tiers, timeout=60)[1]


@pytest.mark.slow
async def test_a_terminated_run_leaves_no_llama_server(shipped_url: str, tmp_path: Path) -> None:
    """Slow: it starts the command, as the test above does. Over a server that runs already."""
    command = Path(sys.executable).with_name("cascade")
    words = ("bench", "run", "facts", "--url", shipped_url, "--peer", "llama-server")
    pipe, joined = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
    process = await asyncio.create_subprocess_exec(
        command, *words, "--count", "1", "--out", str(tmp_path), stdout=pipe, stderr=joined
    )
    while not (started := psutil.Process(process.pid).children()):
        assert process.returncode is None
        await asyncio.sleep(0.05)
    process.terminate()
    await process.communicate()
    assert process.returncode != 0
    assert not psutil.wait_procs(started, timeout=60)[1]


def tier_processes(pid: int) -> list[psutil.Process]:
    """Return the children that have become `cascade tier`."""
    children = psutil.Process(pid).children()
    return [child for child in children if "tier" in child.cmdline()]
