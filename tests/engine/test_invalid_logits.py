"""Logits that are NaN or infinite fail the request that has them, and no other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.engine.architectures import build
from tests.engine.harness import EngineHarness, Received

from cascade.engine.settings import EngineSettings, Path
from cascade.errors import InvalidLogits

POISON = 210  # the token whose states overflow
PATHS = [
    *(("llama", path) for path in (Path.LEAN, Path.FLAT, Path.PADDED)),
    *(("mistral sliding", path) for path in (Path.LEAN, Path.FLAT, Path.PADDED)),
]


def poisoned(name: str) -> Any:
    """Return a model whose states overflow at one token, and whose weights are all finite."""
    model: Any = build(name)
    first = model.model.layers[0]
    with torch.no_grad():
        # One column of the hidden state is the poison's own, and two rows of the MLP square it.
        model.model.embed_tokens.weight[:, -1] = 0
        model.model.embed_tokens.weight[POISON] = 0
        model.model.embed_tokens.weight[POISON, -1] = 1
        first.self_attn.o_proj.weight[-1] = 0
        for matrix in (first.mlp.gate_proj, first.mlp.up_proj):
            matrix.weight[0] = 0
            matrix.weight[0, -1] = 1e30
    return model


def run(harness: EngineHarness, *received: Received) -> None:
    for _ in range(200):
        if all(one.ended for one in received):
            return
        harness.engine.step()
    raise AssertionError("the engine does not end these requests")


def failed(received: Received) -> bool:
    return isinstance(received.error, InvalidLogits) and not received.logits


@pytest.mark.parametrize(("name", "path"), PATHS)
def test_a_poisoned_session_fails_alone(name: str, path: Path) -> None:
    settings = EngineSettings(cache_tokens=2048, path=path, prefix_reuse=True)
    harness = EngineHarness(poisoned(name), settings)
    one = harness.submit("one", range(3, 40), num_logits=1)
    bad = harness.submit("bad", [*range(60, 90), POISON, *range(90, 95)], num_logits=3)
    two = harness.submit("two", range(100, 105), num_logits=5)

    run(harness, one, bad, two)

    assert failed(bad)
    harness.check(one)
    harness.check(two)
    harness.release("bad")
    next_one = harness.submit("one", [7, 8, 9], drop=1, num_logits=3)
    poisoned_later = harness.submit("two", [POISON], num_logits=1)
    again = harness.submit("three", range(60, 90), num_logits=30)
    run(harness, next_one, poisoned_later, again)
    assert failed(poisoned_later)
    harness.check(next_one)
    harness.check(again)
    assert harness.worst < 1e-4


@pytest.mark.parametrize("path", [Path.LEAN, Path.FLAT, Path.PADDED])
def test_a_poison_early_in_a_long_prompt_spoils_no_neighbour(path: Path) -> None:
    settings = EngineSettings(cache_tokens=2048, max_step_tokens=64, path=path)
    harness = EngineHarness(poisoned("llama"), settings)
    before = harness.submit("before", range(3, 30), num_logits=1)
    bad = harness.submit("bad", [POISON, *(3 + i % 180 for i in range(200))], num_logits=1)
    after = harness.submit("after", range(30, 60), num_logits=1)
    while not bad.ended:
        harness.engine.step()
        for session, received in (("before", before), ("after", after)):
            if received.ended:
                harness.check(received)
                harness.run(session, [5, 6], num_logits=2)

    assert failed(bad)
    harness.run("after", [9], num_logits=1)
    assert harness.worst < 1e-4


@pytest.mark.parametrize("path", [Path.LEAN, Path.FLAT])
def test_a_branch_that_is_poisoned_fails_without_its_parent(path: Path) -> None:
    harness = EngineHarness(poisoned("llama"), EngineSettings(cache_tokens=2048, path=path))
    harness.run("parent", range(3, 40))
    bad = harness.branch("side", [POISON], parent="parent", base=30)
    on = harness.submit("parent", [11], num_logits=1)

    run(harness, bad, on)

    assert failed(bad)
    harness.check(on)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf"), 1e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_without_a_usable_maximum_is_invalid(value: float, dtype: torch.dtype) -> None:
    harness = EngineHarness(build("llama"), EngineSettings(cache_tokens=1024))
    forward: Any = harness.engine.runner.forward

    def spoilt(segments: Any) -> Any:
        logits_NV = forward(segments).to(dtype)
        whole = value == float("-inf")
        logits_NV[0, slice(None) if whole else 5] = value
        return logits_NV

    harness.engine.runner.forward = spoilt
    received = harness.submit("one", [3, 4, 5], num_logits=2)

    run(harness, received)

    assert failed(received)


def test_impossible_tokens_are_no_failure() -> None:
    """Models mask tokens by minus infinity."""
    harness = EngineHarness(build("llama"), EngineSettings(cache_tokens=1024))
    forward: Any = harness.engine.runner.forward

    def masked(segments: Any) -> Any:
        logits_NV = forward(segments)
        logits_NV[:, 7:] = float("-inf")
        return logits_NV

    harness.engine.runner.forward = masked
    received = harness.submit("one", [3, 4, 5], num_logits=2)

    run(harness, received)

    assert received.error is None
    assert len(received.logits) == 2
