"""Confidence of drafted tokens, its calibration, and the proof that stopping early is exact."""

from __future__ import annotations

import itertools
from fractions import Fraction
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cascade.speculation.confidence import Calibration, token_confidences

LONGEST, TOKENS = 2, (0, 1)


def test_the_probability_is_the_unscaled_one() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
    expected = [float(logits[0].softmax(0)[2]), float(logits[1].softmax(0)[0])]
    found = token_confidences(logits, [2, 0])
    assert [one.probability for one in found] == pytest.approx(expected)


def test_the_runner_up_is_the_likeliest_other_token() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], [3.0, 0.0, -1.0]])
    first, second = token_confidences(logits, [2, 1])
    assert (first.runner_up, second.runner_up) == (1, 0)
    assert first.runner_up_share == pytest.approx(float(logits[0, :2].softmax(0)[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_cpu_path_and_the_device_path_agree(dtype: torch.dtype) -> None:
    """Given scores, a CPU takes the device path."""
    logits = (4 * torch.randn(20, 300, generator=torch.Generator().manual_seed(1))).to(dtype)
    tokens = logits.argmax(dim=1).tolist()
    on_cpu = token_confidences(logits, tokens)
    on_device = token_confidences(logits, tokens, scores_BK=logits)
    assert [one.runner_up for one in on_cpu] == [one.runner_up for one in on_device]
    for name in ("probability", "runner_up_share"):
        wanted = [getattr(one, name) for one in on_device]
        assert [getattr(one, name) for one in on_cpu] == pytest.approx(wanted, rel=1e-4)


def test_the_only_possible_token_has_no_runner_up() -> None:
    (only,) = token_confidences(torch.tensor([[-torch.inf, 2.0]]), [1])
    assert (only.probability, only.runner_up_share) == (1.0, 0.0)


def test_the_runner_up_is_read_from_the_scores_if_there_are_some() -> None:
    """Scores may cover a few tokens only, and the only one of those has no runner-up."""
    logits = torch.zeros(2, 9)
    scores = torch.tensor([[1.0, 3.0, 2.0], [1.0, -torch.inf, -torch.inf]])
    ids = torch.tensor([[4, 6, 8], [3, 1, 2]])
    first, second = token_confidences(logits, [6, 3], scores_BK=scores, ids_BK=ids)
    assert (first.runner_up, second.runner_up_share) == (8, 0.0)
    assert first.probability == pytest.approx(1 / 9)


def test_acceptance_starts_at_the_drafters_probability_and_follows_verdicts() -> None:
    calibration = Calibration()
    assert calibration.acceptance_prob(0.9) == pytest.approx(0.9)
    for count in range(200):
        calibration.learn(0.95, accepted=count % 2 == 0)
    assert calibration.acceptance_prob(0.95) == pytest.approx(0.5, abs=0.03)
    assert calibration.acceptance_prob(0.3) == pytest.approx(0.3)


def test_recent_verdicts_outweigh_old_ones() -> None:
    calibration = Calibration()
    for accepted in [False] * 2000 + [True] * 1000:
        calibration.learn(1.0, accepted=accepted)
    assert calibration.acceptance_prob(1.0) > 0.9


distributions = st.lists(st.integers(1, 9), min_size=2, max_size=2).map(
    lambda weights: tuple(Fraction(w, sum(weights)) for w in weights)
)

prefixes = [p for n in range(LONGEST + 1) for p in itertools.product(TOKENS, repeat=n)]

tables = st.fixed_dictionaries(dict.fromkeys(prefixes, distributions))

Table = dict[tuple[int, ...], tuple[Fraction, ...]]


@given(q=tables, p=tables, stops=st.dictionaries(st.sampled_from(TOKENS), st.booleans()))
def test_stopping_after_any_token_changes_no_distribution(
    q: Table, p: Table, stops: dict[int, bool]
) -> None:
    """All blocks of up to two tokens, enumerated: answers follow the expert's distribution."""
    found = dict.fromkeys(itertools.product(TOKENS, repeat=2), Fraction(0))
    for first in TOKENS:
        drafted, kept = q[()][first], min(Fraction(1), p[()][first] / q[()][first])
        _add(found, (first,), drafted * kept, q=q, p=p, ends=stops.get(first, False))
        for other, share in _residual(p[()], q[()]).items():
            _write(found, (other,), drafted * (1 - kept) * share, p=p)
    assert found == {pair: prod((p[()][pair[0]], p[pair[:1]][pair[1]])) for pair in found}


def _add(  # noqa: PLR0913 - the state of one branch
    found: dict[tuple[int, ...], Fraction],
    prefix: tuple[int, ...],
    chance: Fraction,
    *,
    q: Table,
    p: Table,
    ends: bool,
) -> None:
    """Continue after an accepted token: with the bonus, or with another draft and its verdict."""
    if ends:
        _write(found, prefix, chance, p=p)
        return
    for token in TOKENS:
        drafted = q[prefix][token]
        kept = min(Fraction(1), p[prefix][token] / drafted)
        found[*prefix, token] += chance * drafted * kept
        for other, share in _residual(p[prefix], q[prefix]).items():
            found[*prefix, other] += chance * drafted * (1 - kept) * share


def _write(
    found: dict[tuple[int, ...], Fraction], prefix: tuple[int, ...], chance: Fraction, *, p: Table
) -> None:
    for token in TOKENS:
        found[*prefix, token] += chance * p[prefix][token]


def _residual(p: tuple[Fraction, ...], q: tuple[Fraction, ...]) -> dict[int, Fraction]:
    over = [max(Fraction(0), ours - theirs) for ours, theirs in zip(p, q, strict=True)]
    return {token: x / sum(over) for token, x in enumerate(over) if x}
