from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

if TYPE_CHECKING:
    from cascade.engine.tokenizer import Tokenizer

TEXT = "the cats naïve café 你好 🙂 नमस्ते\u200d👩‍👩‍👧 the cat"


@pytest.mark.parametrize("step", [1, 2, 5, 100])
def test_pieces_of_any_length_make_the_whole_text(tokenizer: Tokenizer, step: int) -> None:
    ids = tokenizer.encode(TEXT, add_special=False)
    stream = tokenizer.detokenizer()

    pieces = [stream.push(ids[place : place + step]) for place in range(0, len(ids), step)]

    assert "".join(pieces) + stream.flush() == TEXT == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=st.lists(st.sampled_from(["the", "cat", "cats", "naïve", "你好", "🙂"]), max_size=8))
def test_any_text_survives_streaming(tokenizer: Tokenizer, words: list[str]) -> None:
    text = " ".join(words)
    ids = tokenizer.encode(text, add_special=False)
    stream = tokenizer.detokenizer()

    assert "".join(stream.push([id_]) for id_ in ids) + stream.flush() == text


def test_a_character_cut_short_is_held_back_and_flushed_as_broken(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("cat 🙂", add_special=False)[:-1]
    stream = tokenizer.detokenizer()

    assert stream.push(ids).rstrip() == "cat"
    assert stream.flush().strip(" ") in {"\ufffd", "\ufffd\ufffd\ufffd"}
    assert not stream.flush()


def test_bytes_that_never_make_a_character_do_not_wait_for_ever(
    byte_tokenizer: Tokenizer,
) -> None:
    lone = next(id_ for id_ in byte_tokenizer.tokens if byte_tokenizer.bytes_of(id_) == b"\xff")
    stream = byte_tokenizer.detokenizer()

    assert stream.push([lone] * 40).count("\ufffd") >= 30


def test_a_special_token_neither_speaks_nor_swallows_a_space(space_tokenizer: Tokenizer) -> None:
    cat, the = (
        id_
        for id_, token in sorted(space_tokenizer.tokens.items(), key=lambda item: item[1])
        if token in {"▁cat", "▁the"}
    )
    (end,) = space_tokenizer.stop_ids
    stream = space_tokenizer.detokenizer()

    assert stream.push([the, end, cat]) == "the cat"
    assert space_tokenizer.detokenizer(skip_special=False).push([the, end]) == "the</s>"
