from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import Qwen3Config
from typer.testing import CliRunner

from cascade.cli import app
from cascade.cli.plan import Load, ModelOnGpu, TierPlan, plan_tiers
from cascade.demo import DRAFTER, EXPERT
from cascade.engine.memory_plan import MemoryPlan

if TYPE_CHECKING:
    from pathlib import Path


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


def model(weights: int, token: int, *, bytes_per_s: float | None = None) -> ModelOnGpu:
    """A model of so many bytes, on a GPU of 10 GB."""
    memory = MemoryPlan(
        parameters=weights // 2, weights_bytes=weights, token_bytes=token, context_tokens=None
    )
    return ModelOnGpu(memory=memory, gpu_bytes=10**10, utilization=0.9, bytes_per_s=bytes_per_s)


def planned(drafter: ModelOnGpu, expert: ModelOnGpu, *, answers: int) -> tuple[TierPlan, TierPlan]:
    load = Load(answers=answers, session_tokens=1024, draft_tokens=4, max_sessions=64)
    return plan_tiers(drafter, expert, load)


def test_each_tier_has_cache_for_all_sessions() -> None:
    large = model(4 * 10**9, 150_000)
    drafters, experts = planned(model(10**9, 1_000), large, answers=100)
    assert (drafters.replicas, drafters.decided_by) == (2, "--max-sessions")
    held = large.sessions(1024)
    assert 0 < held < 64
    assert experts.replicas == -(-100 // held)
    assert experts.decided_by == "its cache"
    assert drafters.pass_s is experts.pass_s is None


def test_drafters_keep_up_with_the_expert_where_the_memory_s_speed_is_known() -> None:
    """A pass of 64 sessions: the expert reads 8 GB, a drafter 1 GB and 1 MB of cache a session."""
    expert = model(8 * 10**9, 0, bytes_per_s=10**11)
    drafter = model(10**9, 1_000, bytes_per_s=0.5 * 10**11)
    drafters, experts = planned(drafter, expert, answers=64)
    assert experts.replicas == 1
    assert experts.pass_s == pytest.approx(0.08)
    # four passes of 1 GB alone take 0.08 s, so no number of drafters is enough
    assert (drafters.replicas, drafters.decided_by) == (1, "--max-sessions; slower than the expert")
    faster = model(10**9, 1_000, bytes_per_s=0.51 * 10**11)
    drafters, _ = planned(faster, expert, answers=64)
    assert drafters.decided_by == "the expert's pace"
    assert drafters.pass_s is not None
    assert 4 * drafters.pass_s <= 0.08
    few = 64 / (drafters.replicas - 1)
    one_less = faster.pass_s(few, 1024)
    assert one_less is not None
    assert 4 * one_less > 0.08


def test_a_tier_whose_replica_holds_no_session_is_an_error() -> None:
    with pytest.raises(ValueError, match="a replica of the expert does not hold one session"):
        planned(model(10**9, 1_000), model(9 * 10**9, 150_000), answers=1)


def test_the_command_plans_a_pair_on_two_kinds_of_gpu(tmp_path: Path) -> None:
    """The shapes of Qwen3-0.6B and Qwen3-14B, as docs/operations.md has them."""
    common: dict[str, Any] = {
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "dtype": "bfloat16",
    }
    small = Qwen3Config(
        hidden_size=1024, num_hidden_layers=28, num_attention_heads=16, intermediate_size=3072,
        tie_word_embeddings=True, **common,
    )  # fmt: skip
    large = Qwen3Config(
        hidden_size=5120, num_hidden_layers=40, num_attention_heads=40, intermediate_size=17_408,
        tie_word_embeddings=False, **common,
    )  # fmt: skip
    for name, config in (("drafter", small), ("expert", large)):
        config.save_pretrained(tmp_path / name)
    arguments = [str(tmp_path / "drafter"), str(tmp_path / "expert"), "--answers", "64"]
    gpus = ["--gpu", "80", "--bandwidth", "3350", "--session-tokens", "2048"]
    code, text = run(*arguments, *gpus)
    assert code == 0
    assert "112.0 KiB" in text
    assert "160.0 KiB" in text
    drafter, expert = (
        [cell.strip() for cell in line.split("│")[1:-1]]
        for line in text.splitlines()
        if line.startswith(("│ drafter ", "│ expert "))
    )
    assert expert == ["expert", "1", "--max-sessions", "64", "15.2 ms or more"]
    assert drafter == ["drafter", "2", "the expert's pace", "32", "2.6 ms or more"]
    l4 = ["--gpu", "22", "--gpu", "80", "--bandwidth", "300", "--bandwidth", "3350"]
    _, text = run(*arguments, *l4, "--session-tokens", "2048")
    assert "slower than the expert" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answers", "5"], "give two models"),
        (["--gpu", "24", "--gpu", "80"], "give one, or one for each of 1"),
    ],
)
def test_options_that_do_not_fit_the_models_are_refused(arguments: list[str], message: str) -> None:
    code, text = run(str(DRAFTER), "--gpu", "24", *arguments)
    assert code == 2
    assert message in text
