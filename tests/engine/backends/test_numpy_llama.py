"""A token alone, on numpy, gets the row that torch gives it."""

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
    from transformers import PreTrainedModel

TOKENS = tuple((7 * place + 3) % VOCABULARY for place in range(60))

START, PROMPT = 128, 5


def rows(model: PreTrainedModel, *, packed: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the rows of tokens one by one, and what the pool holds of them then."""
    runner = CpuLlamaRunner(model, packed=packed)
    assert (runner.numpy_llama is not None) is packed
    runner.resize(num_slots=256)
    with torch.inference_mode():
        runner.forward([Segment(start=START, past=0, tokens=TOKENS[:PROMPT])])
        found = [
            runner.forward(
                [Segment(start=START, past=place, tokens=TOKENS[place:][:1], num_logits=1)]
            )
            for place in range(PROMPT, len(TOKENS))
        ]
    return torch.cat(found), runner.pool.states_L2JRD[..., START : START + len(TOKENS), :]


@pytest.mark.parametrize("name", LLAMA_LIKE)
def test_rows_and_states_are_those_of_torch(name: str) -> None:
    model = build(name)
    for quick, plain in zip(rows(model, packed=True), rows(model, packed=False), strict=True):
        torch.testing.assert_close(quick, plain, rtol=1e-4, atol=1e-5)


def test_a_few_sessions_get_the_rows_they_get_alone() -> None:
    runner = CpuLlamaRunner(build("llama"))
    runner.resize(num_slots=512)
    prompts = [
        Segment(start=128 * n, past=0, tokens=TOKENS[n:][: 9 + n])
        for n in range(numpy_llama.MAX_SESSIONS)
    ]
    steps = [Segment(start=one.start, past=one.count, tokens=(7,), num_logits=1) for one in prompts]
    with torch.inference_mode():
        runner.forward(prompts)
        together = runner.forward(steps)
        alone = torch.cat([runner.forward([one]) for one in steps])
    assert torch.equal(together, alone)


def test_no_other_row_of_the_pool_is_touched() -> None:
    runner = CpuLlamaRunner(build("llama"))
    runner.resize(num_slots=256)
    with torch.inference_mode():
        runner.forward([Segment(start=START, past=0, tokens=TOKENS)])
        before = runner.pool.states_L2JRD.clone()
        runner.forward([Segment(start=START, past=9, tokens=TOKENS[:1], num_logits=1)])
    changed = (runner.pool.states_L2JRD != before).any(dim=-1).any(dim=0).any(dim=0).any(dim=0)
    assert changed.nonzero().view(-1).tolist() == [START + 9]


def test_large_matrices_keep_their_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(numpy_llama, "MAX_WEIGHTS", 1000)
    assert CpuLlamaRunner(build("llama")).numpy_llama is None


def test_rows_that_must_not_depend_on_the_batch_are_not_made_so() -> None:
    assert CpuLlamaRunner(build("llama"), deterministic=True).numpy_llama is None


def test_half_precision_stays_with_torch() -> None:
    model = build("llama")
    nn.Module.to(model, torch.bfloat16)
    assert CpuLlamaRunner(model).numpy_llama is None
