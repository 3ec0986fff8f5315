from __future__ import annotations

import pytest
from tests.engine.architectures import build

from cascade.engine.backends.base import RopeLengths, find_rope_lengths


@pytest.mark.parametrize("name", ["llama", "yarn", "llama3 rope", "gpt2", "bloom"])
def test_most_models_have_one_rope_length(name: str) -> None:
    rope_lengths = find_rope_lengths(build(name))

    assert {rope_lengths.of(length) for length in (1, 64, 65, 500)} == {0}


def test_longrope_changes_once() -> None:
    rope_lengths = find_rope_lengths(build("longrope"))

    assert [rope_lengths.of(length) for length in (1, 64, 65, 500)] == [0, 0, 65, 65]


def test_dynamic_rope_changes_with_every_length() -> None:
    rope_lengths = find_rope_lengths(build("dynamic"))

    assert rope_lengths == RopeLengths(original=64, dynamic=True)
    assert [rope_lengths.of(length) for length in (1, 64, 65, 500)] == [0, 0, 65, 500]
