"""Logit bias and penalties of blocks. test_probs.py compares them with the slow reference."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import processed

from cascade.sampling.penalties import Context, apply_penalties
from cascade.types import SamplingParams

VOCAB = 20

samplings = st.builds(
    SamplingParams,
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.sampled_from([(), ((3, 2.5), (7, -100.0)), ((3, 1.0), (99, 5.0), (3, 0.1))]),
)

texts = st.lists(st.integers(0, VOCAB - 1), max_size=12)

blocks = st.tuples(samplings, texts, texts, st.lists(st.integers(0, VOCAB - 1), max_size=5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@given(chosen=st.lists(blocks, min_size=1, max_size=3), seed=st.integers(0, 1000))
def test_a_row_in_a_block_equals_the_row_alone(
    dtype: torch.dtype,
    chosen: list[tuple[SamplingParams, list[int], list[int], list[int]]],
    seed: int,
) -> None:
    """Bit for bit, or greedy text would depend on the block length."""
    rows = [
        (sampling, Context(prompt=prompt, answer=answer, drafted=drafted[:i]))
        for sampling, prompt, answer, drafted in chosen
        for i in range(len(drafted) + 1)
    ]
    samplings_N, contexts_N = [row[0] for row in rows], [row[1] for row in rows]
    generator = torch.Generator().manual_seed(seed)
    logits_NV = (3 * torch.randn(len(rows), VOCAB, generator=generator)).to(dtype)

    together_NV = apply_penalties(logits_NV, samplings_N, contexts_N)

    for i, (sampling, context) in enumerate(rows):
        plain = Context(prompt=context.prompt, answer=[*context.answer, *context.drafted])
        alone_NV = apply_penalties(logits_NV[i : i + 1], [sampling], [plain])
        assert torch.equal(together_NV[i], alone_NV[0])


@given(block=blocks, seed=st.integers(0, 1000))
def test_a_block_equals_the_reference_row_by_row(
    block: tuple[SamplingParams, list[int], list[int], list[int]], seed: int
) -> None:
    sampling, prompt, answer, drafted = block
    generator = torch.Generator().manual_seed(seed)
    rows = len(drafted) + 1
    logits_NV = 3 * torch.randn(rows, 100, generator=generator, dtype=torch.float64)
    contexts = [Context(prompt=prompt, answer=answer, drafted=drafted[:i]) for i in range(rows)]
    found_NV = apply_penalties(logits_NV, [sampling] * rows, contexts).softmax(dim=1)
    for i in range(rows):
        wanted_V = processed(logits_NV[i], sampling, prompt, [*answer, *drafted[:i]])
        torch.testing.assert_close(found_NV[i], wanted_V, rtol=1e-12, atol=1e-15)
