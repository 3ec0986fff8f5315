"""Passes without a read between them compute what passes with requests compute."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.engine.architectures import build
from tests.engine.harness import EngineHarness

from cascade.engine.settings import EngineSettings, Path
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

TOLERANCE = 1e-4
NAMES = [SessionId("a"), SessionId("b")]
FIRST = torch.tensor([50, 60])


def likeliest(logits_NV: Tensor, number: int) -> Tensor:
    del number
    return logits_NV.argmax(dim=1)


def opened(path: Path, name: str = "llama") -> EngineHarness:
    """Return an engine with two sessions whose tokens have run."""
    harness = EngineHarness(build(name), EngineSettings(path=path, cache_tokens=1024))
    harness.run("a", range(3, 40))
    harness.run("b", range(9, 20))
    return harness


def ahead(harness: EngineHarness, *, passes: int) -> tuple[list[Tensor], list[list[int]]]:
    with torch.inference_mode():
        return harness.engine.decode_ahead(NAMES, FIRST, likeliest, passes=passes)


@pytest.mark.parametrize("path", [Path.CAPTURED, Path.FLAT, Path.PADDED, Path.LEAN])
def test_logits_are_those_of_the_plain_forward_pass(path: Path) -> None:
    harness = opened(path)
    logits, tokens = ahead(harness, passes=4)
    assert len(logits) == len(tokens) == 4
    assert tokens[0] == FIRST.tolist()
    for index, name in enumerate(NAMES):
        harness.tokens[name] += [of_pass[index] for of_pass in tokens]
        expected_NV = harness.plain_logits(harness.tokens[name], count=4)
        actual_NV = torch.stack([logits_NV[index] for logits_NV in logits])
        assert (actual_NV - expected_NV).abs().max() < TOLERANCE
    # And requests go on from there, or from before.
    harness.run("a", [7, 8], num_logits=2)
    harness.run("b", [7], drop=3)
    assert harness.worst < TOLERANCE


@pytest.mark.parametrize("reads_each", [False, True])
@pytest.mark.parametrize("tokens", [2, 200])
def test_what_waits_is_not_delayed(tokens: int, *, reads_each: bool) -> None:
    """Unless passes are not read: a prefill then waits for all of them."""
    harness = opened(Path.FLAT)
    harness.engine.reads_each = reads_each
    waiting = harness.submit("c", range(3, 3 + tokens), num_logits=1)
    harness.engine._receive()  # pyright: ignore[reportPrivateUsage] - it is planned, not in the inbox
    run, _ = ahead(harness, passes=4)
    assert len(run) == (0 if reads_each or tokens == 2 else 4)
    harness.run_until_done(waiting)
    assert len(ahead(harness, passes=4)[0]) == 4


def test_passes_end_with_the_cache_range_and_the_context() -> None:
    harness = opened(Path.FLAT)
    assert len(ahead(harness, passes=1000)[0]) == 128 - 37
    assert ahead(harness, passes=1) == ([], [])
    harness.run("a", [5])  # makes room
    assert len(ahead(harness, passes=2)[0]) == 2


def test_sessions_that_are_not_there_run_no_pass() -> None:
    harness = opened(Path.FLAT)
    harness.release("b")
    harness.engine.step()
    assert ahead(harness, passes=2) == ([], [])


def test_invalid_logits_leave_the_sessions_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = opened(Path.FLAT)
    decode = harness.engine.runner.decode

    def invalid(segments: Sequence[Any], ids_N: Tensor) -> Tensor:
        return decode(segments, ids_N) * math.nan

    with monkeypatch.context() as patched:
        patched.setattr(harness.engine.runner, "decode", invalid)
        assert ahead(harness, passes=2) == ([], [])
    harness.run("a", [5, 6], num_logits=2)
    assert harness.worst < TOLERANCE


@pytest.mark.parametrize("name", ["longrope", "dynamic"])
def test_frequencies_that_depend_on_the_length_need_requests(name: str) -> None:
    assert ahead(opened(Path.FLAT, name), passes=2) == ([], [])
