"""Draft lengths, on simulated tiers with given costs and acceptance rates."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING

import pytest

from cascade.rules import TokenV3
from cascade.speculation.cost_model import (
    MAX_TOKENS,
    MIN_SAMPLES,
    RoundSample,
    StepTime,
    Timing,
    Yield,
)
from cascade.speculation.draft_length import (
    FIRST_PAUSE,
    MAX_POLICIES,
    AdaptiveDraftLength,
    DraftLength,
    DraftLengthTuner,
    DraftPlan,
    Fixed,
    expert_slots,
)
from cascade.types import Block, Bonus, DecodingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

NOTHING = RoundSample(drafted=0, accepted=0, draft_s=0, judge_s=0, draft=Timing(), judge=Timing())


@dataclass(kw_only=True)
class World:
    """Both tiers: what steps and round trips cost, and how often a token is accepted."""

    rate: float  # of acceptance
    draft_s: float = 0.001
    judge_s: float = 0.02
    token_s: float = 0.0005  # of a pass, for each token in it
    trip_s: float = 0.0
    sessions: int = 1
    hidden: bool = False  # after a fully accepted block the next one is ready
    random: Random = field(default_factory=lambda: Random(1))  # noqa: S311 - a simulation, no secret
    all_accepted: bool = False

    def round(self, tokens: int) -> tuple[float, int, RoundSample]:
        """Return the seconds, the committed tokens and the sample of a round.

        All other sessions do the same.
        """
        (sample,) = self.rounds([tokens], others=self.sessions - 1)
        return sample.draft_s + sample.judge_s, sample.accepted + 1, sample

    def rounds(self, lengths: Sequence[int], *, others: int = 0) -> list[RoundSample]:
        """Return the samples of one round of sessions that share every pass."""
        tokens = sum(length + 1 for length in lengths) * (1 + others)
        step_s = self.judge_s + self.token_s * tokens
        return [self._measure(length, step_s=step_s, tokens=tokens) for length in lengths]

    def _measure(self, length: int, *, step_s: float, tokens: int) -> RoundSample:
        accepted = 0
        while accepted < length and self.random.random() < self.rate:
            accepted += 1
        pushed = self.hidden and self.all_accepted
        self.all_accepted = 0 < length == accepted
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
        """Return the committed tokens per second of blocks of a fixed length."""
        all_accepted = self.rate**tokens
        committed = sum(self.rate**k for k in range(tokens + 1))
        step_s = self.judge_s + self.token_s * self.sessions * (tokens + 1)
        waited_s = tokens * self.draft_s + self.trip_s
        if self.hidden:
            waited_s *= 1 - all_accepted
        return committed / (step_s + (waited_s + self.trip_s if tokens else 0))

    def speed(self, length: DraftLength, *, tokens: int = 6_000) -> float:
        """Return the committed tokens per second of one long answer."""
        seconds, written = 0.0, 0
        while written < tokens:
            took_s, more, sample = self.round(length.next(budget=100).tokens)
            length.learn(sample)
            seconds, written = seconds + took_s, written + more
        return written / seconds

    def shared_speed(self, tuner: DraftLengthTuner, *, tokens: int = 6_000) -> float:
        """Return the committed tokens per second of each session, all in lockstep."""
        lengths = [tuner.session(DecodingParams()) for _ in range(self.sessions)]
        seconds, written = 0.0, 0
        while written < tokens * self.sessions:
            samples = self.rounds([length.next(budget=100).tokens for length in lengths])
            for length, sample in zip(lengths, samples, strict=True):
                length.learn(sample)
            seconds += max(sample.draft_s + sample.judge_s for sample in samples)
            written += sum(sample.accepted + 1 for sample in samples)
        return written / seconds / self.sessions


WORLDS = {
    "easy": {"rate": 0.95},
    "hard": {"rate": 0.3},
    "hopeless": {"rate": 0.05, "draft_s": 0.004},
    "far": {"rate": 0.7, "trip_s": 0.01},
    "too far": {"rate": 0.6, "trip_s": 0.1},
    "crowded": {"rate": 0.7, "sessions": 16, "token_s": 0.001},
    "crowded and far": {"rate": 0.7, "sessions": 16, "token_s": 0.001, "trip_s": 0.01},
    "hidden": {"rate": 0.9, "draft_s": 0.003, "hidden": True},
    "slow drafter": {"rate": 0.8, "draft_s": 0.015},
}


@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_adaptive_lengths_nearly_reach_the_best_fixed_length(
    world: dict[str, float],
) -> None:
    """Within 5 % of the best fixed length, and within 3 % of the expert alone."""
    fixed = [World(**world).expected(length) for length in range(17)]  # pyright: ignore[reportArgumentType] - these are its fields
    adaptive = World(**world).shared_speed(DraftLengthTuner())  # pyright: ignore[reportArgumentType] - as above
    assert adaptive >= 0.95 * max(fixed)
    assert adaptive >= 0.97 * fixed[0]


def session(**more: float) -> tuple[AdaptiveDraftLength, World]:
    return DraftLengthTuner().session(DecodingParams()), World(**more)  # pyright: ignore[reportArgumentType] - these are its fields


def test_a_trial_finds_that_the_drafter_got_better() -> None:
    length, world = session(rate=0.02, draft_s=0.01)
    world.speed(length, tokens=1000)
    assert length.next(budget=100).tokens == 0
    world.rate = 0.95
    world.speed(length, tokens=1000)
    assert length.next(budget=100).tokens >= 3


def test_trials_become_rare_while_they_fail() -> None:
    length, world = session(rate=0.01, draft_s=0.02)
    reasons: list[str] = []
    for _ in range(1000):
        wanted = length.next(budget=100)
        reasons.append(wanted.reason)
        length.learn(world.round(wanted.tokens)[2])
    trials = [
        index
        for index, (before, reason) in enumerate(itertools.pairwise(reasons))
        if reason == "trial" and before != "trial"
    ]
    gaps = [later - earlier for earlier, later in itertools.pairwise(trials)]
    assert gaps == sorted(gaps)
    assert gaps[-1] > 2 * FIRST_PAUSE
    assert set(reasons) == {"measuring", "fastest", "alone", "trial"} - (
        set() if "fastest" in reasons else {"fastest"}
    )


def test_a_plan_without_drafts_says_for_how_many_tokens() -> None:
    """So the expert streams them without further requests."""
    length, world = session(rate=0.0, draft_s=0.015)
    for _ in range(MIN_SAMPLES):
        length.learn(world.round(5)[2])
    plans = [length.next(budget=100)]
    while plans[-1].reason == "alone":
        length.learn(world.round(0)[2])
        plans.append(length.next(budget=100))
    assert [one.expert_tokens for one in plans[:-1]] == list(range(FIRST_PAUSE, 0, -1))
    assert plans[-1].reason == "trial"


def test_the_first_trial_comes_soon_and_its_result_decides_the_next() -> None:
    """Measurements of cold tiers are unreliable."""
    length, world = session(rate=0.6, trip_s=0.2)
    for _ in range(MIN_SAMPLES):
        length.learn(world.round(5)[2])
    pauses: list[int] = []
    while len(pauses) < 2:
        wanted = length.next(budget=100)
        if wanted.reason == "alone" and length.stats.expert_tokens == 0:
            pauses.append(length.stats.pause)
        length.learn(world.round(wanted.tokens)[2])
    assert pauses[0] == FIRST_PAUSE
    assert pauses[1] > 4 * FIRST_PAUSE


def test_a_session_that_drafts_does_not_prevent_trials_of_others() -> None:
    """Of two sessions one drafts throughout; the other has trials all the same."""
    tuner = DraftLengthTuner()
    accepted, rejected = (tuner.session(DecodingParams()) for _ in range(2))
    good, bad = World(rate=0.95, sessions=2), World(rate=0.0, sessions=2, draft_s=0.005)
    reasons: set[str] = set()
    for _ in range(8 * FIRST_PAUSE):
        for length, world in ((accepted, good), (rejected, bad)):
            wanted = length.next(budget=100)
            length.learn(world.round(wanted.tokens)[2])
        reasons.add(wanted.reason)
    assert accepted.next(budget=100).reason == "fastest"
    assert reasons >= {"alone", "trial"}


def test_sessions_with_one_rule_share_what_they_measure() -> None:
    tuner, world = DraftLengthTuner(), World(rate=0.0, draft_s=0.005)
    assert tuner.session(DecodingParams()).next(budget=9).reason == "measuring"
    world.speed(tuner.session(DecodingParams()), tokens=100)
    assert tuner.session(DecodingParams()).next(budget=9).tokens == 0
    assert tuner.session(DecodingParams(rule=TokenV3(alpha=0.9))).next(budget=9).tokens > 0


def test_rules_with_ever_new_parameters_fill_no_memory() -> None:
    """What the rule used longest ago measured is forgotten."""
    tuner, world = DraftLengthTuner(), World(rate=0.0, draft_s=0.005)
    world.speed(tuner.session(DecodingParams()), tokens=100)
    for number in range(MAX_POLICIES):
        assert tuner.session(DecodingParams()).next(budget=9).tokens == 0
        tuner.session(DecodingParams(rule=TokenV3(alpha=number / MAX_POLICIES)))
    for number in range(MAX_POLICIES):
        tuner.session(DecodingParams(rule=TokenV3(alpha=number / MAX_POLICIES)))
    assert tuner.session(DecodingParams()).next(budget=9).tokens > 0


def test_a_plan_says_how_likely_its_block_is_accepted() -> None:
    """Where that is unlikely, nothing is drafted in advance after it."""
    for rate in (0.9, 0.2):
        length, world = session(rate=rate)
        world.speed(length, tokens=500)
        wanted = length.next(budget=100)
        assert wanted.survival == pytest.approx(rate**wanted.tokens, abs=0.2)


def test_a_round_without_timings_does_not_count_as_measured() -> None:
    tuner = DraftLengthTuner()
    tuner.session(DecodingParams()).learn(NOTHING)
    assert not tuner.costs.is_ready


def test_a_cold_start_and_a_stall_do_not_stop_drafting() -> None:
    """Single rounds that take a hundred times as long."""
    tuner, world = DraftLengthTuner(), World(rate=0.9)
    slow = replace(world, draft_s=0.1, random=Random(2))  # noqa: S311 - a simulation, no secret
    for index in range(60):
        length = tuner.session(DecodingParams())
        assert length.next(budget=50).tokens > 0
        length.learn((slow if index in {0, 30} else world).round(5)[2])


def test_nothing_is_drafted_without_a_budget() -> None:
    assert DraftLengthTuner().session(DecodingParams()).next(budget=0) == DraftPlan(
        tokens=0, reason="room"
    )


@pytest.mark.parametrize(("budget", "tokens"), [(9, 5), (5, 5), (2, 2), (0, 0), (-1, 0)])
def test_a_fixed_length_is_limited_by_the_budget(budget: int, tokens: int) -> None:
    length: DraftLength = Fixed(tokens=5)
    assert (length.next(budget=budget).tokens, length.next(budget=budget).reason) == (
        tokens,
        "fixed",
    )


def test_a_fixed_length_ignores_rejections() -> None:
    length = Fixed(tokens=4, reason="requested")
    length.learn(World(rate=0).round(4)[2])
    assert length.next(budget=10).tokens == 4


def test_the_experts_bonus_takes_one_token_of_the_budget() -> None:
    slots = {bonus: expert_slots(DecodingParams(bonus=bonus)) for bonus in Bonus}
    assert slots == {Bonus.NONE: 0, Bonus.EXPERT: 1, Bonus.TARGET: 0}


def test_extra_tokens_lengthen_a_pass_by_no_more_than_the_share() -> None:
    times = StepTime()
    assert times.extra_tokens(1, share=1.0) == MAX_TOKENS
    for tokens in (1, 5, 9) * 100:
        times.learn(tokens=tokens, seconds=0.6 + 0.2 * tokens)
    assert times.extra_tokens(1, share=1.0) == pytest.approx(4, abs=1)
    assert times.extra_tokens(16, share=1.0) == pytest.approx(19, abs=1)
    assert times.extra_tokens(16, share=0.0) == 0


def test_branches_hide_the_time_of_drafting_after_a_rejection() -> None:
    costs = DraftLengthTuner().costs
    for index in range(100):
        asked = Timing(service_s=0.0 if index % 2 else 0.01, step_s=0.001)
        judge = Timing(service_s=0.02, step_s=0.02, tokens=2, sessions=1)
        sample = RoundSample(
            drafted=1, accepted=0, draft_s=0.01, judge_s=0.02, draft=asked, judge=judge
        )
        costs.learn(sample, all_accepted=False if index else None)
    assert costs.ready_after_reject.value == pytest.approx(0.5, abs=0.05)
    rejected = Yield(length=4, tokens=2.0, survival=0.0)
    plain = costs.judge_s(4) + costs.draft_s(4)
    assert costs.round_s(rejected) == pytest.approx(
        costs.judge_s(4) + (1 - costs.ready_after_reject.value) * costs.draft_s(4)
    )
    assert costs.round_s(rejected) < plain


def test_a_drafters_pass_with_a_prefill_is_no_step() -> None:
    costs = DraftLengthTuner().costs
    before = costs.draft_step_s.value
    judge = Timing(service_s=0.02, step_s=0.02, tokens=2, sessions=1)
    prefill = Timing(service_s=0.5, step_s=0.5, tokens=30, sessions=1)
    sample = RoundSample(
        drafted=1, accepted=0, draft_s=0.5, judge_s=0.02, draft=prefill, judge=judge
    )
    costs.learn(sample, all_accepted=None)
    assert costs.draft_step_s.value == before


def test_forced_tokens_of_a_block_are_in_the_plan_up_to_the_budget() -> None:
    block = Block(tokens=(1, 2, 3, 4, 5, 6), forced=(True, False, True, True, False, True))
    lengths = {tokens: DraftPlan(tokens=tokens, reason="").within(block) for tokens in range(4)}
    assert lengths == {0: 0, 1: 1, 2: 2, 3: 3}
    plans = {tokens: DraftPlan(tokens=tokens, reason="", budget=5) for tokens in range(4)}
    assert {tokens: plan.within(block) for tokens, plan in plans.items()} == {
        0: 1,
        1: 4,
        2: 5,
        3: 5,
    }
    assert DraftPlan(tokens=2, reason="", budget=9).within(replace(block, forced=())) == 2
