"""Hundreds of stories of faults, in virtual time: text, leaks and endings are always right.

A seed that breaks is printed with all that happened in it; `live(seed)` tells it again.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from cascade.operations.places import Place
from cascade.wire.frames import Refusal

from .clock import run
from .world import World, live

if TYPE_CHECKING:
    from cascade.decoding.session import Session

STORIES = 500


def test_every_story_ends_well() -> None:
    _live_through(STORIES)


def test_a_seed_tells_the_same_story_again() -> None:
    for seed in range(30):
        once: World = run(live(seed))
        again: World = run(live(seed))
        assert _told(once) == _told(again)


def _told(world: World) -> list[object]:
    ends = [(outcome.got, type(outcome.error), outcome.left) for outcome in world.outcomes]
    times = [line.split(" answer ")[0] for line in world.log]
    return [*times, ends]


def test_the_stories_meet_every_way_of_losing_a_replica() -> None:
    causes: set[str] = set()
    for seed in range(200):
        world: World = run(live(seed))
        for outcome in world.outcomes:
            causes |= set(outcome.statistics.failover_causes if outcome.statistics else ())
    assert causes >= {"drafter lost", "drafter late", "drafter full", "expert lost"}


async def _any_answer(self: Place, session: Session) -> Any:
    """A planted bug: an answer is taken whatever it answers."""
    del session
    assert self._link is not None
    answer = await self._link.receive()
    if isinstance(answer, Refusal):
        raise self.tier.error(answer)
    return answer


def _never_leave(self: Place) -> None:
    """A planted bug: leases are forgotten, not given back."""
    self._link = self._lease = None


PLANTED: dict[str, tuple[type, str, Any]] = {
    "answers to other positions": (Place, "answer", _any_answer),
    "leases not given back": (Place, "leave", _never_leave),
}


def _live_through(seeds: int) -> None:
    for seed in range(seeds):
        run(live(seed))


@pytest.mark.parametrize(("where", "name", "bug"), PLANTED.values(), ids=PLANTED)
def test_a_planted_bug_is_found(
    monkeypatch: pytest.MonkeyPatch, where: type, name: str, bug: Any
) -> None:
    monkeypatch.setattr(where, name, bug)
    with pytest.raises(AssertionError) as found:
        _live_through(2_000)
    assert "seed " in "".join(found.value.__notes__)
