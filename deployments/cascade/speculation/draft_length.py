"""How many tokens to draft next."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cascade.rules import Lossless
from cascade.speculation.cost_model import Acceptance, Costs, RoundSample, fastest, yields_of
from cascade.types import Bonus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.speculation.cost_model import Yield
    from cascade.types import DecodingParams

FIRST_PAUSE, USUAL_PAUSE, LONGEST_PAUSE = 32, 256, 1024  # tokens each writes alone between trials

TRIAL_ROUNDS = 4  # of each of several sessions, all at once: one block among others proves nothing

TRIAL_SHARE = 0.02  # of the time that trials may take while they fail

ROUNDS_KEPT = 4  # for which a length is kept: to weigh all of them takes as long as a small frame

LONGEST_STAY = 32  # tokens after which a session looks again at what the others found

SESSION_MEMORY, PRIOR_TOKENS = 40.0, 8.0


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """A number of tokens to draft, and the reason, which statistics report."""

    tokens: int  # 0: the expert decodes alone
    reason: str
    alone: int = 1  # tokens it is to write so, where `tokens` is 0
    floor: float = 0.0  # chance of the whole block's standing at which it is long enough
    sure: float = 1.0  # chance of its standing, as far as is known


def expert_slots(policy: DecodingParams) -> int:
    """Return how many tokens of a round's room are the expert's: drafting them would be in vain.

    Under bonus `target` none is: a last token decoded alone would follow p, not the target.
    """
    return int(policy.bonus is Bonus.EXPERT)


class DraftLength(Protocol):
    """What decides a session's draft lengths; one object a session."""

    def next(self, *, room: int) -> DraftPlan:
        """Return the length of the next block; `room` is the tokens that may still be committed."""
        ...

    def learn(self, lesson: RoundSample) -> None:
        """Hear how a round went."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """The same length every time, cut to the room."""

    tokens: int
    reason: str = "fixed"

    def next(self, *, room: int) -> DraftPlan:
        """Return the fixed length, or the room if that is less."""
        tokens = max(0, min(self.tokens, room))
        return DraftPlan(tokens=tokens, reason=self.reason, alone=max(1, room + 1))

    def learn(self, lesson: RoundSample) -> None:
        """Change nothing."""


@dataclass(slots=True, kw_only=True)
class PolicyStats:
    """What sessions of one rule have found out together."""

    acceptance: Acceptance = field(default_factory=lambda: Acceptance(memory=500))
    pause: int = FIRST_PAUSE  # tokens that each session writes alone before the next trial
    alone: int = 0  # that all wrote so since the last
    trial: int = 0  # rounds of the present one that are left


@dataclass(slots=True, kw_only=True)
class DraftLengthTuner:
    """What a router's sessions have found out together: costs, and acceptance by kind of policy."""

    longest: int = 16
    first: int = 5  # before anything was measured
    costs: Costs = field(default_factory=Costs)
    _kinds: dict[object, PolicyStats] = field(default_factory=dict[object, PolicyStats])

    def session(self, policy: DecodingParams) -> AdaptiveDraftLength:
        """Return what decides the draft lengths of a session.

        Only where the rule's law is the expert's own may the expert write alone because that is
        faster: under any other rule how fast the tiers are would change what is said.
        """
        name = policy.rule, policy.coupling, policy.sampling.greedy
        kind = self._kinds.setdefault(name, PolicyStats())
        return AdaptiveDraftLength(
            experience=self,
            kind=kind,
            bonus=policy.bonus is not Bonus.NONE,
            least=0 if isinstance(policy.rule, Lossless) else 1,
        )


