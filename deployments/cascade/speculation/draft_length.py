"""How many tokens to draft next."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cascade.rules import Lossless
from cascade.speculation.cost_model import (
    AcceptanceRates,
    CostModel,
    RoundSample,
    expected_yields,
    fastest_length,
)
from cascade.types import Bonus

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.speculation.cost_model import Yield
    from cascade.types import Block, DecodingParams

# Tokens that each session's expert writes without drafts between trials.
FIRST_PAUSE, USUAL_PAUSE, MAX_PAUSE = 32, 256, 1024

# Rounds of a trial per session, where there are several: all draft at once, because one block among
# sessions that do not draft does not show what blocks cost where all draft.
TRIAL_ROUNDS = 4
TRIAL_SHARE = 0.02  # of the time that trials may take while they fail

ROUNDS_KEPT = 4  # for which a length is kept, because choosing one takes as long as a small message
MAX_EXPERT_TOKENS = 32  # without drafts, after which a session checks what the others measured

SESSION_MEMORY, PRIOR_TOKENS = 40.0, 8.0
MAX_POLICIES = 1024  # whose measurements are kept: callers choose the parameters of rules


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftPlan:
    """A number of tokens to draft, and the reason, which statistics report."""

    tokens: int  # that the masks leave a choice of; 0: the expert decodes without drafts
    reason: str
    expert_tokens: int = 1  # how many tokens it decodes so
    survival_floor: float = 0.0  # stop where the block is less likely to be accepted as a whole
    survival: float = 1.0  # probability that the block is accepted as a whole, as far as known
    budget: int | None = None  # most tokens of the block, with those that are forced

    def within(self, block: Block) -> int:
        """Return how many tokens of a block are in the plan; forced ones do not count."""
        most, chosen = self.tokens if self.budget is None else self.budget, 0
        for length, forced in enumerate(block.forced or (False,) * block.length):
            if length == most or (chosen == self.tokens and not forced):
                return length
            chosen += not forced
        return block.length


def expert_slots(policy: DecodingParams) -> int:
    """Return how many tokens of a round's budget are the expert's and need no draft.

    Under bonus `target` none is: a last token decoded without a draft would follow p, not pi.
    """
    return int(policy.bonus is Bonus.EXPERT)


class DraftLength(Protocol):
    """Decides a session's draft lengths; one object per session."""

    def next(self, *, budget: int) -> DraftPlan:
        """Return the length of the next block; `budget` tokens may still be committed."""
        ...

    def learn(self, sample: RoundSample) -> None:
        """Record the measurements of a round."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """The same length every time, limited by the budget."""

    tokens: int
    reason: str = "fixed"

    def next(self, *, budget: int) -> DraftPlan:
        """Return the fixed length, or the budget if that is less."""
        tokens = max(0, min(self.tokens, budget))
        return DraftPlan(tokens=tokens, reason=self.reason, expert_tokens=max(1, budget + 1))

    def learn(self, sample: RoundSample) -> None:
        """Do nothing."""


@dataclass(slots=True, kw_only=True)
class PolicyStats:
    """What sessions with one rule have measured together."""

    rates: AcceptanceRates = field(default_factory=lambda: AcceptanceRates(memory=500))
    pause: int = FIRST_PAUSE  # expert tokens of each session before the next trial
    expert_tokens: int = 0  # of all sessions since the last trial
    trial_rounds: int = 0  # left of the present trial


@dataclass(slots=True, kw_only=True)
class DraftLengthTuner:
    """What a router's sessions have measured together: costs, and acceptance by rule."""

    max_tokens: int = 16
    initial_tokens: int = 5  # before anything is measured
    costs: CostModel = field(default_factory=CostModel)
    _stats: dict[object, PolicyStats] = field(default_factory=dict[object, PolicyStats])

    def session(self, policy: DecodingParams) -> AdaptiveDraftLength:
        """Return what decides the draft lengths of a session.

        Only lossless sessions may stop drafting when the expert alone is faster: under any other
        rule the text would then depend on how fast the tiers are.
        """
        rules = policy.rules
        bounded = policy.divergence_budget is not None
        key = rules, policy.coupling, policy.sampling.greedy, bounded
        stats = self._stats[key] = self._stats.pop(key, None) or PolicyStats()
        if len(self._stats) > MAX_POLICIES:
            del self._stats[next(iter(self._stats))]  # the one used longest ago
        return AdaptiveDraftLength(
            tuner=self,
            stats=stats,
            bonus=policy.bonus is not Bonus.NONE,
            min_tokens=0 if all(isinstance(rule, Lossless) for rule in rules) else 1,
        )


