"""The scribe: tokens go out with their text, whole characters, and never part of a stop string."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cascade.api.output_processor import Delta, OutputProcessor, StopMatcher
from cascade.types import FinishReason, Origin, OutputChunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.engine.tokenizer import Tokenizer

ALPHABET = "ab🌙"

TEXTS = st.text(ALPHABET, max_size=30)

STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)


def cut(text: str, places: list[int]) -> list[str]:
    at = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(at)]


def listen(parts: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher, heard = StopMatcher(stops), ""
    for part in parts:
        passage = matcher.push(part)
        heard += passage.text
        if passage.stop is not None:
            return heard, passage.stop
    return heard + matcher.flush(), None


def expected(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Read character by character; stop where the first stop string is complete."""
    for end in range(1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


def test_the_example_of_the_docstring() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.push("xE").text == "x"
    assert matcher.push("NO").text == "ENO"
    last = matcher.push("END!")
    assert (last.text, last.stop) == ("", "END")


@given(text=TEXTS, stops=STOPS, places=st.lists(st.integers(0, 99), max_size=8))
def test_what_comes_out_does_not_depend_on_how_the_text_was_cut(
    text: str, stops: list[str], places: list[int]
) -> None:
    assert listen(cut(text, places), stops) == expected(text, stops)


@given(text=TEXTS, stops=STOPS, places=st.lists(st.integers(0, 99), max_size=8))
def test_what_is_out_can_never_turn_out_to_be_a_stop_string(
    text: str, stops: list[str], places: list[int]
) -> None:
    """At every moment, what is out begins what comes out in the end."""
    matcher, heard = StopMatcher(stops), ""
    final, _ = expected(text, stops)
    for part in cut(text, places):
        passage = matcher.push(part)
        heard += passage.text
        assert final.startswith(heard)
        if passage.stop is not None:
            break


@given(text=TEXTS)
def test_without_stop_strings_nothing_is_held(text: str) -> None:
    assert StopMatcher([]).push(text).text == text


LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP

OUTPUT_TEXTS = st.text("ab é🌙日", min_size=1, max_size=24)

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=12)

# The fixture is read only, so examples may share it.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def pieces(tokens: Sequence[int], sizes: Sequence[int]) -> list[OutputChunk]:
    """Return the tokens in blocks; the last ends for length."""
    result: list[OutputChunk] = []
    at, number = 0, 0
    while at < len(tokens):
        block = tuple(tokens[at : at + sizes[number % len(sizes)]])
        at, number = at + len(block), number + 1
        finish = LENGTH if at == len(tokens) else None
        result.append(
            OutputChunk(tokens=block, origins=(Origin.DRAFTER,) * len(block), finish=finish)
        )
    return result


def write(scribe: OutputProcessor, parts: Sequence[OutputChunk]) -> list[Delta]:
    deltas: list[Delta] = []
    for part in parts:
        deltas.append(scribe.push(part))
        if deltas[-1].finish is not None:
            break
    return deltas


@SHARED
@given(text=OUTPUT_TEXTS, sizes=SIZES)
def test_the_deltas_join_to_the_text_and_carry_every_token_once(
    words: Tokenizer, text: str, sizes: list[int]
) -> None:
    tokens = words.encode(text)
    deltas = write(OutputProcessor(words), pieces(tokens, sizes))
    assert "".join(delta.text for delta in deltas) == text
    assert [entry.token_id for delta in deltas for entry in delta.tokens] == list(tokens)


@SHARED
@given(text=OUTPUT_TEXTS, sizes=SIZES)
def test_no_delta_has_half_a_character(words: Tokenizer, text: str, sizes: list[int]) -> None:
    deltas = write(OutputProcessor(words), pieces(words.encode(text), sizes))
    assert not any("\ufffd" in delta.text for delta in deltas)


@SHARED
@given(text=OUTPUT_TEXTS, sizes=SIZES, stop=st.text("ab é🌙日", min_size=1, max_size=3))
def test_an_answer_ends_before_its_stop_string_however_blocks_fall(
    words: Tokenizer, text: str, sizes: list[int], stop: str
) -> None:
    """Text and tokens are those of one block; the last token is the one that completed it."""
    tokens = words.encode(text)
    deltas = write(OutputProcessor(words, stops=[stop]), pieces(tokens, sizes))
    at_once = write(OutputProcessor(words, stops=[stop]), pieces(tokens, [len(tokens)]))
    assert "".join(delta.text for delta in deltas) == text.split(stop, maxsplit=1)[0]
    assert deltas[-1].finish == (STOP if stop in text else LENGTH)
    entries = [entry for delta in deltas for entry in delta.tokens]
    assert entries == list(at_once[-1].tokens)
    kept = [entry.token_id for entry in entries]
    assert kept == list(tokens[: len(kept)])
    assert (stop in words.decode(kept)) == (stop in text)


@SHARED
@given(text=OUTPUT_TEXTS, sizes=SIZES)
def test_nothing_after_a_stop_token_is_told(words: Tokenizer, text: str, sizes: list[int]) -> None:
    tokens = words.encode(text)
    (end,) = words.stop_ids
    parts = pieces([*tokens, end, *tokens], sizes)
    deltas = write(OutputProcessor(words, stop_ids=[end]), parts)
    assert "".join(delta.text for delta in deltas) == text
    assert deltas[-1].finish is STOP
    assert deltas[-1].tokens[-1].token_id == end
    assert sum(len(delta.tokens) for delta in deltas) == len(tokens) + 1


def test_an_answer_cut_inside_a_character_says_so_at_its_end(words: Tokenizer) -> None:
    """What the model left unfinished is U+FFFD, as the decoder of the whole answer writes it."""
    half = words.encode("\N{ROCKET}")[:1]
    (delta,) = write(OutputProcessor(words), pieces(half, [1]))
    assert delta.text == words.decode(half) == "\ufffd"


@pytest.mark.parametrize("stop", ["\ufffd", "x\ufffd"])
def test_a_stop_string_may_be_what_an_unfinished_character_becomes(
    words: Tokenizer, stop: str
) -> None:
    tokens = (*words.encode("x"), *words.encode("\N{ROCKET}")[:1])
    (delta,) = write(OutputProcessor(words, stops=[stop]), pieces(tokens, [2]))
    assert (delta.text, delta.finish, delta.stop) == ("x\ufffd".removesuffix(stop), STOP, stop)


def test_text_held_for_a_stop_string_comes_out_at_the_end(words: Tokenizer) -> None:
    tokens = words.encode("on the Moon")
    deltas = write(OutputProcessor(words, stops=["the Moonlight"]), pieces(tokens, [1]))
    assert deltas[-1].text.endswith("the Moon")
    assert "".join(delta.text for delta in deltas) == "on the Moon"
    assert deltas[-1].text.endswith("the Moon")


def test_a_piece_without_tokens_says_nothing(words: Tokenizer) -> None:
    assert OutputProcessor(words).push(OutputChunk(tokens=(), origins=())) == Delta()
