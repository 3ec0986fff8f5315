"""How many tokens to draft next, on tiers whose costs and luck the test chooses."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest

from cascade.rules import TokenV3
from cascade.speculation.cost_model import FEWEST, MOST_TOKENS, RoundSample, StepTime, Timing, Yield
from cascade.speculation.draft_length import (
    FIRST_PAUSE,
    AdaptiveDraftLength,
    DraftLength,
    DraftLengthTuner,
    DraftPlan,
    Fixed,
    expert_slots,
)
from cascade.types import Bonus, DecodingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING = RoundSample(drafted=0, accepted=0, draft_s=0, judge_s=0, draft=Timing(), judge=Timing())


@dataclass(kw_only=True)
class World:
    """Both tiers: what steps and trips take, and how often a draft stands."""

    chance: float
    draft_s: float = 0.001
    judge_s: float = 0.02
    token_s: float = 0.0005  # of a pass, for each token in it
    trip_s: float = 0.0
    sessions: int = 1
    hidden: bool = False  # a whole block is followed by one that is there already
    luck: random.Random = field(default_factory=lambda: random.Random(1))  # noqa: S311 - luck, not secrets
    stood: bool = False

    def round(self, tokens: int) -> tuple[float, int, RoundSample]:
        """Return the seconds, the committed tokens, and what there is to learn of a round.

        Every other session is taken to do the same.
        """
        (lesson,) = self.rounds([tokens], others=self.sessions - 1)
        return lesson.draft_s + lesson.judge_s, lesson.accepted + 1, lesson

    def rounds(self, lengths: Sequence[int], *, others: int = 0) -> list[RoundSample]:
        """Return what there is to learn of one round of sessions that share every pass."""
        tokens = sum(length + 1 for length in lengths) * (1 + others)
        step_s = self.judge_s + self.token_s * tokens
        return [self._lesson(length, step_s=step_s, tokens=tokens) for length in lengths]

    def _lesson(self, length: int, *, step_s: float, tokens: int) -> RoundSample:
        accepted = 0
        while accepted < length and self.luck.random() < self.chance:
            accepted += 1
        pushed = self.hidden and self.stood
        self.stood = 0 < length == accepted
        drafting_s = length * self.draft_s
        return RoundSample(
            drafted=length,
            accepted=accepted,
            draft_s=0.0 if pushed or not length else drafting_s + self.trip_s,
            judge_s=step_s + (self.trip_s if length else 0.0),
            draft=Timing(service_s=0.0 if pushed else drafting_s, step_s=self.draft_s),
            judge=Timing(service_s=step_s, step_s=step_s, tokens=tokens, sessions=self.sessions),
        )

    def expected(self, tokens: int) -> float:
        """Return the committed tokens a second of blocks of a fixed length."""
        whole = self.chance**tokens
        committed = sum(self.chance**k for k in range(tokens + 1))
        step_s = self.judge_s + self.token_s * self.sessions * (tokens + 1)
        waited_s = tokens * self.draft_s + self.trip_s
        if self.hidden:
            waited_s *= 1 - whole
        return committed / (step_s + (waited_s + self.trip_s if tokens else 0))

    def speed(self, length: DraftLength, *, tokens: int = 6_000) -> float:
        """Return the committed tokens a second of one long answer."""
        seconds, written = 0.0, 0
        while written < tokens:
            took_s, more, lesson = self.round(length.next(room=100).tokens)
            length.learn(lesson)
            seconds, written = seconds + took_s, written + more
        return written / seconds

    def shared_speed(self, experience: DraftLengthTuner, *, tokens: int = 6_000) -> float:
        """Return the committed tokens a second of each of the sessions, in step with each other."""
        lengths = [experience.session(DecodingParams()) for _ in range(self.sessions)]
        seconds, written = 0.0, 0
        while written < tokens * self.sessions:
            lessons = self.rounds([length.next(room=100).tokens for length in lengths])
            for length, lesson in zip(lengths, lessons, strict=True):
                length.learn(lesson)
            seconds += max(lesson.draft_s + lesson.judge_s for lesson in lessons)
            written += sum(lesson.accepted + 1 for lesson in lessons)
        return written / seconds / self.sessions


WORLDS = {
    "easy": {"chance": 0.95},
    "hard": {"chance": 0.3},
    "hopeless": {"chance": 0.05, "draft_s": 0.004},
    "far": {"chance": 0.7, "trip_s": 0.01},
    "too far": {"chance": 0.6, "trip_s": 0.1},
    "crowded": {"chance": 0.7, "sessions": 16, "token_s": 0.001},
    "crowded and far": {"chance": 0.7, "sessions": 16, "token_s": 0.001, "trip_s": 0.01},
    "hidden": {"chance": 0.9, "draft_s": 0.003, "hidden": True},
    "slow drafter": {"chance": 0.8, "draft_s": 0.015},
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_automatic_lengths_are_nearly_the_best_fixed_one(world: dict[str, float]) -> None:
    """Within 5 % of the best of all fixed lengths, and hardly slower than the expert alone."""
    fixed = [World(**world).expected(length) for length in range(17)]  # pyright: ignore[reportArgumentType] - of the names above
    automatic = World(**world).shared_speed(DraftLengthTuner())  # pyright: ignore[reportArgumentType] - as above
    assert automatic >= 0.95 * max(fixed)
    assert automatic >= 0.97 * fixed[0]


def session(**more: float) -> tuple[AdaptiveDraftLength, World]:
    return DraftLengthTuner().session(DecodingParams()), World(**more)  # pyright: ignore[reportArgumentType] - of World's fields


def test_a_change_of_luck_is_noticed() -> None:
    """The drafter gets much better in mid-answer: a trial finds it out."""
    length, world = session(chance=0.02, draft_s=0.01)
    world.speed(length, tokens=1000)
    assert length.next(room=100).tokens == 0
    world.chance = 0.95
    world.speed(length, tokens=1000)
    assert length.next(room=100).tokens >= 3


def test_trials_become_rare_while_they_fail() -> None:
    length, world = session(chance=0.01, draft_s=0.02)
    reasons: list[str] = []
    for _ in range(1000):
        wanted = length.next(room=100)
        reasons.append(wanted.reason)
        length.learn(world.round(wanted.tokens)[2])
    trials = [
        place
        for place, (before, reason) in enumerate(itertools.pairwise(reasons))
        if reason == "trial" and before != "trial"
    ]
    gaps = [later - earlier for earlier, later in itertools.pairwise(trials)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * FIRST_PAUSE
    assert set(reasons) == {"measuring", "fastest", "alone", "trial"} - (
        set() if "fastest" in reasons else {"fastest"}
    )


def test_a_stay_without_drafts_says_how_long_it_lasts() -> None:
    """So the expert streams it whole, without being asked in between."""
    length, world = session(chance=0.0, draft_s=0.015)
    for _ in range(FEWEST):
        length.learn(world.round(5)[2])
    stay = [length.next(room=100)]
    while stay[-1].reason == "alone":
        length.learn(world.round(0)[2])
        stay.append(length.next(room=100))
    assert [one.alone for one in stay[:-1]] == list(range(FIRST_PAUSE, 0, -1))
    assert stay[-1].reason == "trial"


def test_the_first_trial_comes_soon_however_bad_the_first_guess() -> None:
    """What cold tiers took says little; what the trial took decides when the next one comes."""
    length, world = session(chance=0.6, trip_s=0.2)
    for _ in range(FEWEST):
        length.learn(world.round(5)[2])
    stays: list[int] = []
    while len(stays) < 2:
        wanted = length.next(room=100)
        if wanted.reason == "alone" and length.kind.alone == 0:
            stays.append(length.kind.pause)
        length.learn(world.round(wanted.tokens)[2])
    assert stays[0] == FIRST_PAUSE
    assert stays[1] > 4 * FIRST_PAUSE


def test_a_session_that_drafts_does_not_keep_the_others_from_a_trial() -> None:
    """Of two that differ in luck one drafts throughout; the other tries again all the same."""
    experience = DraftLengthTuner()
    lucky, unlucky = (experience.session(DecodingParams()) for _ in range(2))
    good, bad = World(chance=0.95, sessions=2), World(chance=0.0, sessions=2, draft_s=0.005)
    reasons: set[str] = set()
    for _ in range(8 * FIRST_PAUSE):
        for length, world in ((lucky, good), (unlucky, bad)):
            wanted = length.next(room=100)
            length.learn(world.round(wanted.tokens)[2])
        reasons.add(wanted.reason)
    assert lucky.next(room=100).reason == "fastest"
    assert reasons >= {"alone", "trial"}


def test_sessions_of_one_kind_learn_from_each_other() -> None:
    experience, world = DraftLengthTuner(), World(chance=0.0, draft_s=0.005)
    assert experience.session(DecodingParams()).next(room=9).reason == "measuring"
    world.speed(experience.session(DecodingParams()), tokens=100)
    assert experience.session(DecodingParams()).next(room=9).tokens == 0
    assert experience.session(DecodingParams(rule=TokenV3(alpha=0.9))).next(room=9).tokens > 0


def test_a_length_says_how_likely_its_block_stands() -> None:
    """Where that is unlikely, nothing is drafted on from its end."""
    for chance in (0.9, 0.2):
        length, world = session(chance=chance)
        world.speed(length, tokens=500)
        wanted = length.next(room=100)
        assert wanted.sure == pytest.approx(chance**wanted.tokens, abs=0.2)


def test_a_round_without_news_teaches_nothing() -> None:
    experience = DraftLengthTuner()
    experience.session(DecodingParams()).learn(NOTHING)
    assert not experience.costs.known


def test_a_cold_start_and_a_stall_do_not_decide() -> None:
    """One round that takes a hundred times as long leaves speculation where it was."""
    experience, world = DraftLengthTuner(), World(chance=0.9)
    slow = replace(world, draft_s=0.1, luck=random.Random(2))  # noqa: S311 - luck, not secrets
    for place in range(60):
        length = experience.session(DecodingParams())
        assert length.next(room=50).tokens > 0
        length.learn((slow if place in {0, 30} else world).round(5)[2])


def test_no_room_is_the_experts() -> None:
    assert DraftLengthTuner().session(DecodingParams()).next(room=0) == DraftPlan(
        tokens=0, reason="room"
    )


@pytest.mark.parametrize(("room", "tokens"), [(9, 5), (5, 5), (2, 2), (0, 0), (-1, 0)])
def test_a_fixed_length_is_cut_to_the_room(room: int, tokens: int) -> None:
    """Drafting what can never be committed is in vain."""
    length: DraftLength = Fixed(tokens=5)
    assert (length.next(room=room).tokens, length.next(room=room).reason) == (tokens, "fixed")


def test_a_fixed_length_learns_nothing() -> None:
    """Bad luck does not shorten it."""
    length = Fixed(tokens=4, reason="requested")
    length.learn(World(chance=0).round(4)[2])
    assert length.next(room=10).tokens == 4


def test_the_bonus_takes_its_room() -> None:
    """A round that may end in the expert's bonus drafts one token less than the answer lacks."""
    rooms = {bonus: expert_slots(DecodingParams(bonus=bonus)) for bonus in Bonus}
    assert rooms == {Bonus.NONE: 0, Bonus.EXPERT: 1, Bonus.TARGET: 0}


