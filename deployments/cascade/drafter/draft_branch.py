"""What a drafter writes of one session after one prefix: a block, and on from there unasked.

A line is blocks and, between them, guesses of what the expert adds. It goes on as long as what is
asked next stands on it; a wrong guess ends it, and costs nothing but the drafter's work. What is
drafted after a prefix depends on that prefix and its coins alone, so a block sent in advance is
the block that would have been drafted when asked. A session's lines make its `Tree`.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from cascade.engine.request import ForwardRequest
from cascade.protocol.messages import Proposal, Propose, extend_digest
from cascade.sampling.rng import Purpose
from cascade.speculation.draft import DraftTask, DraftToken, block_of, drafter_defers
from cascade.speculation.modes import plan_for
from cascade.speculation.payload import is_gumbel, needs_probs_after_block
from cascade.types import Bonus, DecodingParams, Mode

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cascade.replica.session import ReplicaSession
    from cascade.speculation.confidence import Calibration
    from cascade.types import SessionId


@dataclass(slots=True, eq=False, kw_only=True)
class PendingBlock:
    """A block in the making after a prefix with this position and digest."""

    position: int
    digest: int
    count: int  # of tokens, at most
    branched: bool = False  # the prefix is another than the likeliest
    drafts: list[DraftToken] = field(default_factory=list[DraftToken])
    after: DraftToken | None = None  # the guess of what follows
    deferred: bool = False
    passes: int = 0
    survival: float = 1.0  # the chance that all of it stands, as far as confidences tell

    @property
    def base(self) -> tuple[int, int]:
        """Return what it stands on."""
        return self.position, self.digest


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchCandidate:
    """A verdict on a block: so many drafts stand, and this token follows them."""

    chance: float
    stand: int
    token: int


@dataclass(slots=True, eq=False, kw_only=True)
class DraftBranch:
    """The blocks of a line from the one last asked for.

    The engine's thread owns it while the seat is busy, the event loop while it is free.
    """

    seat: ReplicaSession
    asked: Propose
    answer: list[int]  # committed, drafted and guessed tokens: what the engine is fed
    limit: int  # of prompt and answer, in tokens
    calibration: Calibration
    block: PendingBlock
    branch: SessionId | None = None  # the engine's name for it, unless it is the seat's own
    guessing: bool = field(init=False, default=False)  # the next row yields a guess
    ended: bool = field(init=False, default=False)
    resting: bool = field(init=False, default=False)  # no step of it is on its way
    _last: int = field(init=False, default=0)  # drafted or guessed, and not fed yet
    _blocks: deque[PendingBlock] = field(init=False)  # from the one asked for last
    _forked_at: int | None = field(init=False, default=None)  # drafts of the first that it keeps

    def __post_init__(self) -> None:
        self._blocks = deque([self.block])

    def task(self, *, curious: bool) -> DraftTask:
        """Return the token that the next row yields.

        Args:
            curious: There is capacity for branches, if any are wanted.
        """
        session = self.seat.opened
        rivals = curious and self.asked.branches > 0
        return DraftTask(
            policy=_alone(session.policy) if self.guessing else session.policy,
            position=len(self.answer),
            block_start=self.block.position,
            prompt=session.prompt,
            answer=self.answer,
            purpose=Purpose.NEXT_TOKEN if self.guessing else Purpose.DRAFT,
            with_confidence=rivals or (self.doubts and not self.guessing),
        )

    def follow(self, item: Propose) -> bool:
        """Return whether the item asks for a block of this line; those before it are history.

        An item that repeats the one before asks for the same block again, on a line of its own.
        """
        base = item.position, item.digest
        if all(block.base != base for block in list(self._blocks)[1:]):
            return False
        while self._blocks[0].base != base:
            block = self._blocks.popleft()
            self._learn(
                block, stood=len(block.drafts) if self._forked_at is None else self._forked_at
            )
            self._forked_at = None
        self.asked = item
        return True

    def learn_mismatch(self, answer: Sequence[int]) -> None:
        """Learn from an answer that went on otherwise how far the block asked for last stood."""
        block = self._blocks[0]
        committed = answer[block.position :]
        pairs = zip(block.drafts, committed, strict=False)
        stood = next((i for i, (draft, token) in enumerate(pairs) if draft.token != token), None)
        if stood is not None:
            self._learn(block, stood=stood)

    def _learn(self, block: PendingBlock, *, stood: int) -> None:
        if self.asked.until_deferral:
            return
        for place, draft in enumerate(block.drafts[: min(stood + 1, block.count)]):
            if draft.confidence is not None:
                self.calibration.learn(draft.confidence.probability, accepted=place < stood)

    def is_asked(self, proposal: Proposal) -> bool:
        """Return whether the proposal answers what was asked last, rather than a guess."""
        return (proposal.position, proposal.digest) == (self.asked.position, self.asked.digest)

    @property
    def doubts(self) -> bool:
        """Whether low confidence may end the block: not where a row must follow it."""
        return self.asked.floor > 0 and not needs_probs_after_block(self.seat.opened.policy)

    def take(self, draft: DraftToken) -> tuple[Proposal | None, ForwardRequest | None]:
        """Add the token of a row; return the block that it completes and the step that follows."""
        self.block.passes += 1
        if self.guessing:
            return None, self._after_guess(draft)
        if not self._completes(draft):
            return None, self._feed(draft.token)
        return self._proposal(), self.resume()

    def resume(self) -> ForwardRequest | None:
        """Return the step that leads to the next block, or None if no more was asked for."""
        more = self.branch is None and len(self._blocks) <= self.asked.ahead
        # A block that ended in doubt is unlikely to stand: what followed it would be in vain.
        more = more and self.block.survival >= self.asked.floor
        if self.ended or not more or not self._fits(len(self.answer)):
            self.resting = True
            return None
        self.resting = False
        policy = self.seat.opened.policy
        if self._begun or policy.bonus is Bonus.NONE:
            return self._begin(self._last)
        self.guessing = True
        return self._feed(self._last)

    @property
    def can_branch(self) -> bool:
        """Whether all is known of the block asked for last that this line will ever know."""
        return self.resting or self.block is not self._blocks[0]

    @property
    def first(self) -> PendingBlock:
        """Return the block asked for last."""
        return self._blocks[0]

    def candidates(self) -> Iterator[BranchCandidate]:
        """Yield other likely verdicts on the block asked for last than this line goes on with.

        A block drafted until a deferral is not judged: the token after it alone is in doubt.
        """
        block, stands = self.first, 1.0
        after = () if block.after is None else (block.after,)
        for place, draft in enumerate((*block.drafts, *after)):
            if draft.confidence is None or not self._fits(block.position + place):
                return
            chance = self.calibration.acceptance_prob(draft.confidence.probability)
            if self.asked.until_deferral and draft is not block.after:
                chance = 1.0
            other, token = (
                stands * (1 - chance) * draft.confidence.runner_up_share,
                draft.confidence.runner_up,
            )
            if token not in self.seat.opened.policy.stop_ids:
                yield BranchCandidate(chance=other, stand=place, token=token)
            stands *= chance

    def fork(
        self, outcome: BranchCandidate, *, branch: SessionId
    ) -> tuple[DraftBranch, ForwardRequest]:
        """Return the line that stands on another verdict, and its first step."""
        first = self.first
        line = DraftBranch(
            seat=self.seat,
            asked=self.asked,
            answer=self.answer[: first.position + outcome.stand],
            limit=self.limit,
            calibration=self.calibration,
            block=first,
            branch=branch,
        )
        line._forked_at = outcome.stand
        step = line._begin(outcome.token)
        line.block.branched = True
        return line, replace(step, trunk=self.seat.key)

    @property
    def _begun(self) -> bool:
        """Whether the row after the block was read already: its token is the guess."""
        return self.block.deferred or needs_probs_after_block(self.seat.opened.policy)

    def _fits(self, position: int) -> bool:
        room = self.limit - len(self.seat.opened.prompt) - position
        return room > self.asked.count + 2

    def _completes(self, draft: DraftToken) -> bool:
        block, policy = self.block, self.seat.opened.policy
        self._last = draft.token
        if self.asked.until_deferral and drafter_defers(policy, draft):
            block.deferred, block.after = True, draft
            return True
        block.drafts.append(draft)
        wanted = block.count + needs_probs_after_block(policy)
        self.ended = draft.token in policy.stop_ids
        if self.ended or len(block.drafts) >= wanted:
            return True
        if draft.confidence is None or not self.doubts:
            return False
        block.survival *= self.calibration.acceptance_prob(draft.confidence.probability)
        return block.survival < self.asked.floor

    def _after_guess(self, guess: DraftToken) -> ForwardRequest | None:
        self.guessing = False
        self.block.after = guess
        self.ended = guess.token in self.seat.opened.policy.stop_ids
        self.resting = self.ended
        return None if self.ended else self._begin(guess.token)

    def _begin(self, token: int) -> ForwardRequest:
        """Begin the block after a token that is guessed, or the last of its block."""
        step = self._feed(token)
        digest = extend_digest(self.block.digest, self.answer[self.block.position :])
        count = self.asked.count
        self.block = PendingBlock(position=len(self.answer), digest=digest, count=count)
        self._blocks.append(self.block)
        return step

    def _feed(self, token: int) -> ForwardRequest:
        base = len(self.seat.opened.prompt) + len(self.answer)
        self.answer.append(token)
        session = self.branch or self.seat.key
        return ForwardRequest(session=session, base=base, tokens=(token,), num_logits=1, task=self)

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
            branched=block.branched,
        )


@lru_cache
def _alone(policy: DecodingParams) -> DecodingParams:
    """Return a policy whose tokens are what the expert would write if it were the drafter.

    Where rows are shipped truncated, a coin chooses otherwise than from the whole row.
    """
    if policy.sampling.greedy or is_gumbel(policy):
        return policy
    return replace(plan_for(Mode.DRAFTER_ONLY, policy).params, logprobs=None)
