"""What a round costs and yields, as measured, and what follows for the length of its draft.

A round of gamma drafted tokens is expected to commit

    E(gamma) = sum over k = 1 .. gamma of S_k, and 1 more for the correction or the bonus,

where S_k is the chance that the first k all stand, and to take

    T(gamma) = J(gamma) + (1 - h) D(gamma) + h max(0, D(gamma) - J(gamma)).

D is the drafter's time with its round trip. J = r + q P is the expert's: its round trip r, the wait
for the pass in flight, and a pass, which together take q times as long as the pass alone. P grows
with the blocks in the pass. Each of the N - 1 other sessions is in one pass of its round, so that
one pass finds

    m = c (N - 1) P(m) / (J + D),  at most N - 1,

of them, if all draft as many tokens; c is 1 where rounds begin at any time, and more where they
begin together. h is the chance that the block is there before it is asked for: that all stood, and
the guess after it too, or that the verdict was one that a branch was drafted on; then only what
drafting takes longer than judging is waited for. Alone, the expert streams one token of every
session a pass. Everything is estimated from rounds that were run; old ones count less and less.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import sqrt
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

FEWEST = 6  # rounds that tell more than how a cold tier starts

MOST_TOKENS = 4096  # where a token more takes no time

LONGEST_BLOCK = 33  # tokens of one session in a pass; more is a prefill

_MOST_PASSES = 8.0  # of a round: one that took longer was a stall


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """What an answer took where it was made; zeros where that is not known."""

    service_s: float = 0.0  # from the item's arrival to the answer; 0 for a block sent unasked
    step_s: float = 0.0  # of its last forward pass
    tokens: int = 0  # of all sessions in that pass
    sessions: int = 0  # in that pass
    open: int = 0  # sessions on the replica


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSample:
    """One round as it went."""

    drafted: int  # by the drafter; 0 where the expert wrote alone
    accepted: int
    draft_s: float  # the router's waits
    judge_s: float
    draft: Timing
    judge: Timing


@dataclass(slots=True, kw_only=True)
class Mean:
    """A mean of measurements; the last of them counts `1 / memory`, the first few alike.

    Where `robust`, one that is far above the mean, as after a stall, counts as twice the mean; if
    the first were so, the mean begins anew.
    """

    memory: float
    value: float
    count: float = 0.0
    robust: bool = True

    def learn(self, value: float) -> None:
        """Take in a measurement."""
        if self.robust and self.count > 0 and self.value > 0:
            if self.count < FEWEST and 2 * value < self.value:
                self.count = 0
            value = min(value, 2 * self.value)
        self.count = min(self.count + 1, self.memory)
        self.value += (value - self.value) / self.count


@dataclass(slots=True, kw_only=True)
class StepTime:
    """Seconds of a pass as a line over its tokens, by least squares with forgetting.

    Until passes of different sizes were seen, a token is taken to add 3 % of the pass.
    """

    memory: float = 200.0
    _weight: float = 0.0
    _tokens: float = 0.0  # means
    _seconds: float = 0.0
    _spread: float = 0.0  # variance of tokens
    _shared: float = 0.0  # covariance of both

    @property
    def count(self) -> float:
        """Return how many passes were seen, up to the memory."""
        return self._weight

    def learn(self, *, tokens: int, seconds: float) -> None:
        """Take in a pass; as to one that took far longer than others, see `Mean`."""
        if 0 < self._weight < FEWEST and 2 * seconds < self.at(tokens):
            self._weight = 0
        if self._weight > 0:
            seconds = min(seconds, 2 * self.at(tokens))
        self._weight = min(self._weight + 1, self.memory)
        part = 1 / self._weight
        off_tokens, off_seconds = tokens - self._tokens, seconds - self._seconds
        self._tokens += part * off_tokens
        self._seconds += part * off_seconds
        self._spread += part * ((1 - part) * off_tokens**2 - self._spread)
        self._shared += part * ((1 - part) * off_tokens * off_seconds - self._shared)

    @property
    def line(self) -> tuple[float, float]:
        """Return the seconds that any pass takes, and those of each token."""
        # One token of spread is worth as much as what is taken for granted.
        assumed = 0.03 * self._seconds / (1 + 0.03 * self._tokens)
        slope = max(0.0, (self._shared + assumed) / (self._spread + 1))
        if self._tokens > 0:
            slope = min(slope, 0.9 * self._seconds / self._tokens)
        return self._seconds - slope * self._tokens, slope

    def at(self, tokens: float) -> float:
        """Return the seconds of a pass of so many tokens."""
        fixed_s, token_s = self.line
        return fixed_s + token_s * tokens

    def more(self, tokens: int, *, share: float) -> int:
        """Return how many tokens more make a pass of so many longer by at most this share."""
        _, token_s = self.line
        return int(share * self.at(tokens) / token_s) if token_s > 0 else MOST_TOKENS


@dataclass(slots=True, kw_only=True)
class Acceptance:
    """How often drafted tokens stand, by their place in the block, among those that were judged."""

    memory: float
    prior: float = 0.7
    weight: float = 4.0  # of the prior, in tokens
    total: tuple[float, float] = (0.0, 0.0)  # tokens that stood, and that were judged
    _judged: list[float] = field(default_factory=list[float])
    _stood: list[float] = field(default_factory=list[float])

    def learn(self, *, drafted: int, accepted: int) -> None:
        """Take in a verdict: tokens after the first refused one say nothing."""
        for place in range(min(accepted + 1, drafted)):
            if place == len(self._judged):
                self._judged.append(0.0)
                self._stood.append(0.0)
            kept = 1 - 1 / self.memory
            self._judged[place] = kept * self._judged[place] + 1
            self._stood[place] = kept * self._stood[place] + (place < accepted)
        self.total = sum(self._stood), sum(self._judged)

    def fade(self) -> None:
        """Let what was learned count less, though nothing new is."""
        kept = 1 - 1 / self.memory
        self._judged = [kept * count for count in self._judged]
        self._stood = [kept * count for count in self._stood]
        self.total = sum(self._stood), sum(self._judged)

    def at(self, place: int) -> float:
        """Return the chance that the token at a place stands, if those before it do."""
        stood, judged = self.total
        pooled = (stood + self.weight * self.prior) / (judged + self.weight)
        if place >= len(self._judged):
            return pooled
        weight = 4 * self.weight
        return (self._stood[place] + weight * pooled) / (self._judged[place] + weight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Yield:
    """What a block of a length is expected to bring."""

    length: int
    tokens: float  # committed
    whole: float  # the chance that all of the block stands


@dataclass(slots=True, kw_only=True)
class Costs:
    """What rounds of one router have cost; all its sessions share it."""

    passes: StepTime = field(default_factory=StepTime)  # of the expert
    draft_step_s: Mean = field(default_factory=lambda: Mean(memory=50, value=0))
    draft_trip_s: Mean = field(default_factory=lambda: Mean(memory=50, value=0))
    judge_trip_s: Mean = field(default_factory=lambda: Mean(memory=50, value=0))
    queue: Mean = field(default_factory=lambda: Mean(memory=50, value=1))  # service / pass
    sessions: Mean = field(default_factory=lambda: Mean(memory=50, value=1))  # open at once
    together: Mean = field(default_factory=lambda: Mean(memory=50, value=1))  # c
    guessed: Mean = field(
        default_factory=lambda: Mean(memory=100, value=0.5, count=4, robust=False)
    )  # blocks there before they were asked for, after one that stood whole
    branched: Mean = field(
        default_factory=lambda: Mean(memory=100, value=0, count=4, robust=False)
    )  # the same after one that fell

    @property
    def known(self) -> bool:
        """Whether both tiers were measured often enough to compare them, by all sessions."""
        enough = min(FEWEST * self.sessions.value, self.draft_step_s.memory)
        return min(self.passes.count, self.draft_step_s.count) >= enough

    def learn(self, lesson: RoundSample, *, stood: bool | None) -> None:
        """Take in a round.

        Args:
            lesson: How it went.
            stood: Whether the block before stood whole; None if there was none to draft on from.
        """
        judge = lesson.judge
        if 0 < judge.tokens <= LONGEST_BLOCK * judge.sessions and judge.step_s > 0:
            self._learn_judging(lesson)
        if lesson.drafted and lesson.draft.step_s > 0:
            self._learn_drafting(lesson, stood=stood)

    def judge_s(self, tokens: int) -> float:
        """Return the seconds from a block of so many tokens to its verdict."""
        return self.judge_trip_s.value + self.queue.value * self.passes.at(self._in_pass(tokens))

    def draft_s(self, tokens: int) -> float:
        """Return the seconds from a question to a block of so many tokens."""
        return self.draft_trip_s.value + tokens * self.draft_step_s.value

    def alone_s(self) -> float:
        """Return the seconds of one token that the expert streams."""
        return self.passes.at(self.sessions.value)

    def round_s(self, block: Yield) -> float:
        """Return the seconds of a round with such a block."""
        if block.length == 0:
            return self.alone_s()
        judge_s, draft_s = self.judge_s(block.length), self.draft_s(block.length)
        hidden = block.whole * self.guessed.value + (1 - block.whole) * self.branched.value
        # What was drafted in advance began with the guess.
        late_s = max(0.0, draft_s + self.draft_step_s.value - judge_s)
        return judge_s + (1 - hidden) * draft_s + hidden * late_s

    def floor(self, block: Yield) -> float:
        """Return the chance of standing below which one more token yields less than it costs."""
        tokens = self._in_pass(block.length)
        blocks = tokens / (block.length + 1)
        judge_s = self.passes.at(tokens + blocks) - self.passes.at(tokens)
        rate = block.tokens / self.round_s(block)
        return min(0.9, rate * (self.draft_step_s.value + self.queue.value * judge_s))

    def _in_pass(self, tokens: int) -> float:
        """Return the tokens of a pass if each session drafts so many: (m + 1) (tokens + 1)."""
        each, queue = tokens + 1, self.queue.value
        others = self.together.value * (self.sessions.value - 1)
        fixed_s, token_s = self.passes.line
        alone_s, block_s = fixed_s + token_s * each, token_s * each
        elsewhere_s = self.judge_trip_s.value + self.draft_s(tokens)
        # m (q (a + b m) + e) = c (N - 1) (a + b m), solved for m; b = 0 where tokens cost nothing.
        a, b = queue * block_s, queue * alone_s + elsewhere_s - others * block_s
        root = sqrt(b * b + 4 * a * others * alone_s)
        found = (root - b) / (2 * a) if a > 0 else others * alone_s / b
        return (1 + min(self.sessions.value - 1, max(0.0, found))) * each

    def _learn_judging(self, lesson: RoundSample) -> None:
        judge = lesson.judge
        self.passes.learn(tokens=judge.tokens, seconds=judge.step_s)
        others = max(judge.open, judge.sessions) - 1
        self.sessions.learn(1 + others)
        if lesson.drafted:
            if others:
                passes = (lesson.draft_s + lesson.judge_s) / judge.step_s
                self.together.learn((judge.sessions - 1) / others * min(_MOST_PASSES, passes))
            self.judge_trip_s.learn(max(0.0, lesson.judge_s - judge.service_s))
            self.queue.learn(min(4.0, max(1.0, judge.service_s / judge.step_s)))

    def _learn_drafting(self, lesson: RoundSample, *, stood: bool | None) -> None:
        self.draft_step_s.learn(lesson.draft.step_s)
        asked = lesson.draft.service_s > 0
        if asked:
            self.draft_trip_s.learn(max(0.0, lesson.draft_s - lesson.draft.service_s))
        if stood is not None:
            (self.guessed if stood else self.branched).learn(not asked)


def yields_of(chances: Sequence[float], *, bonus: bool) -> list[Yield]:
    """Return what blocks of 0, 1, ... tokens are expected to yield.

    Args:
        chances: that a token stands if those before it do, for the first, second, ... token.
        bonus: whether a token follows a block that stands whole; a refused one is always replaced.
    """
    found = [Yield(length=0, tokens=1.0, whole=1.0)]
    stood, whole = 0.0, 1.0
    for length, chance in enumerate(chances, start=1):
        whole *= chance
        stood += whole
        extra = 1.0 if bonus else 1 - whole
        found.append(Yield(length=length, tokens=stood + extra, whole=whole))
    return found


def fastest(costs: Costs, yields: Sequence[Yield]) -> int:
    """Return the length with the most expected tokens a second."""
    return max(yields, key=lambda one: one.tokens / costs.round_s(one)).length
