"""Every row the engine gives is the row of the model's plain forward pass."""

from __future__ import annotations

import pytest
import torch
from numpy.random import Generator, default_rng
from tests.engine.architectures import LLAMA_LIKE, MORE, PADDED, ROPE, VARLEN, VOCABULARY, build
from tests.engine.harness import EngineHarness
from torch import nn

from cascade.engine.backends import cpu_llama
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.varlen import VarlenRunner
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import UnsupportedModel

TOLERANCE = 1e-4


def draw(chance: Generator, count: int) -> list[int]:
    return chance.integers(3, VOCABULARY, size=count).tolist()


def ragged_story(bench: EngineHarness) -> None:
    """Prefills, blocks and rollbacks of several sessions, mixed; growth, eviction, reuse."""
    chance = default_rng(7)

    def run(*steps: tuple[str, int, int]) -> None:
        answers = [
            bench.submit(session, draw(chance, count), drop=drop, rows=count)
            for session, drop, count in steps
        ]
        bench.run_until_done(*answers)

    run(("a", 0, 37), ("b", 0, 5))
    run(("a", 0, 4), ("b", 0, 1), ("c", 0, 23))
    run(("a", 3, 6), ("c", 0, 16), ("b", 0, 2), ("d", 0, 70))
    run(("c", 9, 1), ("d", 30, 1), ("a", 0, 1), ("b", 0, 1))
    run(("a", 0, 3), ("b", 1, 8), ("c", 2, 1), ("d", 0, 30))
    prefix = bench.tokens["a"][:30]
    reused = bench.submit("e", [*prefix, *draw(chance, 9)], rows=9)
    bench.run_until_done(reused, bench.submit("d", draw(chance, 60), rows=5))
    run(("d", 1, 2), ("a", 0, 5), ("e", 0, 5))
    bench.release("a")
    again = bench.submit("f", [*prefix, *draw(chance, 3)], rows=33)
    bench.run_until_done(again)
    run(("f", 0, 5), ("e", 4, 5), ("b", 0, 40))


@pytest.mark.parametrize("name", VARLEN)
def test_flat_rows_are_the_plain_rows(name: str) -> None:
    bench = EngineHarness(build(name), EngineSettings(cache_tokens=1024, path=Path.FLAT))

    ragged_story(bench)

    assert bench.largest > 0.5, "the logits differ enough for an error to show"
    assert isinstance(bench.engine.runner, VarlenRunner)
    assert bench.worst < TOLERANCE


@pytest.mark.parametrize("name", LLAMA_LIKE)
@pytest.mark.parametrize("packed", [True, False])
def test_lean_rows_are_the_plain_rows(name: str, *, packed: bool) -> None:
    bench = EngineHarness(build(name), EngineSettings(cache_tokens=1024, packed=packed))

    ragged_story(bench)

    assert isinstance(bench.engine.runner, CpuLlamaRunner)
    assert bench.worst < TOLERANCE


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_lean_rows_in_bfloat16_are_the_plain_rows_but_for_rounding(name: str) -> None:
    model = build(name)
    nn.Module.to(model, torch.bfloat16)
    bench = EngineHarness(model, EngineSettings(cache_tokens=1024))

    ragged_story(bench)

    assert isinstance(bench.engine.runner, CpuLlamaRunner)
    assert bench.worst < 0.1 * bench.largest


def test_a_lean_session_may_outgrow_the_table_of_rotations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_llama, "_POSITIONS", 16)
    bench = EngineHarness(build("llama"), EngineSettings(cache_tokens=1024, path=Path.LEAN))

    ragged_story(bench)

    assert bench.worst < TOLERANCE


@pytest.mark.parametrize("name", PADDED)
def test_padded_rows_are_the_plain_rows(name: str) -> None:
    bench = EngineHarness(build(name), EngineSettings(cache_tokens=1024))

    ragged_story(bench)

    assert isinstance(bench.engine.runner, PaddedRunner)
    assert bench.worst < TOLERANCE


@pytest.mark.parametrize("name", ROPE)
@pytest.mark.parametrize("path", [Path.FLAT, Path.PADDED])
def test_a_long_session_does_not_bend_a_short_ones_rope(name: str, path: Path) -> None:
    bench = EngineHarness(
        build(name), EngineSettings(cache_tokens=1024, max_step_tokens=48, path=path)
    )

    ragged_story(bench)

    assert bench.worst < TOLERANCE


@pytest.mark.parametrize("name", ["gemma2", "mistral sliding", "qwen3"])
@pytest.mark.parametrize("path", [Path.AUTO, Path.FLAT])
def test_deterministic_rows_are_exact_too(name: str, path: Path) -> None:
    bench = EngineHarness(
        build(name), EngineSettings(cache_tokens=1024, deterministic=True, path=path)
    )

    ragged_story(bench)

    assert bench.worst < TOLERANCE


def test_a_mixture_of_experts_is_refused_where_every_bit_is_to_be_the_same() -> None:
    with pytest.raises(UnsupportedModel, match="its logits depend on the batch"):
        EngineHarness(build("deepseek-v3"), EngineSettings(deterministic=True))


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_small_passes_and_a_crowded_cache_change_nothing(name: str) -> None:
    settings = EngineSettings(cache_tokens=512, max_step_tokens=16)
    bench = EngineHarness(build(name), settings)

    ragged_story(bench)

    assert bench.worst < TOLERANCE
    assert bench.engine.stats().preemptions


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("mamba", "recurrent state, which cannot be rolled back"),
        ("jamba", "recurrent state, which cannot be rolled back"),
        ("minimax", "cannot be served exactly"),
        ("bert", "cannot be served exactly"),
    ],
)
def test_a_model_that_cannot_be_rolled_back_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedModel, match=reason):
        EngineHarness(build(name))


def test_diffllama_on_the_flat_path_is_refused_not_wrong() -> None:
    with pytest.raises(UnsupportedModel, match="differ from the plain forward pass"):
        EngineHarness(build("diffllama"), EngineSettings(path=Path.FLAT))


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_other_architectures_too(name: str) -> None:
    bench = EngineHarness(build(name), EngineSettings(cache_tokens=1024))

    ragged_story(bench)

    assert bench.worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("name", VARLEN)
def test_the_fallback_is_exact_where_it_is_not_needed(name: str) -> None:
    bench = EngineHarness(build(name), EngineSettings(cache_tokens=1024, path=Path.PADDED))

    ragged_story(bench)

    assert bench.worst < TOLERANCE
