"""Bias and penalties of blocks; the slow twin has its say in test_distribution.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import processed

from cascade.sampling.penalties import Context, adjusted
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
def test_a_row_of_a_block_is_what_it_is_alone(
    dtype: torch.dtype,
    chosen: list[tuple[SamplingParams, list[int], list[int], list[int]]],
    seed: int,
) -> None:
    """To the last bit, or greedy text would depend on how long blocks are."""
    rows = [
        (sampling, Context(prompt=prompt, answer=answer, drafted=drafted[:place]))
        for sampling, prompt, answer, drafted in chosen
        for place in range(len(drafted) + 1)
    ]
    samplings_N, contexts_N = [row[0] for row in rows], [row[1] for row in rows]
    chance = torch.Generator().manual_seed(seed)
    logits_NV = (3 * torch.randn(len(rows), VOCAB, generator=chance)).to(dtype)

    together_NV = adjusted(logits_NV, samplings_N, contexts_N)

    for place, (sampling, context) in enumerate(rows):
        plain = Context(prompt=context.prompt, answer=[*context.answer, *context.drafted])
        alone_NV = adjusted(logits_NV[place : place + 1], [sampling], [plain])
        assert torch.equal(together_NV[place], alone_NV[0])


@given(block=blocks, seed=st.integers(0, 1000))
def test_a_block_is_each_row_by_its_definition(
    block: tuple[SamplingParams, list[int], list[int], list[int]], seed: int
) -> None:
    sampling, prompt, answer, drafted = block
    chance = torch.Generator().manual_seed(seed)
    rows = len(drafted) + 1
    logits_NV = 3 * torch.randn(rows, 100, generator=chance, dtype=torch.float64)
    contexts = [Context(prompt=prompt, answer=answer, drafted=drafted[:i]) for i in range(rows)]
    found_NV = adjusted(logits_NV, [sampling] * rows, contexts).softmax(dim=1)
    for place in range(rows):
        wanted_V = processed(logits_NV[place], sampling, prompt, [*answer, *drafted[:place]])
        torch.testing.assert_close(found_NV[place], wanted_V, rtol=1e-12, atol=1e-15)
