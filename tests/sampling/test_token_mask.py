from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.sampling.token_mask import allowed_bits, allows, apply_masks, constraint_masks
from cascade.types import DecodingParams, TokenConstraints

if TYPE_CHECKING:
    from collections.abc import Sequence

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_only_the_rows_of_masked_blocks_change(dtype: torch.dtype) -> None:
    logits_NV = torch.randn(4, VOCAB, dtype=torch.float64).to(dtype)
    before_NV = logits_NV.clone()
    policy = policy_of(allowed_ids=(0, 39))
    masks = constraint_masks(policy, VOCAB)
    bits_RW = allowed_bits(masks, (), (0,), stop_ids=(), vocabulary=VOCAB)
    masked_NV = apply_masks(logits_NV, [(0, None), (1, bits_RW), (3, None)])
    assert torch.equal(logits_NV, before_NV)
    assert torch.equal(masked_NV[[0, 3]], logits_NV[[0, 3]])
    assert torch.equal(masked_NV[1:3, [0, 39]], logits_NV[1:3, [0, 39]])
    assert (masked_NV[1:3, 1:39] == -math.inf).all()
    assert apply_masks(logits_NV, [(0, None)]) is logits_NV
    assert torch.equal(apply_masks(logits_NV[1:3], [(0, bits_RW)]), masked_NV[1:3])
