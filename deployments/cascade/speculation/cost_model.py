"""What a round costs and commits, as measured, and what follows for the draft length.

A round with gamma drafted tokens is expected to commit

    E(gamma) = sum over k = 1 .. gamma of S_k, and 1 more for the recovered or bonus token,

where S_k is the probability that the first k tokens are all accepted, and to take

    T(gamma) = J(gamma) + (1 - h) D(gamma) + h max(0, D(gamma) - J(gamma)).

D is the drafter's time with its round trip. J = r + q P is the expert's: its round trip r, the wait
for the pass in flight, and a pass, where wait and pass together take q times as long as the pass.
P grows with the blocks in the pass. Each of the N - 1 other sessions is in one pass of its round,
so that one pass has

    m = c (N - 1) P(m) / (J + D),  at most N - 1,

of them, if all draft as many tokens; c is 1 where rounds begin at any time, and more where they
begin together. h is the probability that the block was drafted in advance: all tokens and the
guess after them were accepted, or the verdict was one that a branch was drafted for. Then the round
waits only as long as drafting takes longer than judging. Without drafts, the expert writes one
token of every session per pass. All estimates are from past rounds; old ones count less and less.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

MIN_SAMPLES = 6  # rounds after which a mean is more than the cold start
MAX_TOKENS = 4096  # reported where one more token takes no time
MAX_BLOCK = 33  # tokens of one session in a pass; more are a prefill
_MAX_STEP = 2  # tokens of one session in a drafter's step; more are a prefill too
_MAX_PASSES = 8.0  # per round; a round that took longer was stalled


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What an answer took on the replica; zeros where that is not known."""

    service_s: float = 0.0  # from the request's arrival to the answer; 0 if drafted in advance
    step_s: float = 0.0  # of its last forward pass
    tokens: int = 0  # of all sessions in that pass
    sessions: int = 0  # in that pass
    open: int = 0  # sessions on the replica
    taken_s: float = 0.0  # of passes, by the session since it was opened there


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSample:
    """The measurements of one round."""

    drafted: int  # by the drafter; 0 where the expert wrote alone
    accepted: int
    draft_s: float  # the router's waits
    judge_s: float
    draft: Timing
    judge: Timing


@dataclass(slots=True, kw_only=True)
class RunningMean:
    """A mean of measurements with forgetting: the latest counts `1 / memory`, at first all alike.

    If `robust`, a measurement above twice the mean, as after a stall, counts as twice the mean; if
    the first measurements were such outliers, the mean starts again.
    """

    memory: float
    value: float
    count: float = 0.0
    robust: bool = True

    def learn(self, value: float) -> None:
        """Record a measurement."""
        if self.robust and self.count > 0 and self.value > 0:
            if self.count < MIN_SAMPLES and 2 * value < self.value:
                self.count = 0
            value = min(value, 2 * self.value)
        self.count = min(self.count + 1, self.memory)
        self.value += (value - self.value) / self.count


@dataclass(slots=True, kw_only=True)
class StepTime:
    """Seconds of a pass as a linear function of its tokens: least squares with forgetting.

    Until passes of different sizes were measured, a token is assumed to add 3 % of the pass.
    """

    memory: float = 200.0
    count: float = field(init=False, default=0.0)  # passes measured, up to the memory
    _tokens: float = 0.0  # means
    _seconds: float = 0.0
    _variance: float = 0.0  # of tokens
    _covariance: float = 0.0  # of tokens and seconds

    def learn(self, *, tokens: int, seconds: float) -> None:
        """Record a pass; outliers are treated as in `RunningMean`."""
        if 0 < self.count < MIN_SAMPLES and 2 * seconds < self.at(tokens):
            self.count = 0
        if self.count > 0:
            seconds = min(seconds, 2 * self.at(tokens))
        self.count = min(self.count + 1, self.memory)
        share = 1 / self.count
        off_tokens, off_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += share * off_tokens
        self._seconds += share * off_seconds
        self._variance += share * ((1 - share) * off_tokens**2 - self._variance)
        self._covariance += share * ((1 - share) * off_tokens * off_seconds - self._covariance)

    @property
    def coefficients(self) -> tuple[float, float]:
        """Return the seconds of any pass, and the seconds that each token adds."""
        # The assumption weighs as much as a variance of one token.
        assumed = 0.03 * self._seconds / (1 + 0.03 * self._tokens)
        slope = max(0.0, (self._covariance + assumed) / (self._variance + 1))
        if self._tokens > 0:
            slope = min(slope, 0.9 * self._seconds / self._tokens)
        return self._seconds - slope * self._tokens, slope

    def at(self, tokens: float) -> float:
        """Return the seconds of a pass with so many tokens."""
        fixed_s, token_s = self.coefficients
        return fixed_s + token_s * tokens

    def extra_tokens(self, tokens: int, *, share: float) -> int:
        """Return how many tokens can be added to a pass that may take this share longer."""
        _, token_s = self.coefficients
        return int(share * self.at(tokens) / token_s) if token_s > 0 else MAX_TOKENS