def test_a_pass_has_room_for_what_lengthens_it_by_no_more_than_a_share() -> None:
    times = StepTime()
    assert times.more(1, share=1.0) == MOST_TOKENS
    for tokens in (1, 5, 9) * 100:
        times.learn(tokens=tokens, seconds=0.6 + 0.2 * tokens)
    assert times.more(1, share=1.0) == pytest.approx(4, abs=1)
    assert times.more(16, share=1.0) == pytest.approx(19, abs=1)
    assert times.more(16, share=0.0) == 0


def test_blocks_drafted_on_other_verdicts_make_longer_drafts_pay() -> None:
    """What is hidden after a block that fell costs no time either."""
    costs = DraftLengthTuner().costs
    for place in range(100):
        asked = Timing(service_s=0.0 if place % 2 else 0.01, step_s=0.001)
        judge = Timing(service_s=0.02, step_s=0.02, tokens=2, sessions=1)
        lesson = RoundSample(
            drafted=1, accepted=0, draft_s=0.01, judge_s=0.02, draft=asked, judge=judge
        )
        costs.learn(lesson, stood=False if place else None)
    assert costs.branched.value == pytest.approx(0.5, abs=0.05)
    fallen = Yield(length=4, tokens=2.0, whole=0.0)
    plain = costs.judge_s(4) + costs.draft_s(4)
    assert costs.round_s(fallen) == pytest.approx(
        costs.judge_s(4) + (1 - costs.branched.value) * costs.draft_s(4)
    )
    assert costs.round_s(fallen) < plain
