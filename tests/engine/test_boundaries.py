"""Logits on both sides of every length at which an architecture changes are the plain ones."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.engine.architectures import ROPE, VOCABULARY, build, with_slow
from tests.engine.harness import EngineHarness

from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.settings import EngineSettings, Path

TOLERANCE = 1e-4


def rope(name: str, **parameters: Any) -> dict[str, Any]:
    """Return settings with the RoPE parameters of an architecture, changed."""
    return {"rope_parameters": {**ROPE[name][1]["rope_parameters"], **parameters}}


def scaled(rope_type: str, boundary: int) -> dict[str, Any]:
    """Return settings of a RoPE that is scaled alike at all lengths."""
    factors = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if rope_type == "llama3" else {}
    parameters = {"rope_type": rope_type, "factor": 4.0, "rope_theta": 10000.0, **factors}
    return {"rope_parameters": {**parameters, "original_max_position_embeddings": boundary}}


def architectures(boundary: int) -> dict[str, dict[str, Any]]:
    """Return settings of each architecture that make it change at a length."""
    window = {"sliding_window": boundary, "max_position_embeddings": 2 * boundary}
    original = {"original_max_position_embeddings": boundary}
    return {
        "llama4": {
            "attention_chunk_size": boundary,
            "floor_scale": boundary,
            "max_position_embeddings": 2 * boundary,
        },
        "mistral sliding": window,
        "qwen2 sliding": {**window, "max_window_layers": 1},
        "gemma2": window,
        "gemma3": window,
        "gpt-oss": {**window, **scaled("yarn", boundary // 2)},
        "yarn": {"max_position_embeddings": 2 * boundary, **scaled("yarn", boundary)},
        "llama3 rope": {"max_position_embeddings": 2 * boundary, **scaled("llama3", boundary)},
        "longrope": {
            "max_position_embeddings": 2 * boundary,
            **original,
            **rope("longrope", **original),
        },
        "dynamic": {"max_position_embeddings": boundary},
    }


def numbers(count: int) -> list[int]:
    return [3 + (11 * index + index // 9) % (VOCABULARY - 3) for index in range(count)]


def cross(harness: EngineHarness, boundary: int) -> None:
    """Run a session to and across a length, with blocks, a rollback and another one beside it."""
    tokens = numbers(boundary + boundary // 5)
    harness.run_until_done(
        harness.submit("long", tokens[: boundary - 3], num_logits=0),
        harness.submit("other", numbers(30), num_logits=2),
    )
    harness.run_until_done(
        harness.submit("long", [7, *tokens[boundary - 2 : boundary + 3]], num_logits=6),
        harness.submit("other", numbers(5), num_logits=5),
    )
    harness.run("long", tokens[boundary - 3 : boundary + 2], drop=6, num_logits=5)
    harness.run("long", tokens[boundary + 2 : -3], num_logits=0)
    harness.run_until_done(
        harness.submit("long", tokens[-3:], num_logits=3),
        harness.submit("other", numbers(1), num_logits=1),
    )


@pytest.mark.parametrize(
    "name", with_slow(architectures(1), fast=("llama4", "gemma3", "gpt-oss", "longrope", "dynamic"))
)
def test_blocks_across_a_boundary_have_the_plain_logits(name: str) -> None:
    model = build(name, **architectures(90)[name])
    harness = EngineHarness(model, EngineSettings(cache_tokens=1024, max_step_tokens=64))

    cross(harness, 90)

    assert harness.worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("name", "boundary"),
    [
        *(("llama4", 8192), ("mistral sliding", 10000), ("llama3 rope", 8192), ("dynamic", 1024)),
        *((name, 4096) for name in ("qwen2 sliding", "gemma2", "gemma3", "gpt-oss", "longrope")),
    ],
)
def test_boundaries_of_real_models_are_crossed(name: str, boundary: int) -> None:
    model = build(name, **architectures(boundary)[name])
    harness = EngineHarness(model, EngineSettings(cache_tokens=2 * boundary))

    cross(harness, boundary)

    assert harness.worst < TOLERANCE


def test_a_model_that_counts_columns_runs_one_session_at_a_time() -> None:
    """Llama 4 scales queries by their column, which padding would move."""
    model = build("llama4", **architectures(40)["llama4"])
    harness = EngineHarness(model, EngineSettings(cache_tokens=1024))

    assert isinstance(harness.engine.runner, PaddedRunner)
    cross(harness, 40)

    assert harness.worst < TOLERANCE
    assert harness.engine.stats().passes == harness.engine.stats().turns


@pytest.mark.parametrize(
    ("name", "path"),
    [("longrope", Path.FLAT), ("dynamic", Path.PADDED), ("two original lengths", Path.FLAT)],
)
@settings(max_examples=3, deadline=None)
@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.sampled_from("abc"), st.integers(0, 8), st.integers(1, 12)),
            min_size=1,
            max_size=2,
            unique_by=lambda action: action[0],
        ),
        min_size=1,
        max_size=4,
    )
)
def test_rows_depend_on_their_own_prefix_alone(
    name: str, path: Path, rounds: list[list[tuple[str, int, int]]]
) -> None:
    """Whatever is rolled back, appended or reused, alone or beside others."""
    harness = EngineHarness(
        build(name), EngineSettings(cache_tokens=1024, max_step_tokens=48, path=path)
    )
    for session in "abc":
        harness.run(session, numbers(60), num_logits=0)
    for actions in rounds:
        received = [
            harness.submit(
                session,
                numbers(count),
                drop=min(drop, len(harness.tokens.get(session, []))),
                num_logits=min(count, 6),
            )
            for session, drop, count in actions
        ]
        harness.run_until_done(*received)

    assert harness.worst < TOLERANCE
