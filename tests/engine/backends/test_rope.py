"""The RoPE length of a token is that of a plain forward pass over the tokens up to it."""

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.engine.architectures import build

from cascade.engine.backends.base import RopeLengths, find_rope_lengths

LENGTHS = (1, 32, 33, 40, 41, 64, 65, 500)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        *[(name, [0] * 8) for name in ("llama", "yarn", "llama3 rope", "gpt2", "bloom")],
        *[(name, [0, 0, 0, 0, 0, 0, 65, 65]) for name in ("longrope", "longrope llama")],
        ("longrope moe", [0, 0, 0, 0, 0, 0, 65, 65]),
        ("dynamic", [0, 0, 0, 0, 0, 0, 65, 500]),
        ("dynamic of another original length", [0, 0, 0, 0, 0, 0, 65, 500]),
        ("two kinds of layers", [0, 0, 0, 0, 0, 0, 65, 65]),
        ("two original lengths", [0, 0, 0, 0, 41, 41, 65, 65]),
    ],
)
def test_rope_lengths_change_where_the_model_changes(name: str, expected: list[int]) -> None:
    rope_lengths = find_rope_lengths(build(name))

    assert [rope_lengths.of(length) for length in LENGTHS] == expected


@given(
    lengths=st.builds(
        RopeLengths,
        switches=st.frozensets(st.integers(1, 40), max_size=3),
        dynamic_beyond=st.none() | st.integers(1, 40),
    ),
    rows=st.builds(range, st.integers(0, 50), st.integers(0, 60)),
)
def test_runs_are_the_longest_with_one_rope_length(lengths: RopeLengths, rows: range) -> None:
    runs = list(lengths.runs(rows))

    assert [row for run, _ in runs for row in run] == list(rows)
    assert all(lengths.of(row + 1) == length for run, length in runs for row in run)
    assert all(left != right for (_, left), (_, right) in pairwise(runs))
