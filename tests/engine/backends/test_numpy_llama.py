"""A few tokens in numpy get the logits that torch gives them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from tests.engine.architectures import LLAMA_LIKE, VOCABULARY, build
from torch import nn

from cascade.engine.backends import numpy_llama
from cascade.engine.backends.cpu_llama import CpuLlamaRunner
from cascade.engine.batch import Segment

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import PreTrainedModel

TOKENS = tuple((7 * index + 3) % VOCABULARY for index in range(60))

START, PROMPT = 128, 5


def decode(
    model: PreTrainedModel, *, packed: bool, tokens: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run so many tokens a pass; return the logits of the last ones and the states in the pool."""
    runner = CpuLlamaRunner(model, packed=packed)
    assert (runner.numpy_llama is not None) is packed
    runner.resize(num_slots=256)
    with torch.inference_mode():
        runner.forward([Segment(start=START, past=0, tokens=TOKENS[:PROMPT])])
        logits = [
            runner.forward(
                [Segment(start=START, past=past, tokens=TOKENS[past:][:tokens], num_logits=1)]
            )
            for past in range(PROMPT, len(TOKENS), tokens)
        ]
    return torch.cat(logits), runner.pool.states_L2JRD[..., START : START + len(TOKENS), :]


@pytest.mark.parametrize("tokens", [1, 2, 4])
@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_logits_and_states_are_those_of_torch(name: str, tokens: int) -> None:
    model = build(name)
    for actual, expected in zip(
        decode(model, packed=True, tokens=tokens),
        decode(model, packed=False, tokens=tokens),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_a_few_sessions_get_the_same_logits_together_as_alone() -> None:
    runner = CpuLlamaRunner(build("llama"))
    runner.resize(num_slots=512)
    prompts = [
        Segment(start=128 * n, past=0, tokens=TOKENS[n:][: 9 + n])
        for n in range(numpy_llama.MAX_SESSIONS)
    ]
    segments = [
        Segment(start=one.start, past=one.count, tokens=(7,), num_logits=1) for one in prompts
    ]
    with torch.inference_mode():
        runner.forward(prompts)
        together = runner.forward(segments)
        alone = torch.cat([runner.forward([one]) for one in segments])
    assert torch.equal(together, alone)


def test_only_the_new_slot_is_written() -> None:
    runner = CpuLlamaRunner(build("llama"))
    runner.resize(num_slots=256)
    with torch.inference_mode():
        runner.forward([Segment(start=START, past=0, tokens=TOKENS)])
        before = runner.pool.states_L2JRD.clone()
        runner.forward([Segment(start=START, past=9, tokens=TOKENS[:1], num_logits=1)])
    changed = (runner.pool.states_L2JRD != before).any(dim=-1).any(dim=0).any(dim=0).any(dim=0)
    assert changed.nonzero().view(-1).tolist() == [START + 9]


def test_models_with_large_matrices_do_not_run_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_llama, "MAX_WEIGHTS", 1000)
    assert CpuLlamaRunner(build("llama")).numpy_llama is None


def lengths_in_numpy(
    model: PreTrainedModel, segments: Sequence[Segment], monkeypatch: pytest.MonkeyPatch
) -> list[int]:
    """Run segments pass by pass; return the lengths of those that run in numpy."""
    runner = CpuLlamaRunner(model)
    runner.resize(num_slots=256)
    in_numpy = list[int]()

    def count(segments: Sequence[Segment], **_: object) -> torch.Tensor:
        in_numpy.extend(one.length for one in segments)
        return torch.zeros(len(segments), 1)

    assert runner.numpy_llama is not None
    monkeypatch.setattr(runner.numpy_llama, "forward", count)
    with torch.inference_mode():
        for one in segments:
            runner.forward([one])
    return in_numpy


def test_long_sessions_do_not_run_in_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_llama, "MAX_KEYS", 20)
    segments = [Segment(start=0, past=past, tokens=(1,), num_logits=1) for past in (18, 19, 20, 21)]
    assert lengths_in_numpy(build("llama"), segments, monkeypatch) == [19, 20]


@pytest.mark.parametrize(("repeated", "longest"), [(0, 1), (1, 2), (3, 4), (9, 4)])
def test_tokens_that_would_read_large_layers_again_do_not_run_in_numpy(
    repeated: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    layer = sum(one.numel() for one in model.model.layers[0].parameters())
    monkeypatch.setattr(numpy_llama, "MAX_REPEATED", repeated * layer)
    counts = range(1, 7)
    segments = [Segment(start=0, past=0, tokens=TOKENS[:count], num_logits=1) for count in counts]
    expected = [count for count in counts if count <= longest]
    assert lengths_in_numpy(model, segments, monkeypatch) == expected


def test_passes_with_several_logits_of_a_session_do_not_run_in_numpy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    segments = [
        Segment(start=0, past=0, tokens=TOKENS[:2], num_logits=logits) for logits in (0, 1, 2)
    ]
    assert lengths_in_numpy(build("llama"), segments, monkeypatch) == [2]


def test_deterministic_runners_do_not_use_numpy() -> None:
    assert CpuLlamaRunner(build("llama"), deterministic=True).numpy_llama is None


def test_half_precision_does_not_run_in_numpy() -> None:
    model = build("llama")
    nn.Module.to(model, torch.bfloat16)
    assert CpuLlamaRunner(model).numpy_llama is None
