from __future__ import annotations

import pytest
from tests.engine.architectures import build

from cascade.engine.backends.base import RopeLengths, find_rope_lengths


@pytest.mark.parametrize("name", ["llama", "yarn", "llama3 rope", "gpt2", "bloom"])
def test_most_models_have_one_regime(name: str) -> None:
    regimes = find_rope_lengths(build(name))

    assert {regimes.of(length) for length in (1, 64, 65, 500)} == {0}


def test_longrope_changes_once() -> None:
    regimes = find_rope_lengths(build("longrope"))

    assert [regimes.of(length) for length in (1, 64, 65, 500)] == [0, 0, 65, 65]


def test_dynamic_rope_changes_with_every_length() -> None:
    regimes = find_rope_lengths(build("dynamic"))

    assert regimes == RopeLengths(original=64, dynamic=True)
    assert [regimes.of(length) for length in (1, 64, 65, 500)] == [0, 0, 65, 500]
