"""When a draft had better stop."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.speculation.confidence import Calibration, outlooks

LONGEST, TOKENS = 2, (0, 1)


def test_confidence_is_the_unscaled_probability() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
    expected = [float(logits[0].softmax(0)[2]), float(logits[1].softmax(0)[0])]
    found = outlooks(logits, [2, 0])
    assert [one.confidence for one in found] == pytest.approx(expected)


def test_a_rival_is_the_likeliest_other_token() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
    first, second = outlooks(logits, [2, 1])
    assert (first.rival, second.rival) == (1, 0)
    assert first.share == pytest.approx(float(logits[0, :2].softmax(0)[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_of_the_host_and_of_a_device_say_the_same(dtype: torch.dtype) -> None:
    """Scores keep a row on the way that a device's rows take."""
    logits = (4 * torch.randn(20, 300, generator=torch.Generator().manual_seed(1))).to(dtype)
    tokens = logits.argmax(dim=1).tolist()
    here, there = outlooks(logits, tokens), outlooks(logits, tokens, scores_BK=logits)
    assert [one.rival for one in here] == [one.rival for one in there]
    for name in ("confidence", "share"):
        told = [getattr(one, name) for one in there]
        assert [getattr(one, name) for one in here] == pytest.approx(told, rel=1e-4)


def test_a_row_that_leaves_no_other_token_has_no_rival() -> None:
    (only,) = outlooks(torch.tensor([[-torch.inf, 2.0]]), [1])
    assert (only.confidence, only.share) == (1.0, 0.0)


def test_a_rival_is_read_from_the_perturbed_row_where_there_is_one() -> None:
    """There the scores may be those of a few tokens, and the only one has no rival."""
    logits = torch.zeros(2, 9)
    scores = torch.tensor([[1.0, 3.0, 2.0], [1.0, -torch.inf, -torch.inf]])
    ids = torch.tensor([[4, 6, 8], [3, 1, 2]])
    first, second = outlooks(logits, [6, 3], scores_BK=scores, ids_BK=ids)
    assert (first.rival, second.share) == (8, 0.0)
    assert first.confidence == pytest.approx(1 / 9)


def test_a_chance_begins_with_what_the_drafter_says_and_ends_with_what_happens() -> None:
    calibration = Calibration()
    assert calibration.chance(0.9) == pytest.approx(0.9)
    for count in range(200):
        calibration.learn(0.95, stood=count % 2 == 0)
    assert calibration.chance(0.95) == pytest.approx(0.5, abs=0.03)
    assert calibration.chance(0.3) == pytest.approx(0.3)


def test_what_happens_now_outweighs_what_happened_long_ago() -> None:
    calibration = Calibration()
    for stood in [False] * 2000 + [True] * 1000:
        calibration.learn(1.0, stood=stood)
    assert calibration.chance(1.0) > 0.9


laws = st.lists(st.integers(1, 9), min_size=2, max_size=2).map(
    lambda weights: tuple(Fraction(w, sum(weights)) for w in weights)
)

prefixes = [p for n in range(LONGEST + 1) for p in itertools.product(TOKENS, repeat=n)]

tables = st.fixed_dictionaries(dict.fromkeys(prefixes, laws))

Table = dict[tuple[int, ...], tuple[Fraction, ...]]


@given(q=tables, p=tables, stops=st.dictionaries(st.sampled_from(TOKENS), st.booleans()))
def test_stopping_after_a_token_changes_no_law(q: Table, p: Table, stops: dict[int, bool]) -> None:
    """All blocks of up to two tokens, enumerated: the answer's law is that of the expert."""
    found = dict.fromkeys(itertools.product(TOKENS, repeat=2), Fraction(0))
    for first in TOKENS:
        drafted, kept = q[()][first], min(Fraction(1), p[()][first] / q[()][first])
        _add(found, (first,), drafted * kept, q=q, p=p, ends=stops.get(first, False))
        for other, law in _residual(p[()], q[()]).items():
            _write(found, (other,), drafted * (1 - kept) * law, p=p)
    assert found == {pair: prod((p[()][pair[0]], p[pair[:1]][pair[1]])) for pair in found}


def _add(  # noqa: PLR0913 - all that one branch of the tree is
    found: dict[tuple[int, ...], Fraction],
    prefix: tuple[int, ...],
    chance: Fraction,
    *,
    q: Table,
    p: Table,
    ends: bool,
) -> None:
    """Go on after a token that stands: with the bonus, or with another draft and its verdict."""
    if ends:
        _write(found, prefix, chance, p=p)
        return
    for token in TOKENS:
        drafted = q[prefix][token]
        kept = min(Fraction(1), p[prefix][token] / drafted)
        found[*prefix, token] += chance * drafted * kept
        for other, law in _residual(p[prefix], q[prefix]).items():
            found[*prefix, other] += chance * drafted * (1 - kept) * law


def _write(
    found: dict[tuple[int, ...], Fraction], prefix: tuple[int, ...], chance: Fraction, *, p: Table
) -> None:
    for token in TOKENS:
        found[*prefix, token] += chance * p[prefix][token]


def _residual(p: tuple[Fraction, ...], q: tuple[Fraction, ...]) -> dict[int, Fraction]:
    over = [max(Fraction(0), ours - theirs) for ours, theirs in zip(p, q, strict=True)]
    return {token: law / sum(over) for token, law in enumerate(over) if law}
