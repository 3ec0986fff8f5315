"""How many tokens to draft next."""

from __future__ import annotations

import pytest

from cascade.decoding.draft_length import DraftLength, Fixed, Length, reserved
from cascade.decoding.session import Bonus, Policy


@pytest.mark.parametrize(("room", "tokens"), [(9, 5), (5, 5), (2, 2), (0, 0), (-1, 0)])
def test_a_fixed_length_is_cut_to_the_room(room: int, tokens: int) -> None:
    """Drafting what can never be committed is in vain."""
    length: DraftLength = Fixed(tokens=5)
    assert length.next(room=room) == Length(tokens=tokens, reason="fixed")


def test_a_fixed_length_learns_nothing() -> None:
    """Bad luck does not shorten it."""
    length = Fixed(tokens=4, reason="requested")
    length.learn(drafted=4, accepted=0, draft_s=1.0, judge_s=1.0)
    assert length.next(room=10) == Length(tokens=4, reason="requested")


def test_the_bonus_takes_its_room() -> None:
    """A round that may end in the expert's bonus drafts one token less than the answer lacks."""
    rooms = {bonus: reserved(Policy(bonus=bonus)) for bonus in Bonus}
    assert rooms == {Bonus.NONE: 0, Bonus.EXPERT: 1, Bonus.TARGET: 0}
