"""Processed probabilities: what sampling parameters make of logits."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests.reference import processed

from cascade.sampling import tensor_ops
from cascade.sampling.penalties import Context
from cascade.sampling.probs import OneHotProbs, SoftmaxProbs, process, unscaled_probs
from cascade.types import SamplingParams

VOCAB = 40

samplings = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.sampled_from([0, 1, 5, 39, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.93, 0.5, 0.011]),
    min_p=st.sampled_from([0.0, 0.07, 1.0]),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.8]),
    presence_penalty=st.sampled_from([0.0, 0.7, -0.4]),
    frequency_penalty=st.sampled_from([0.0, 0.3]),
    logit_bias=st.sampled_from([(), ((3, 2.5), (7, -100.0))]),
)

texts = st.lists(st.integers(0, VOCAB - 1), max_size=12)


def logits(rows: int, seed: int, *, vocab: int = VOCAB) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(rows, vocab, generator=generator, dtype=torch.float64)


@given(
    chosen=st.lists(st.tuples(samplings, texts, texts), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    chunk=st.sampled_from([1, 2 * VOCAB, tensor_ops.CHUNK_SIZE]),
)
def test_a_batch_equals_the_reference_row_by_row(
    chosen: list[tuple[SamplingParams, list[int], list[int]]], seed: int, chunk: int
) -> None:
    """Rows with different sampling parameters in one batch, in chunks of any size."""
    logits_NV = logits(len(chosen), seed)
    contexts = [Context(prompt=prompt, answer=answer) for _, prompt, answer in chosen]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_ops, "CHUNK_SIZE", chunk)
        probs = process(logits_NV, [sampling for sampling, _, _ in chosen], contexts)
    for i, (sampling, prompt, answer) in enumerate(chosen):
        wanted = processed(logits_NV[i], sampling, prompt, answer)
        torch.testing.assert_close(probs.dense()[i], wanted, atol=1e-12, rtol=1e-9)


@given(sampling=samplings, seed=st.integers(0, 1000))
def test_every_way_to_read_a_row_agrees(sampling: SamplingParams, seed: int) -> None:
    """`at`, `log_dense`, `select`, `max_probs` and `entropies` agree with `dense`."""
    probs = process(logits(3, seed), [sampling] * 3, [Context()] * 3)
    assert isinstance(probs, SoftmaxProbs)
    ids_NK = torch.tensor([[0, 5, 39], [1, 1, 2], [9, 8, 7]])
    dense_NV = probs.dense()
    torch.testing.assert_close(probs.at(ids_NK), dense_NV.gather(1, ids_NK))
    torch.testing.assert_close(probs.log_dense().exp(), dense_NV)
    torch.testing.assert_close(probs.select(torch.tensor([2, 0])).dense(), dense_NV[[2, 0]])
    torch.testing.assert_close(probs.max_probs(), dense_NV.amax(dim=1))
    torch.testing.assert_close(probs.entropies(), torch.special.entr(dense_NV).sum(dim=1))


@given(
    chosen=st.lists(samplings, min_size=1, max_size=3),
    count=st.sampled_from([None, 1, 6, VOCAB]),
    levels=st.sampled_from([1, 8, 1000]),
    seed=st.integers(0, 1000),
)
def test_the_likeliest_tokens_come_with_their_ratios(
    chosen: list[SamplingParams], count: int | None, levels: int, seed: int
) -> None:
    """Those that a sort finds, the lowest ids of equal ones, or the whole vocabulary."""
    logits_NV = (logits(len(chosen), seed) * levels).round() / levels
    probs = process(logits_NV, chosen, [Context()] * len(chosen))
    assert isinstance(probs, SoftmaxProbs)
    ids_NK, weights_NK = probs.likeliest(count)
    dense_NV = probs.dense()
    wanted_NV = dense_NV
    if ids_NK is not None:
        best_NK = dense_NV.sort(dim=1, descending=True, stable=True).indices[:, :count]
        wanted_NV = torch.zeros_like(dense_NV).scatter(1, best_NK, dense_NV.gather(1, best_NK))
        found_NV = torch.zeros_like(dense_NV).scatter_add(1, ids_NK, weights_NK)
        for ids_K, weights_K in zip(ids_NK, weights_NK, strict=True):
            assert (ids_K[weights_K > 0].diff() > 0).all()
    else:
        found_NV = weights_NK
    found_NV = found_NV / found_NV.sum(dim=1, keepdim=True)
    torch.testing.assert_close(found_NV, wanted_NV / wanted_NV.sum(dim=1, keepdim=True))


@pytest.mark.parametrize("temperature", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_probabilities_are_the_log_softmax(temperature: float, dtype: torch.dtype) -> None:
    logits_NV = (2 * logits(4, 1, vocab=3000)).to(dtype)
    sampling = SamplingParams(temperature=temperature)
    probs = process(logits_NV, [sampling] * 4, [Context()] * 4)
    assert isinstance(probs, SoftmaxProbs)
    wanted_NV = (logits_NV / temperature).log_softmax(dim=1)
    torch.testing.assert_close(probs.log_dense(), wanted_NV, rtol=1e-6, atol=1e-5)


def test_default_parameters_give_the_softmax_without_a_copy_of_the_logits() -> None:
    logits_NV = logits(2, 0).float()
    probs = process(logits_NV, [SamplingParams()] * 2, [Context()] * 2)
    assert isinstance(probs, SoftmaxProbs)
    assert probs.logits_NV is logits_NV
    torch.testing.assert_close(probs.dense(), logits_NV.softmax(dim=1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_narrow_logits_give_float32_probabilities(dtype: torch.dtype) -> None:
    probs = process(logits(2, 1).to(dtype), [SamplingParams(top_p=0.9)] * 2, [Context()] * 2)
    assert probs.dense().dtype == torch.float32
    torch.testing.assert_close(probs.dense().sum(dim=1), torch.ones(2))


def test_temperature_0_is_a_one_hot_at_the_argmax() -> None:
    """Ties go to the lowest id; penalties are applied first."""
    logits_NV = torch.tensor([[1.0, 4.0, 4.0, 0.0], [4.0, 1.0, 3.9, 0.0]])
    samplings_N = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, presence_penalty=0.5),
    ]
    probs = process(logits_NV, samplings_N, [Context(), Context(answer=(0,))])
    assert isinstance(probs, OneHotProbs)
    assert probs.best_N.tolist() == [1, 2]
    assert probs.dense().tolist() == [[0, 1, 0, 0], [0, 0, 1, 0]]
    assert probs.at(torch.tensor([[0, 1], [2, 2]])).tolist() == [[0, 1], [1, 1]]
    assert probs.dense([1]).tolist() == [[0, 0, 1, 0]]


def test_top_k_and_top_p_keep_tokens_that_tie_with_the_last_one_kept() -> None:
    logits_NV = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    for sampling in (SamplingParams(top_k=2), SamplingParams(top_p=0.55)):
        assert (process(logits_NV, [sampling], [Context()]).dense() > 0).tolist() == [[1, 1, 1, 0]]


def test_a_nucleus_of_many_tokens_is_found() -> None:
    """Flat rows, where no small candidate set reaches the mass."""
    probs = process(torch.zeros(1, 5000), [SamplingParams(top_p=0.5)], [Context()])
    assert int((probs.dense() > 0).sum()) == 5000
    steep_NV = -torch.arange(5000)[None, :] / 5000
    probs = process(steep_NV, [SamplingParams(top_p=0.5)], [Context()])
    mass_V = steep_NV.softmax(dim=1)[0].cumsum(0)
    assert int((probs.dense() > 0).sum()) == int((mass_V < 0.5).sum()) + 1


def test_bias_outside_the_vocabulary_is_ignored() -> None:
    """The tokenizer may have more ids than the model has logits."""
    logits_NV = logits(1, 2)
    biased = process(logits_NV, [SamplingParams(logit_bias=((VOCAB, 5.0),))], [Context()])
    torch.testing.assert_close(biased.dense(), logits_NV.softmax(dim=1))


def test_unscaled_probabilities_are_the_softmax_at_temperature_1() -> None:
    logits_NV = logits(3, 3).float()
    torch.testing.assert_close(unscaled_probs(logits_NV).dense(), logits_NV.softmax(dim=1))


@given(
    values=st.lists(
        st.sampled_from([-math.inf, -1e30, -1e4, -70.0, 0.0, 1e-30, 88.0, 1e4, 1e30]), min_size=4
    ).filter(lambda v: max(v) > -math.inf),
    sampling=samplings,
    temperature=st.sampled_from([1e-40, 1e-5, 1.0, 2.0]),
)
def test_extreme_logits_give_finite_probabilities(
    values: list[float], sampling: SamplingParams, temperature: float
) -> None:
    """Infinite and huge logits, tiny temperatures: rows sum to one."""
    probs = process(
        torch.tensor([values]),
        [replace(sampling, temperature=temperature, logit_bias=())],
        [Context()],
    )
    dense_NV = probs.dense()
    torch.testing.assert_close(dense_NV.sum(dim=1), torch.ones(1))
    assert isinstance(probs, SoftmaxProbs)
    assert bool(probs.entropies().isfinite().all())