@dataclass(slots=True, kw_only=True)
class AdaptiveDraftLength:
    """The length with the most expected tokens a second, from what rounds have cost and yielded.

    Where that is none, the expert writes alone for a while, longer each time, and then all sessions
    draft a few blocks on trial: one block among sessions that write alone does not tell what blocks
    cost where all draft. The reasons:

    | reason | the length is |
    |---|---|
    | `measuring` | a first guess: nothing was measured yet |
    | `fastest` | what yields most |
    | `alone` | none: drafting would cost more than it yields |
    | `trial` | the best of all that draft, to see whether that has changed |
    | `room` | none: no more than the expert's own token is wanted |
    """

    experience: DraftLengthTuner
    kind: PolicyStats
    bonus: bool
    least: int  # tokens to draft where there is room
    _own: Acceptance = field(default_factory=lambda: Acceptance(memory=SESSION_MEMORY))
    _stood: bool | None = None  # the block before stood whole, if there was one
    _alone: int = 0  # tokens that the expert is still to write alone
    _best: int = 0
    _floor: float = 0.0
    _whole: float = 1.0
    _kept: int = 0  # rounds for which `_best` is not weighed again

    def next(self, *, room: int) -> DraftPlan:
        """Return the best length within the room."""
        most = min(room, self.experience.longest)
        if most <= 0:
            return DraftPlan(tokens=0, reason="room")
        if self._alone > 0:
            return DraftPlan(tokens=0, reason="alone", alone=self._alone)
        costs = self.experience.costs
        if not costs.known:
            return DraftPlan(tokens=min(most, self.experience.first), reason="measuring")
        if self._kept > 0:
            self._kept -= 1
            return self._fastest(most)
        yields = yields_of([self._chance(place) for place in range(most)], bonus=self.bonus)
        self._best = fastest(costs, yields[self.least :])
        if self._best == 0:
            return self._without(yields)
        self._kept = ROUNDS_KEPT - 1
        self._floor = costs.floor(yields[self._best])
        self._whole = yields[self._best].whole
        return self._fastest(most)

    def learn(self, lesson: RoundSample) -> None:
        """Hear how a round went."""
        self.experience.costs.learn(lesson, stood=self._stood)
        self._stood = lesson.drafted == lesson.accepted if lesson.drafted else None
        if lesson.drafted:
            for acceptance in (self.kind.acceptance, self._own):
                acceptance.learn(drafted=lesson.drafted, accepted=lesson.accepted)
            if self.kind.trial > 0 and not self._stood:  # while blocks stand, a trial goes on
                self.kind.trial -= 1
                if self.kind.trial == 0:
                    self.kind.pause = self._pause()
        elif self._alone > 0:
            self._alone -= 1
            self.kind.alone += 1
            self._own.fade()

    def _fastest(self, most: int) -> DraftPlan:
        return DraftPlan(
            tokens=min(most, self._best), reason="fastest", floor=self._floor, sure=self._whole
        )

    def _without(self, yields: Sequence[Yield]) -> DraftPlan:
        """Return no draft, or one on trial where enough was written without."""
        kind, crowd = self.kind, self._crowd
        if kind.trial == 0 and kind.alone >= kind.pause * crowd:
            kind.alone, kind.trial = 0, self._rounds * crowd
        if kind.trial > 0:
            return DraftPlan(tokens=fastest(self.experience.costs, yields[1:]), reason="trial")
        self._alone = min(max(1, kind.pause - kind.alone // crowd), LONGEST_STAY)
        return DraftPlan(tokens=0, reason="alone", alone=self._alone)

    def _pause(self) -> int:
        """Return how many tokens each session writes alone after a trial, by what that found."""
        costs, shared = self.experience.costs, self.kind.acceptance
        chances = [shared.at(place) for place in range(self.experience.longest)]
        yields = yields_of(chances, bonus=self.bonus)
        if fastest(costs, yields) > 0:
            return FIRST_PAUSE
        block = yields[fastest(costs, yields[1:])]
        loss = self._rounds * (costs.round_s(block) / costs.alone_s() - block.tokens)
        usual = min(2 * self.kind.pause, USUAL_PAUSE)
        return min(max(usual, round(loss / TRIAL_SHARE)), LONGEST_PAUSE)

    @property
    def _crowd(self) -> int:
        return round(self.experience.costs.sessions.value)

    @property
    def _rounds(self) -> int:
        return 1 if self._crowd == 1 else TRIAL_ROUNDS

    def _chance(self, place: int) -> float:
        """Return the chance that a token stands: all sessions' there, bent to this one's."""
        stood, judged = self._own.total
        shared = self.kind.acceptance.at(place)
        return (stood + PRIOR_TOKENS * shared) / (judged + PRIOR_TOKENS)