@dataclass(slots=True, kw_only=True)
class AcceptanceRates:
    """How often judged tokens were accepted, by their index in the block."""

    memory: float
    prior: float = 0.7
    weight: float = 4.0  # of the prior, in tokens
    total: tuple[float, float] = (0.0, 0.0)  # tokens accepted, and tokens judged
    _judged: list[float] = field(default_factory=list[float])
    _accepted: list[float] = field(default_factory=list[float])

    def learn(self, *, drafted: int, accepted: int) -> None:
        """Record a verdict; tokens after the first rejected one are not judged."""
        kept = 1 - 1 / self.memory
        for index in range(min(accepted + 1, drafted)):
            if index == len(self._judged):
                self._judged.append(0.0)
                self._accepted.append(0.0)
            self._judged[index] = kept * self._judged[index] + 1
            self._accepted[index] = kept * self._accepted[index] + (index < accepted)
        self.total = sum(self._accepted), sum(self._judged)

    def fade(self) -> None:
        """Reduce the weight of past verdicts without a new one."""
        kept = 1 - 1 / self.memory
        self._judged = [kept * count for count in self._judged]
        self._accepted = [kept * count for count in self._accepted]
        self.total = sum(self._accepted), sum(self._judged)

    def at(self, index: int) -> float:
        """Return the probability that a token is accepted if those before it are."""
        accepted, judged = self.total
        pooled = (accepted + self.weight * self.prior) / (judged + self.weight)
        if index >= len(self._judged):
            return pooled
        weight = 4 * self.weight
        return (self._accepted[index] + weight * pooled) / (self._judged[index] + weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Yield:
    """What a block of a given length is expected to commit."""

    length: int
    tokens: float  # committed
    survival: float  # probability that all of the block is accepted


_duration = partial(RunningMean, memory=50, value=0)
_ratio = partial(RunningMean, memory=50, value=1)
_share = partial(RunningMean, memory=100, count=4, robust=False)


@dataclass(slots=True, kw_only=True)
class CostModel:
    """What rounds of one router have cost; all its sessions share it."""

    expert_pass: StepTime = field(default_factory=StepTime)
    draft_step_s: RunningMean = field(default_factory=_duration)
    draft_trip_s: RunningMean = field(default_factory=_duration)
    judge_trip_s: RunningMean = field(default_factory=_duration)
    queue: RunningMean = field(default_factory=_ratio)  # q: service time / pass
    sessions: RunningMean = field(default_factory=_ratio)  # N: open at once
    alignment: RunningMean = field(default_factory=_ratio)  # c
    # Share of blocks drafted in advance, after a fully accepted block and after another.
    ready_after_accept: RunningMean = field(default_factory=lambda: _share(value=0.5))
    ready_after_reject: RunningMean = field(default_factory=lambda: _share(value=0))

    @property
    def is_ready(self) -> bool:
        """Whether all sessions together measured both tiers often enough to compare them."""
        enough = min(MIN_SAMPLES * self.sessions.value, self.draft_step_s.memory)
        return min(self.expert_pass.count, self.draft_step_s.count) >= enough

    def learn(self, sample: RoundSample, *, all_accepted: bool | None) -> None:
        """Record a round.

        Args:
            sample: Its measurements.
            all_accepted: Whether the block before was accepted as a whole; None if there was none.
        """
        judge, draft = sample.judge, sample.draft
        if 0 < judge.tokens <= MAX_BLOCK * judge.sessions and judge.step_s > 0:
            self._learn_judging(sample)
        if sample.drafted and draft.step_s > 0 and draft.tokens <= _MAX_STEP * draft.sessions:
            self.draft_step_s.learn(draft.step_s)
            in_advance = draft.service_s <= 0
            if not in_advance:
                self.draft_trip_s.learn(max(0.0, sample.draft_s - draft.service_s))
            if all_accepted is not None:
                ready = self.ready_after_accept if all_accepted else self.ready_after_reject
                ready.learn(in_advance)

    def judge_s(self, tokens: int) -> float:
        """Return the seconds from a block of so many tokens to its verdict."""
        pass_s = self.expert_pass.at(self._tokens_in_pass(tokens))
        return self.judge_trip_s.value + self.queue.value * pass_s

    def draft_s(self, tokens: int) -> float:
        """Return the seconds from a request to a block of so many tokens."""
        return self.draft_trip_s.value + tokens * self.draft_step_s.value

    def expert_token_s(self) -> float:
        """Return the seconds of a token that the expert writes without drafts."""
        return self.expert_pass.at(self.sessions.value)

    def round_s(self, block: Yield) -> float:
        """Return the seconds of a round with such a block."""
        if block.length == 0:
            return self.expert_token_s()
        judge_s, draft_s = self.judge_s(block.length), self.draft_s(block.length)
        hidden = (
            block.survival * self.ready_after_accept.value
            + (1 - block.survival) * self.ready_after_reject.value
        )
        # What is drafted in advance begins with the guess of the token before it.
        late_s = max(0.0, draft_s + self.draft_step_s.value - judge_s)
        return judge_s + (1 - hidden) * draft_s + hidden * late_s

    def survival_floor(self, block: Yield) -> float:
        """Return the survival of a block below which one more token costs more than it yields."""
        tokens = self._tokens_in_pass(block.length)
        blocks = tokens / (block.length + 1)
        judge_s = self.expert_pass.at(tokens + blocks) - self.expert_pass.at(tokens)
        rate = block.tokens / self.round_s(block)
        return min(0.9, rate * (self.draft_step_s.value + self.queue.value * judge_s))

    def _tokens_in_pass(self, tokens: int) -> float:
        """Return the tokens of a pass if each session drafts so many: (m + 1) (tokens + 1)."""
        each, queue = tokens + 1, self.queue.value
        others = self.alignment.value * (self.sessions.value - 1)
        fixed_s, token_s = self.expert_pass.coefficients
        alone_s, block_s = fixed_s + token_s * each, token_s * each
        elsewhere_s = self.judge_trip_s.value + self.draft_s(tokens)
        # m (q (a + b m) + e) = c (N - 1) (a + b m), solved for m; b = 0 where tokens cost nothing.
        a, b = queue * block_s, queue * alone_s + elsewhere_s - others * block_s
        root = sqrt(b * b + 4 * a * others * alone_s)
        found = (root - b) / (2 * a) if a > 0 else others * alone_s / b
        return (1 + min(self.sessions.value - 1, max(0.0, found))) * each

    def _learn_judging(self, sample: RoundSample) -> None:
        judge = sample.judge
        self.expert_pass.learn(tokens=judge.tokens, seconds=judge.step_s)
        others = max(judge.open, judge.sessions) - 1
        self.sessions.learn(1 + others)
        if sample.drafted:
            if others:
                passes = (sample.draft_s + sample.judge_s) / judge.step_s
                self.alignment.learn((judge.sessions - 1) / others * min(_MAX_PASSES, passes))
            self.judge_trip_s.learn(max(0.0, sample.judge_s - judge.service_s))
            self.queue.learn(min(4.0, max(1.0, judge.service_s / judge.step_s)))


def expected_yields(rates: Sequence[float], *, bonus: bool) -> list[Yield]:
    """Return what blocks of 0, 1, ... tokens are expected to yield.

    Args:
        rates: Probability that a token is accepted if those before it are, for the first, second,
            ... token.
        bonus: Whether a token follows a fully accepted block; a rejected one is always replaced.
    """
    found = [Yield(length=0, tokens=1.0, survival=1.0)]
    accepted, survival = 0.0, 1.0
    for length, rate in enumerate(rates, start=1):
        survival *= rate
        accepted += survival
        extra = 1.0 if bonus else 1 - survival
        found.append(Yield(length=length, tokens=accepted + extra, survival=survival))
    return found


def fastest_length(costs: CostModel, yields: Sequence[Yield]) -> int:
    """Return the length with the most expected tokens per second."""
    return max(yields, key=lambda one: one.tokens / costs.round_s(one)).length
