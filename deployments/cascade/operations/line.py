"""What a drafter writes of one session: the block it was asked for, and on from there unasked.

A line is blocks and, between them, guesses of what the expert adds. It goes on as long as what is
asked next stands on it; a wrong guess ends it, and costs nothing but the drafter's work. What is
drafted after a prefix depends on that prefix and its coins alone, so a block sent in advance is
the block that would have been drafted when asked.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from cascade.decoding.coins import Purpose
from cascade.decoding.confidence import Calibration
from cascade.decoding.drafting import Draft, DraftTask, block_of, defers_alone
from cascade.decoding.modes import policy_in
from cascade.decoding.needs import is_gumbel, wants_target
from cascade.decoding.session import Bonus, Mode, Policy
from cascade.engine.step import Step
from cascade.wire.digest import extend
from cascade.wire.frames import Proposal, Propose

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.operations.seat import Seat


@dataclass(slots=True, eq=False, kw_only=True)
class Making:
    """A block in the making after a prefix with this position and digest."""

    position: int
    digest: int
    count: int  # of tokens, at most
    drafts: list[Draft] = field(default_factory=list[Draft])
    deferred: bool = False
    passes: int = 0
    confidences: list[float] = field(default_factory=list[float])  # where they decide its length
    survival: float = 1.0  # the chance that all of it stands, as far as they tell

    @property
    def base(self) -> tuple[int, int]:
        """Return what it stands on."""
        return self.position, self.digest


@dataclass(slots=True, eq=False, kw_only=True)
class Line:
    """The blocks of a session from the one last asked for.

    The engine's thread owns it while the seat is busy, the event loop while it is free.
    """

    seat: Seat
    asked: Propose
    answer: list[int]  # committed, drafted and guessed tokens
    limit: int  # of prompt and answer, in tokens
    calibration: Calibration = field(default_factory=Calibration)
    block: Making = field(init=False)
    guessing: bool = field(init=False, default=False)  # the next row yields a guess
    ended: bool = field(init=False, default=False)
    _last: int = field(init=False, default=0)  # drafted or guessed, and not fed yet
    _blocks: deque[Making] = field(init=False)  # from the one asked for last

    def __post_init__(self) -> None:
        asked = self.asked
        self.block = Making(position=asked.position, digest=asked.digest, count=asked.count)
        self._blocks = deque([self.block])

    @property
    def task(self) -> DraftTask:
        """Return the token that the next row yields."""
        session = self.seat.session
        return DraftTask(
            policy=_alone(session.policy) if self.guessing else session.policy,
            position=len(self.answer),
            start=self.block.position,
            prompt=session.prompt,
            answer=self.answer,
            purpose=Purpose.EMIT if self.guessing else Purpose.DRAFT,
        )

    @property
    def wanted(self) -> bool:
        """Whether the session is open and what was asked of it last stands on this line."""
        if self.seat.closed:
            return False
        if not self.seat.parked:
            return True
        last = self.seat.parked[-1]
        return isinstance(last, Propose) and self.follow(last)

    def follow(self, item: Propose) -> bool:
        """Return whether the item asks for a block of this line; those before it are history.

        An item that repeats the one before asks for the same block again, on a line of its own.
        """
        if item is self.asked:
            return True
        base = item.position, item.digest
        if all(block.base != base for block in list(self._blocks)[1:]):
            return False
        while self._blocks[0].base != base:
            block = self._blocks.popleft()
            self._learn(block, stood=len(block.drafts))
        self.asked = item
        return True

    def refuted(self, answer: Sequence[int]) -> None:
        """Learn from an answer that went on otherwise how far the block asked for last stood."""
        block = self._blocks[0]
        committed = answer[block.position :]
        pairs = zip(block.drafts, committed, strict=False)
        stood = next((i for i, (draft, token) in enumerate(pairs) if draft.token != token), None)
        if stood is not None:
            self._learn(block, stood=stood)

    def _learn(self, block: Making, *, stood: int) -> None:
        for place, confidence in enumerate(block.confidences[: stood + 1]):
            self.calibration.learn(confidence, stood=place < stood)

    def is_asked(self, proposal: Proposal) -> bool:
        """Return whether the proposal answers what was asked last, rather than a guess."""
        return (proposal.position, proposal.digest) == (self.asked.position, self.asked.digest)

    @property
    def doubts(self) -> bool:
        """Whether low confidence may end the block: not where a row must follow it."""
        return self.asked.floor > 0 and not wants_target(self.seat.session.policy)

    def take(
        self, draft: Draft, *, confidence: float | None = None
    ) -> tuple[Proposal | None, Step | None]:
        """Add the token of a row; return the block that it completes and the step that follows.

        Args:
            draft: The token and what is known of its row.
            confidence: Its unscaled probability, which may end the block after it.
        """
        self.block.passes += 1
        if self.guessing:
            return None, self._after_guess(draft.token)
        if not self._completes(draft, confidence):
            return None, self._feed(draft.token)
        return self._proposal(), self.resume()

    def resume(self) -> Step | None:
        """Return the step that leads to the next block, or None if no more was asked for."""
        room = self.limit - len(self.seat.session.prompt) - len(self.answer)
        if self.ended or len(self._blocks) > self.asked.ahead or room <= self.asked.count + 2:
            return None
        policy = self.seat.session.policy
        if self._begun or policy.bonus is Bonus.NONE:
            return self._begin(self._last)
        self.guessing = True
        return self._feed(self._last)

    @property
    def _begun(self) -> bool:
        """Whether the row after the block was read already: its token is the guess."""
        return self.block.deferred or wants_target(self.seat.session.policy)

    def _completes(self, draft: Draft, confidence: float | None) -> bool:
        block, policy = self.block, self.seat.session.policy
        self._last = draft.token
        if self.asked.until_deferral and defers_alone(policy, draft):
            block.deferred = True
            return True
        block.drafts.append(draft)
        wanted = block.count + wants_target(policy)
        self.ended = draft.token in policy.stop_ids
        if self.ended or len(block.drafts) >= wanted:
            return True
        if confidence is None or not self.doubts:
            return False
        block.confidences.append(confidence)
        block.survival *= self.calibration.chance(confidence)
        return block.survival < self.asked.floor

    def _after_guess(self, token: int) -> Step | None:
        self.guessing = False
        self.ended = token in self.seat.session.policy.stop_ids
        return None if self.ended else self._begin(token)

    def _begin(self, token: int) -> Step:
        """Begin the block after a token that is guessed, or the last of its block."""
        step = self._feed(token)
        digest = extend(self.block.digest, self.answer[self.block.position :])
        count = self.asked.count
        self.block = Making(position=len(self.answer), digest=digest, count=count)
        self._blocks.append(self.block)
        return step

    def _feed(self, token: int) -> Step:
        base = len(self.seat.session.prompt) + len(self.answer)
        self.answer.append(token)
        self.seat.fed.append(token)
        return Step(session=self.seat.key, base=base, tokens=(token,), rows=1, task=self)

    def _proposal(self) -> Proposal:
        block = self.block
        length = min(len(block.drafts), block.count)
        return Proposal(
            session_id=self.asked.session_id,
            epoch=self.asked.epoch,
            position=block.position,
            digest=block.digest,
            block=block_of(block.drafts, length=length),
            deferred=block.deferred,
            passes=block.passes,
        )


@lru_cache
def _alone(policy: Policy) -> Policy:
    """Return a policy whose tokens are what the expert would write if it were the drafter.

    Where rows are shipped truncated, a coin chooses otherwise than from the whole row.
    """
    if policy.sampling.greedy or is_gumbel(policy):
        return policy
    return replace(policy_in(Mode.DRAFTER_ONLY, policy), logprobs=None)
