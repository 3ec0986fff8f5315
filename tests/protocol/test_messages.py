from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cascade.protocol.messages import extend_digest

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=30)


def test_the_example_of_the_docstring() -> None:
    assert extend_digest(extend_digest(0, (1, 2)), (3,)) == extend_digest(0, (1, 2, 3))


def test_the_digest_is_the_same_in_every_version() -> None:
    """Router and replicas may run different versions; a change needs a new protocol version."""
    assert extend_digest(0, ()) == 0
    assert extend_digest(0, (1, 2, 3)) == 0x2A539E45F600A866


@given(first=TOKENS, second=TOKENS)
def test_how_tokens_are_split_into_calls_does_not_matter(
    first: list[int], second: list[int]
) -> None:
    assert extend_digest(extend_digest(0, first), second) == extend_digest(0, first + second)


@given(tokens=TOKENS, other=TOKENS)
def test_different_tokens_have_different_digests(tokens: list[int], other: list[int]) -> None:
    assert (extend_digest(0, tokens) == extend_digest(0, other)) == (tokens == other)


@given(tokens=TOKENS)
def test_a_digest_has_64_bits(tokens: list[int]) -> None:
    assert 0 <= extend_digest(0, tokens) < 2**64
