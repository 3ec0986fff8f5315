from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.sampling.token_mask import allowed_bits, allows, apply_masks, constraint_masks
from cascade.types import DecodingParams, TokenConstraints

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.sampling.token_mask import Bits

VOCAB = 40  # more than one word of a bitmask, and no whole number of them

tokens = st.integers(0, 3)
words = st.lists(st.lists(tokens, min_size=1, max_size=3).map(tuple), max_size=4).map(tuple)
texts = st.lists(tokens, max_size=6)


def policy_of(stop_ids: tuple[int, ...] = (), **constraints: object) -> DecodingParams:
    return DecodingParams(stop_ids=stop_ids, constraints=TokenConstraints(**constraints))  # pyright: ignore[reportArgumentType] - fields by name


def allowed(
    policy: DecodingParams, answer: Sequence[int] = (), drafted: Sequence[int] = ()
) -> list[set[int]]:
    """Return the tokens that may follow at each row of a block."""
    masks = constraint_masks(policy, VOCAB)
    bits_RW = allowed_bits(masks, answer, drafted, stop_ids=policy.stop_ids, vocabulary=VOCAB)
    if bits_RW is None:
        return [set(range(VOCAB))] * (len(drafted) + 1)
    return [{v for v in range(VOCAB) if allows(row[None], [v])[0]} for row in bits_RW]


@given(answer=texts, drafted=texts, bad_words=words, min_tokens=st.integers(0, 8))
def test_a_token_may_follow_unless_a_constraint_forbids_it(
    answer: list[int], drafted: list[int], bad_words: tuple[tuple[int, ...], ...], min_tokens: int
) -> None:
    policy = policy_of((5,), min_tokens=min_tokens, bad_words=bad_words)
    found = allowed(policy, answer, drafted)
    for i in range(len(drafted) + 1):
        before = (*answer, *drafted[:i])
        for token in range(VOCAB):
            text = (*before, token)
            bad = any(text[-len(word) :] == word for word in bad_words)
            early = token == 5 and len(before) < min_tokens
            assert (token in found[i]) is not (bad or early)


def test_tokens_that_are_not_allowed_may_not_follow() -> None:
    assert allowed(policy_of(allowed_ids=(3, 31, 39)), drafted=(3,)) == [{3, 31, 39}] * 2
    assert allowed(policy_of(allowed_ids=(3, 31), bad_words=((31,),))) == [{3}]


def test_where_no_token_may_follow_the_answer_ends() -> None:
    policy = policy_of((5,), allowed_ids=(3,), bad_words=((3, 3),))
    assert allowed(policy, drafted=(3,)) == [{3}, {5}]


def test_where_nothing_can_end_the_answer_any_token_may_follow() -> None:
    policy = policy_of(allowed_ids=(3,), bad_words=((3, 3),))
    assert allowed(policy, answer=(3,)) == [set(range(VOCAB))]


def test_without_constraints_there_is_no_mask() -> None:
    assert constraint_masks(policy_of((5,)), VOCAB) == ()


def test_ids_beyond_the_vocabulary_are_ignored() -> None:
    policy = policy_of((VOCAB,), allowed_ids=(1, VOCAB), bad_words=((1, VOCAB), (VOCAB,)))
    assert allowed(policy, drafted=(1,)) == [{1}, {1}]


def slowly_masked(
    logits_NV: torch.Tensor, blocks: Sequence[tuple[int, Bits | None]]
) -> torch.Tensor:
    """Return what `apply_masks` leaves, token by token."""
    found_NV = logits_NV.clone()
    for first, bits_RW in blocks:
        for row, bits_W in enumerate(() if bits_RW is None else bits_RW, start=first):
            flags = [bool(int(bits_W[v // 32]) >> v % 32 & 1) for v in range(logits_NV.shape[1])]
            allowed_V = torch.tensor(flags)
            found_NV[row, ~allowed_V] = -math.inf
            if (found_NV[row] == -math.inf).all():
                found_NV[row, allowed_V] = 0
    return found_NV


@pytest.mark.parametrize("vocabulary", [40, 3193, 64_007])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_masks_set_the_logits_of_exactly_the_other_tokens(
    dtype: torch.dtype, vocabulary: int
) -> None:
    """Whatever share of the tokens they allow; rows of several blocks, one without a mask."""
    rng = np.random.default_rng(0)
    logits_NV = torch.from_numpy(rng.normal(size=(9, vocabulary))).to(dtype)
    logits_NV[:, torch.from_numpy(rng.random(vocabulary)) < 0.1] = -math.inf
    words = -(-vocabulary // 32)
    blocks = list[tuple[int, "Bits | None"]]([(3, None)])
    for first, shares in (0, (0.01, 0.5, 0.99)), (5, (0.9, 0.1, 1.0, 0.3)):
        flags = [rng.random(32 * words) < share for share in shares]
        octets = np.packbits(flags, axis=1, bitorder="little")
        blocks.append((first, octets.view("<u4").astype(np.uint32)))
    wanted_NV = slowly_masked(logits_NV, blocks)
    masked_NV = logits_NV.clone()
    apply_masks(masked_NV, blocks)
    assert torch.equal(masked_NV, wanted_NV)
    assert torch.equal(masked_NV[[3, 4]], logits_NV[[3, 4]])


def test_tokens_that_may_follow_are_equally_likely_where_all_are_impossible() -> None:
    logits_NV = torch.full((2, VOCAB), -math.inf)
    logits_NV[:, 7] = 1.0
    blocks = [(0, bits_of(3, 39)), (1, bits_of(3, 7, 39))]
    wanted_NV = slowly_masked(logits_NV, blocks)
    apply_masks(logits_NV, blocks)
    assert torch.equal(logits_NV, wanted_NV)
    assert logits_NV[0].softmax(0)[[3, 39]].tolist() == [0.5, 0.5]
    assert logits_NV[1].softmax(0)[7] == 1


def bits_of(*ids: int) -> Bits:
    bits_RW = allowed_bits(
        constraint_masks(policy_of(allowed_ids=ids), VOCAB), (), stop_ids=(), vocabulary=VOCAB
    )
    assert bits_RW is not None
    return bits_RW


def test_without_a_mask_logits_stay_as_they_are() -> None:
    logits_NV = torch.randn(2, VOCAB)
    before_NV = logits_NV.clone()
    apply_masks(logits_NV, [(0, None), (1, None)])
    assert torch.equal(logits_NV, before_NV)
