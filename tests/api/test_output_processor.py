"""Deltas have whole characters, the text of their tokens, and no part of a stop string."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cascade.api.output_processor import Delta, OutputProcessor, StopMatcher, TextOptions
from cascade.types import FinishReason, Origin, OutputChunk

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.engine.tokenizer import Tokenizer

ALPHABET = "ab🌙"

TEXTS = st.text(ALPHABET, max_size=30)

STOPS = st.lists(st.text(ALPHABET, min_size=1, max_size=4), max_size=4)


def split(text: str, places: list[int]) -> list[str]:
    at = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    return [text[start:end] for start, end in pairwise(at)]


def match(parts: list[str], stops: list[str]) -> tuple[str, str | None]:
    matcher, released = StopMatcher(stops), ""
    for part in parts:
        found = matcher.push(part)
        released += found.text
        if found.stop is not None:
            return released, found.stop
    return released + matcher.flush(), None


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
def test_the_match_does_not_depend_on_how_the_text_is_split(
    text: str, stops: list[str], places: list[int]
) -> None:
    assert match(split(text, places), stops) == expected(text, stops)


@given(text=TEXTS, stops=STOPS, places=st.lists(st.integers(0, 99), max_size=8))
def test_released_text_is_always_part_of_the_result(
    text: str, stops: list[str], places: list[int]
) -> None:
    """At every step, the text so far begins the final text."""
    matcher, released = StopMatcher(stops), ""
    final, _ = expected(text, stops)
    for part in split(text, places):
        found = matcher.push(part)
        released += found.text
        assert final.startswith(released)
        if found.stop is not None:
            break


@given(text=TEXTS)
def test_without_stop_strings_no_text_is_held(text: str) -> None:
    assert StopMatcher([]).push(text).text == text


LENGTH, STOP = FinishReason.LENGTH, FinishReason.STOP

OUTPUT_TEXTS = st.text("ab é🌙日", min_size=1, max_size=24)

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=12)

# The fixture is read only, so examples may share it.
SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def chunks(tokens: Sequence[int], sizes: Sequence[int]) -> list[OutputChunk]:
    """Return the tokens in blocks; the last one has finish reason `length`."""
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


def process(processor: OutputProcessor, parts: Sequence[OutputChunk]) -> list[Delta]:
    deltas: list[Delta] = []
    for part in parts:
        deltas.append(processor.push(part))
        if deltas[-1].finish is not None:
            break
    return deltas


@SHARED
@example(text="日" * 12, sizes=[1])  # tokens that end inside characters
@given(text=OUTPUT_TEXTS, sizes=SIZES)
def test_the_deltas_have_the_text_and_every_token_once(
    tokenizer: Tokenizer, text: str, sizes: list[int]
) -> None:
    tokens = tokenizer.encode(text)
    deltas = process(OutputProcessor(tokenizer), chunks(tokens, sizes))
    assert "".join(delta.text for delta in deltas) == text
    assert [token.token_id for delta in deltas for token in delta.tokens] == list(tokens)


@SHARED
@example(text="日" * 12, sizes=[1])  # tokens that end inside characters
@given(text=OUTPUT_TEXTS, sizes=SIZES)
def test_no_delta_has_half_a_character(tokenizer: Tokenizer, text: str, sizes: list[int]) -> None:
    deltas = process(OutputProcessor(tokenizer), chunks(tokenizer.encode(text), sizes))
    assert not any("\ufffd" in delta.text for delta in deltas)


@SHARED
@given(text=OUTPUT_TEXTS, sizes=SIZES, stop=st.text("ab é🌙日", min_size=1, max_size=3))
def test_the_text_ends_before_a_stop_string_wherever_blocks_end(
    tokenizer: Tokenizer, text: str, sizes: list[int], stop: str
) -> None:
    """Text and tokens are as from one block; the last token completed the stop string."""
    tokens = tokenizer.encode(text)
    deltas = process(
        OutputProcessor(tokenizer, options=TextOptions(stops=(stop,))), chunks(tokens, sizes)
    )
    at_once = process(
        OutputProcessor(tokenizer, options=TextOptions(stops=(stop,))),
        chunks(tokens, [len(tokens)]),
    )
    assert "".join(delta.text for delta in deltas) == text.split(stop, maxsplit=1)[0]
    assert deltas[-1].finish == (STOP if stop in text else LENGTH)
    released = [token for delta in deltas for token in delta.tokens]
    assert released == list(at_once[-1].tokens)
    kept = [token.token_id for token in released]
    assert kept == list(tokens[: len(kept)])
    assert (stop in tokenizer.decode(kept)) == (stop in text)


@SHARED
@given(text=OUTPUT_TEXTS, sizes=SIZES)
def test_nothing_after_a_stop_token_is_released(
    tokenizer: Tokenizer, text: str, sizes: list[int]
) -> None:
    tokens = tokenizer.encode(text)
    (end,) = tokenizer.stop_ids
    parts = chunks([*tokens, end, *tokens], sizes)
    deltas = process(OutputProcessor(tokenizer, stop_ids=[end]), parts)
    assert "".join(delta.text for delta in deltas) == text
    assert deltas[-1].finish is STOP
    assert deltas[-1].tokens[-1].token_id == end
    assert sum(len(delta.tokens) for delta in deltas) == len(tokens) + 1


def test_an_unfinished_character_is_a_replacement_character(tokenizer: Tokenizer) -> None:
    """As the tokenizer decodes it."""
    half = tokenizer.encode("\N{ROCKET}")[:1]
    (delta,) = process(OutputProcessor(tokenizer), chunks(half, [1]))
    assert delta.text == tokenizer.decode(half) == "\ufffd"


@pytest.mark.parametrize("stop", ["\ufffd", "x\ufffd"])
def test_a_stop_string_can_match_a_replacement_character(tokenizer: Tokenizer, stop: str) -> None:
    tokens = (*tokenizer.encode("x"), *tokenizer.encode("\N{ROCKET}")[:1])
    (delta,) = process(
        OutputProcessor(tokenizer, options=TextOptions(stops=(stop,))), chunks(tokens, [2])
    )
    assert (delta.text, delta.finish, delta.stop) == ("x\ufffd".removesuffix(stop), STOP, stop)


def test_held_text_is_released_at_the_end(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("on the Moon")
    deltas = process(
        OutputProcessor(tokenizer, options=TextOptions(stops=("the Moonlight",))),
        chunks(tokens, [1]),
    )
    assert deltas[-1].text.endswith("the Moon")
    assert "".join(delta.text for delta in deltas) == "on the Moon"
    assert deltas[-1].text.endswith("the Moon")


def test_a_chunk_without_tokens_is_an_empty_delta(tokenizer: Tokenizer) -> None:
    assert OutputProcessor(tokenizer).push(OutputChunk(tokens=(), origins=())) == Delta()


@SHARED
@given(sizes=SIZES, early=st.integers(0, 12))
def test_a_stop_string_within_the_least_tokens_does_not_end_the_text(
    tokenizer: Tokenizer, sizes: list[int], early: int
) -> None:
    """One that begins there and is complete after them does."""
    tokens = tokenizer.encode("the Moon and the Moon and the Moon")
    options = TextOptions(stops=("Moon", "the Moon and"), min_tokens=early)
    found = "".join(
        delta.text
        for delta in process(OutputProcessor(tokenizer, options=options), chunks(tokens, sizes))
    )
    text, expected = "", None
    for count, token in enumerate(tokens, 1):
        before, text = text, text + tokenizer.decode([token])
        ends = [
            (start + len(stop), start)
            for stop in options.stops
            for start in [text.find(stop, max(0, len(before) - len(stop) + 1))]
            if start >= 0
        ]
        if count > early and ends:
            expected = text[: min(ends)[1]]
            break
    assert found == (text if expected is None else expected)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_stop_string_can_stay_in_the_text(tokenizer: Tokenizer, size: int) -> None:
    tokens = tokenizer.encode("Buzz walked on the Moon and the Moon")
    options = TextOptions(stops=("he Mo",), include_stop=True)
    deltas = process(OutputProcessor(tokenizer, options=options), chunks(tokens, [size]))
    assert "".join(delta.text for delta in deltas) == "Buzz walked on the Mo"
    assert deltas[-1].stop == "he Mo"


def test_a_stop_token_can_stay_in_the_text(tokenizer: Tokenizer) -> None:
    *tokens, end = tokenizer.encode("the Moon")
    options = TextOptions(include_stop=True)
    processor = OutputProcessor(tokenizer, stop_ids=[end], options=options)
    deltas = process(processor, chunks([*tokens, end], [1]))
    assert "".join(delta.text for delta in deltas) == "the Moon"
    assert deltas[-1].stop == end


def test_special_tokens_are_shown_on_request(tokenizer: Tokenizer) -> None:
    tokens = tokenizer.encode("<|user|>the<|end|><|user|>Moon")
    texts = [
        "".join(delta.text for delta in process(processor, chunks(tokens, [1])))
        for processor in (
            OutputProcessor(tokenizer),
            OutputProcessor(tokenizer, options=TextOptions(skip_special=False)),
        )
    ]
    assert texts == ["theMoon", "<|user|>the<|end|><|user|>Moon"]
