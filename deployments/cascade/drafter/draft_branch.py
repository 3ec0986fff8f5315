"""One branch of a session's drafts: the block that was requested, and blocks drafted ahead of it.

Blocks drafted ahead of the verifier assume that all earlier drafts are accepted; between two blocks
the drafter guesses the token that the expert adds. A branch stays valid while the next request
continues one of its blocks. A wrong guess ends it and costs only the drafter's work.

What is drafted after a prefix depends on that prefix and its random numbers alone, so a block sent
in advance is the block that would have been drafted on request.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING

from cascade.engine.request import ForwardRequest
from cascade.protocol.messages import Proposal, Propose, extend_digest
from cascade.protocol.services import DRAFT_LIMIT
from cascade.sampling.rng import Purpose
from cascade.speculation.draft import (
    DraftTask,
    DraftToken,
    block_of,
    drafter_defers,
    forced_draft,
    forced_token,
)
from cascade.speculation.modes import plan_for
from cascade.speculation.payload import is_gumbel, needs_probs_after_block
from cascade.types import Bonus, DecodingParams, Mode, RowFormat

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cascade.replica.session import ReplicaSession
    from cascade.speculation.confidence import Calibration
    from cascade.types import SessionId

_MAX_AHEAD = 8  # passes that run without a read
_MAX_IN_VAIN = 2  # the same, where a block may end after any token


@dataclass(slots=True, eq=False, kw_only=True)
class PendingBlock:
    """A block being drafted after the prefix with this position and digest."""

    position: int
    digest: int
    count: int  # most tokens that the masks leave a choice of
    most: int = 0  # most tokens, with those that they leave no choice of
    branched: bool = False  # the prefix is not the likeliest one
    drafts: list[DraftToken] = field(default_factory=list[DraftToken])
    guess: DraftToken | None = None  # of the token that the expert adds
    deferred: bool = False
    passes: int = 0
    acceptance_prob: float = 1.0  # of the whole block, as far as confidences are known

    @property
    def prefix(self) -> tuple[int, int]:
        """Return what identifies the tokens before the block."""
        return self.position, self.digest

    @property
    def length(self) -> int:
        """Return how many of the drafts are in the block; one more may describe what follows it."""
        chosen = 0
        for length, draft in enumerate(self.drafts):
            if length == self.most or (chosen == self.count and not draft.forced):
                return length
            chosen += not draft.forced
        return len(self.drafts)

    @property
    def is_full(self) -> bool:
        """Whether it has as many tokens as are wanted of those that the masks leave a choice of."""
        chosen = sum(not draft.forced for draft in self.drafts)
        return chosen >= self.count or len(self.drafts) >= self.most


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchCandidate:
    """A possible verdict on a block: so many drafts are accepted, and this token follows them."""

    prob: float
    accepted: int
    token: int


@dataclass(slots=True, eq=False, kw_only=True)
class DraftBranch:
    """The blocks of a branch, from the one last requested on.

    The engine's thread owns it while the session is busy, the event loop otherwise.
    """

    session: ReplicaSession
    message: Propose  # the last one that this branch serves
    tokens: list[int]  # committed, drafted and guessed: what the engine is fed after the prompt
    limit: int  # of prompt and output, in tokens
    calibration: Calibration
    block: PendingBlock  # being drafted
    engine_id: SessionId | None = None  # the main branch uses its session's own
    guessing: bool = field(init=False, default=False)  # the next logits yield a guess
    ended: bool = field(init=False, default=False)  # at a stop token
    paused: bool = field(init=False, default=False)  # no forward request is in flight
    _fed: int = field(init=False)  # tokens of the model that the prompt and `tokens` are
    _unfed: list[int] = field(init=False, default_factory=list[int])  # drafted; the engine lacks it
    _blocks: deque[PendingBlock] = field(init=False)  # from the one last requested
    _forked_at: int | None = field(init=False, default=None)  # accepted drafts of the first block

    def __post_init__(self) -> None:
        self._blocks = deque([self.block])
        self._fed = self.session.engine_length(self.tokens)
        self.block.most = self._most_tokens(self.block.position)

    def task(self, *, spare_capacity: bool, ahead: int = 0) -> DraftTask:
        """Return the task of drafting a token from the next logits, or from later ones.

        Args:
            spare_capacity: The drafter has time for other branches, if any are wanted.
            ahead: Tokens that are drafted before, after which the block has not ended.
        """
        session, guessing = self.session.opened, self.guessing and not ahead
        may_fork = spare_capacity and self.message.branches > 0
        begins = self.guessing and ahead  # a block, after the guess
        return DraftTask(
            policy=_guess_policy(session.policy) if guessing else self._policy,
            position=len(self.tokens) + ahead,
            block_start=len(self.tokens) + 1 if begins else self.block.position,
            prompt=session.prompt,
            answer=self.tokens,
            masks=self.session.masks,
            purpose=Purpose.NEXT_TOKEN if guessing else Purpose.DRAFT,
            with_confidence=may_fork or (self.may_stop_early and not guessing),
        )

    def passes_ahead(self, *, reads_each: bool) -> int:
        """Return how many passes may follow the next logits before the engine plans again.

        None after the block has ended at the latest. If they are not read one by one, few run where
        the block may end before: those after its end are in vain.
        """
        more = needs_probs_after_block(self.session.opened.policy)
        if self.guessing:  # then the block begins
            tokens_left = 1 + self.message.count + more
        else:
            tokens_left = self.block.count - self.block.length + more
        if reads_each:
            return tokens_left - 1
        may_end = self.may_stop_early or self.message.until_deferral
        return min(tokens_left - 1, _MAX_IN_VAIN if may_end else _MAX_AHEAD)

    def ends_with(self, drafts: Sequence[DraftToken]) -> bool:
        """Return whether the block ends with these drafts, or a message has come meanwhile.

        Args:
            drafts: What was drafted from the next logits on; the first of them may be the guess.
        """
        session, policy, last = self.session, self.session.opened.policy, drafts[-1]
        if session.closed or session.queued or last.token in policy.stop_ids:
            return True
        inside = drafts[self.guessing :]
        if not inside:
            return False
        if self.message.until_deferral and drafter_defers(policy, last):
            return True
        prob = 1.0 if self.guessing else self.block.acceptance_prob
        for draft in inside if self.may_stop_early else ():
            if draft.confidence is not None:
                prob *= self.calibration.acceptance_prob(draft.confidence.probability)
        return prob < self.message.floor

    def follow(self, message: Propose) -> bool:
        """Return whether a message requests a block of this branch, and drop those before it.

        A message that repeats the last one requests the same block again, on a new branch.
        """
        prefix = message.position, message.digest
        if all(block.prefix != prefix for block in islice(self._blocks, 1, None)):
            return False
        while self._blocks[0].prefix != prefix:
            block = self._blocks.popleft()
            accepted = len(block.drafts) if self._forked_at is None else self._forked_at
            self._learn(block, accepted=accepted)
            self._forked_at = None
        self.message = message
        return True

    def learn_mismatch(self, tokens: Sequence[int]) -> None:
        """Learn from committed tokens that differ from the last requested block."""
        block = self.requested
        pairs = zip(block.drafts, tokens[block.position :], strict=False)
        accepted = next((i for i, (draft, token) in enumerate(pairs) if draft.token != token), None)
        if accepted is not None:
            self._learn(block, accepted=accepted)

    def _learn(self, block: PendingBlock, *, accepted: int) -> None:
        if self.message.until_deferral:
            return  # the verifier never saw the block
        for i, draft in enumerate(block.drafts[: min(accepted + 1, block.length)]):
            if draft.confidence is not None and not draft.forced:
                self.calibration.learn(draft.confidence.probability, accepted=i < accepted)

    def is_requested(self, proposal: Proposal) -> bool:
        """Return whether the proposal answers the last message, and was not drafted ahead."""
        return (proposal.position, proposal.digest) == (self.message.position, self.message.digest)

    @property
    def may_stop_early(self) -> bool:
        """Whether low confidence may end a block: not where probabilities must follow it."""
        return self.message.floor > 0 and not needs_probs_after_block(self.session.opened.policy)

    def add(self, draft: DraftToken) -> tuple[Proposal | None, ForwardRequest | None]:
        """Add a drafted token; return the block that it completes and the next forward request."""
        self.block.passes += 1
        if self.guessing:
            return None, self._add_guess(draft)
        ended = self._append(draft)
        while not ended and len(self.block.drafts) == self.block.length < self.block.most:
            if (forced := self._forced()) is None:
                break
            ended = self._append(forced)
        if not ended and self._wants_more:
            return None, self._feed()
        return self._proposal(), self.resume()

    def begin(self, request: ForwardRequest) -> ForwardRequest:
        """Return the request that leads to the first block, from that of its session."""
        self._add_forced()
        return replace(request, tokens=(*request.tokens, *self._take_unfed()), task=self)

    def resume(self) -> ForwardRequest | None:
        """Return the request that leads to the next block, or None if no more are wanted."""
        wanted = self.engine_id is None and len(self._blocks) <= self.message.ahead
        # A block that is unlikely to be accepted is not worth drafting ahead of.
        wanted = wanted and self.block.acceptance_prob >= self.message.floor
        fits = self._fits(len(self.tokens) + len(self._unfed) - 1)
        self.paused = self.ended or not wanted or not fits
        if self.paused:
            return None
        policy = self.session.opened.policy
        if self._drafted_past_block or policy.bonus is Bonus.NONE:
            return self._begin_block()
        if (guess := self._forced()) is not None:
            return self._add_guess(guess)
        self.guessing = True
        return self._feed()

    @property
    def can_fork(self) -> bool:
        """Whether the last requested block is complete, with its guess if there will be one."""
        return self.paused or self.block is not self.requested

    @property
    def requested(self) -> PendingBlock:
        """Return the block last requested."""
        return self._blocks[0]

    def candidates(self) -> Iterator[BranchCandidate]:
        """Yield possible verdicts on the last requested block other than the one assumed here.

        A block drafted until a deferral is not verified: only the token after it is in doubt.
        """
        block, prefix_prob = self.requested, 1.0
        guess = () if block.guess is None else (block.guess,)
        for i, draft in enumerate((*block.drafts, *guess)):
            if draft.forced:
                continue  # no verdict differs there
            confidence = draft.confidence
            if confidence is None or not self._fits(block.position + i):
                return
            prob = self.calibration.acceptance_prob(confidence.probability)
            if self.message.until_deferral and draft is not block.guess:
                prob = 1.0
            if confidence.runner_up not in self.session.opened.policy.stop_ids:
                other = prefix_prob * (1 - prob) * confidence.runner_up_share
                yield BranchCandidate(prob=other, accepted=i, token=confidence.runner_up)
            prefix_prob *= prob

    def fork(
        self, candidate: BranchCandidate, *, engine_id: SessionId
    ) -> tuple[DraftBranch, ForwardRequest]:
        """Return a branch that assumes another verdict, and its first forward request."""
        accepted = self.requested.position + candidate.accepted
        branch = DraftBranch(
            session=self.session,
            message=self.message,
            tokens=self.tokens[:accepted],
            limit=self.limit,
            calibration=self.calibration,
            block=self.requested,
            engine_id=engine_id,
        )
        branch._forked_at = candidate.accepted
        unfed = self._unfed[: max(0, accepted - len(self.tokens))]
        branch._unfed = [*unfed, candidate.token]
        request = branch._begin_block()
        branch.block.branched = True
        return branch, replace(request, parent=self.session.engine_id)

    @property
    def _drafted_past_block(self) -> bool:
        """Whether the token after the block was drafted with it, and serves as the guess."""
        return self.block.deferred or needs_probs_after_block(self.session.opened.policy)

    def _fits(self, position: int) -> bool:
        room = self.limit - self._fed + len(self.tokens) - position
        return room > self.message.count + 2

    def _append(self, draft: DraftToken) -> bool:
        """Add a token to the block; return whether that ends it, so that none may follow in it."""
        block, policy = self.block, self.session.opened.policy
        ends_phase = self._ends_phase(draft.token)
        self._unfed.append(draft.token)
        if self.message.until_deferral and drafter_defers(policy, draft):
            block.deferred, block.guess = True, draft
            return True
        block.drafts.append(draft)
        self.ended = draft.token in policy.stop_ids
        if self.ended or ends_phase:
            return True
        if draft.confidence is not None and not draft.forced and not block.is_full:
            block.acceptance_prob *= self.calibration.acceptance_prob(draft.confidence.probability)
        return False

    @property
    def _wants_more(self) -> bool:
        """Whether the drafter drafts on in this block, with a pass."""
        block = self.block
        if needs_probs_after_block(self.session.opened.policy):
            return block.length == len(block.drafts)
        likely = not self.may_stop_early or block.acceptance_prob >= self.message.floor
        return likely and not block.is_full

    def _add_forced(self) -> None:
        """Add the tokens that the masks leave no choice of to a block that begins.

        None that ends it: a pass drafts that. So a block that is asked for has a pass, which the
        engine needs for the tokens before it.
        """
        policy = self.session.opened.policy
        while len(self.block.drafts) < self.block.most - 1:
            if (draft := self._forced()) is None:
                return
            defers = self.message.until_deferral and drafter_defers(policy, draft)
            if defers or draft.token in policy.stop_ids or self._ends_phase(draft.token):
                return
            self._append(draft)

    def _most_tokens(self, position: int) -> int:
        """Return how many tokens a block may have there."""
        room = self.limit - self._fed + len(self.tokens) - position
        return max(self.message.count, min(DRAFT_LIMIT, room - 2))

    def _forced(self) -> DraftToken | None:
        """Return the draft of the next token if the masks leave no choice of it.

        Its log-probability, which a request may ask for, takes a pass.
        """
        session = self.session
        if not session.masks or session.opened.policy.logprobs is not None:
            return None
        task = replace(
            self.task(spare_capacity=False),
            answer=[*self.tokens, *self._unfed],
        )
        token = forced_token(task, vocabulary=session.vocabulary)
        return None if token is None else forced_draft(self._policy, token)

    @property
    def _policy(self) -> DecodingParams:
        """Return the parameters of the next token."""
        rules = self.session.rules
        return rules.at([*self.tokens, *self._unfed]) if rules.vary else self.session.opened.policy

    def _ends_phase(self, token: int) -> bool:
        """Return whether another rule holds after the next token."""
        rules, known = self.session.rules, [*self.tokens, *self._unfed]
        return rules.vary and rules.at([*known, token]) != rules.at(known)

    def _add_guess(self, guess: DraftToken) -> ForwardRequest | None:
        self.guessing = False
        self.block.guess = guess
        self.ended = self.paused = guess.token in self.session.opened.policy.stop_ids
        self._unfed.append(guess.token)
        return None if self.ended else self._begin_block()

    def _begin_block(self) -> ForwardRequest:
        """Begin the block after the tokens so far."""
        known = [*self.tokens, *self._unfed]
        digest = extend_digest(self.block.digest, known[self.block.position :])
        count = self.message.count
        most = self._most_tokens(len(known))
        self.block = PendingBlock(position=len(known), digest=digest, count=count, most=most)
        self._blocks.append(self.block)
        self._add_forced()
        return self._feed()

    def _feed(self) -> ForwardRequest:
        """Return the request that feeds the engine what it lacks."""
        base, tokens = self._fed, self._take_unfed()
        return ForwardRequest(
            session=self.engine_id or self.session.engine_id,
            base=base,
            tokens=tokens,
            num_logits=1,
            task=self,
            share=self.session.share,
        )

    def _take_unfed(self) -> tuple[int, ...]:
        """Return what the engine lacks, in the tokens of its model."""
        fed = tuple(self.session.to_engine(self._unfed))
        self.tokens += self._unfed
        self._unfed, self._fed = [], self._fed + len(fed)
        return fed

    def _proposal(self) -> Proposal:
        block, length = self.block, self.block.length
        return Proposal(
            session_id=self.message.session_id,
            epoch=self.message.epoch,
            position=block.position,
            digest=block.digest,
            block=block_of(block.drafts, length=length),
            deferred=block.deferred,
            passes=block.passes,
            branched=block.branched,
            lost_mass=sum(draft.lost_mass for draft in block.drafts[:length]),
        )


@lru_cache
def _guess_policy(policy: DecodingParams) -> DecodingParams:
    """Return the parameters under which the drafter guesses the expert's next token.

    The guess is drawn from the whole distribution, as the expert's token is. From one that is cut
    the same random number would select another token.
    """
    if policy.sampling.greedy or is_gumbel(policy):
        return policy
    alone = plan_for(Mode.DRAFTER_ONLY, policy).params
    return replace(alone, rows=RowFormat.FULL, logprobs=None)
