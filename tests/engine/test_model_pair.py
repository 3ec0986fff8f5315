from __future__ import annotations

import re
from typing import TYPE_CHECKING

import pytest
from tests.support.toy_tokenizers import byte_level, metaspace, wrap
from tokenizers import normalizers

from cascade.engine.model_pair import check_pair
from cascade.errors import MismatchedPair

if TYPE_CHECKING:
    from cascade.engine.tokenizer import Tokenizer


def check(drafter: Tokenizer, expert: Tokenizer) -> int:
    return check_pair(drafter, expert, drafter_vocabulary=304, expert_vocabulary=320)


def test_padded_vocabularies_share_their_tokens() -> None:
    assert check(wrap(byte_level()), wrap(byte_level())) == 280


def test_the_smaller_number_of_logits_limits_the_vocabulary() -> None:
    both = wrap(byte_level())

    assert check_pair(both, both, drafter_vocabulary=279, expert_vocabulary=320) == 279


def test_at_most_five_different_tokens_are_named() -> None:
    with pytest.raises(MismatchedPair) as refused:
        check(wrap(byte_level()), wrap(metaspace()))

    assert "id 0 is '<s>' to the drafter and '<unk>' to the expert" in refused.value.message
    assert len(re.findall(r"id \d+ is", refused.value.message)) == 5


def test_a_token_of_only_one_model_is_named() -> None:
    with pytest.raises(MismatchedPair, match="id 280 is no token to the drafter and '<tool>'"):
        check(wrap(byte_level()), wrap(byte_level(added=("<tool>",))))


def test_a_token_special_to_only_one_model_is_named() -> None:
    plain = byte_level()
    plain.add_tokens(["<tool>"])

    with pytest.raises(MismatchedPair, match="'<tool>' is special to the expert only"):
        check(wrap(plain), wrap(byte_level(added=("<tool>",))))


def test_another_normaliser_is_detected() -> None:
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()

    with pytest.raises(MismatchedPair, match="where the expert reads 'T'"):
        check(wrap(lower), wrap(byte_level()))
