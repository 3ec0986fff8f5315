"""Stop strings: nothing of one is ever let out, however the text is cut."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from cascade.ingress.stop import StopMatcher

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