@dataclass(slots=True, kw_only=True)
class AdaptiveDraftLength:
    """The length with the most expected tokens per second, from the costs and yields of rounds.

    Where that is 0, the expert writes without drafts during a pause, then all sessions draft a few
    blocks as a trial; while trials fail, pauses get longer. The reasons:

    | reason | the length is |
    |---|---|
    | `measuring` | a first guess: nothing is measured yet |
    | `fastest` | what yields most |
    | `alone` | 0: drafting would cost more than it yields |
    | `trial` | the best length above 0, to see whether that has changed |
    | `room` | 0: no more than the expert's own token is wanted |
    """

    tuner: DraftLengthTuner
    stats: PolicyStats
    bonus: bool
    min_tokens: int  # to draft where the budget allows it
    _rates: AcceptanceRates = field(default_factory=lambda: AcceptanceRates(memory=SESSION_MEMORY))
    _all_accepted: bool | None = None  # the block before, if there was one
    _expert_tokens: int = 0  # still to be written without drafts
    _plan: DraftPlan = field(default_factory=lambda: DraftPlan(tokens=0, reason="fastest"))
    _rounds_kept: int = 0  # for which `_plan` is kept

    def next(self, *, budget: int) -> DraftPlan:
        """Return the best length within the budget."""
        most, costs = min(budget, self.tuner.max_tokens), self.tuner.costs
        if most <= 0:
            return DraftPlan(tokens=0, reason="room")
        if self._expert_tokens > 0:
            return DraftPlan(tokens=0, reason="alone", expert_tokens=self._expert_tokens)
        if not costs.is_ready:
            return DraftPlan(tokens=min(most, self.tuner.initial_tokens), reason="measuring")
        if self._rounds_kept > 0:
            self._rounds_kept -= 1
            return replace(self._plan, tokens=min(most, self._plan.tokens))
        yields = expected_yields([self._rate(index) for index in range(most)], bonus=self.bonus)
        best = yields[fastest_length(costs, yields[self.min_tokens :])]
        if best.length == 0:
            return self._without_draft(yields)
        self._rounds_kept = ROUNDS_KEPT - 1
        self._plan = DraftPlan(
            tokens=best.length,
            reason="fastest",
            survival_floor=costs.survival_floor(best),
            survival=best.survival,
        )
        return self._plan

    def learn(self, sample: RoundSample) -> None:
        """Record the measurements of a round."""
        self.tuner.costs.learn(sample, all_accepted=self._all_accepted)
        self._all_accepted = sample.drafted == sample.accepted if sample.drafted else None
        if sample.drafted:
            for rates in (self.stats.rates, self._rates):
                rates.learn(drafted=sample.drafted, accepted=sample.accepted)
            # While blocks are accepted as a whole, a trial goes on.
            if self.stats.trial_rounds > 0 and not self._all_accepted:
                self.stats.trial_rounds -= 1
                if self.stats.trial_rounds == 0:
                    self.stats.pause = self._next_pause()
        elif self._expert_tokens > 0:
            self._expert_tokens -= 1
            self.stats.expert_tokens += 1
            self._rates.fade()

    def _without_draft(self, yields: Sequence[Yield]) -> DraftPlan:
        """Return no draft, or a trial if the pause is over."""
        stats, sessions = self.stats, self._sessions
        if stats.trial_rounds == 0 and stats.expert_tokens >= stats.pause * sessions:
            stats.expert_tokens, stats.trial_rounds = 0, self._trial_rounds * sessions
        if stats.trial_rounds > 0:
            tokens = fastest_length(self.tuner.costs, yields[1:])
            return DraftPlan(tokens=tokens, reason="trial")
        left = max(1, stats.pause - stats.expert_tokens // sessions)
        self._expert_tokens = min(left, MAX_EXPERT_TOKENS)
        return DraftPlan(tokens=0, reason="alone", expert_tokens=self._expert_tokens)

    def _next_pause(self) -> int:
        """Return the expert tokens of each session after a trial, by what the trial measured."""
        costs, rates = self.tuner.costs, self.stats.rates
        yields = expected_yields(
            [rates.at(index) for index in range(self.tuner.max_tokens)], bonus=self.bonus
        )
        if fastest_length(costs, yields) > 0:
            return FIRST_PAUSE
        block = yields[fastest_length(costs, yields[1:])]
        lost_tokens = self._trial_rounds * (
            costs.round_s(block) / costs.expert_token_s() - block.tokens
        )
        usual = min(2 * self.stats.pause, USUAL_PAUSE)
        return min(max(usual, round(lost_tokens / TRIAL_SHARE)), MAX_PAUSE)

    @property
    def _sessions(self) -> int:
        return round(self.tuner.costs.sessions.value)

    @property
    def _trial_rounds(self) -> int:
        return 1 if self._sessions == 1 else TRIAL_ROUNDS

    def _rate(self, index: int) -> float:
        """Return the probability of acceptance: all sessions', shifted to this session's."""
        accepted, judged = self._rates.total
        shared = self.stats.rates.at(index)
        return (accepted + PRIOR_TOKENS * shared) / (judged + PRIOR_TOKENS)
