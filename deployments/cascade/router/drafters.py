"""Where draft blocks come from: a replica, a client's prediction, or nowhere.

`speculation.modes` says which mode uses which.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Protocol

from cascade.errors import ContextTooLong, DrafterUnavailable
from cascade.protocol.messages import Proposal, Propose
from cascade.router.circuit_breaker import ALLOWED_BLOCKS
from cascade.router.retry import Failure
from cascade.router.tier_session import REPLICA_ERRORS, now_s
from cascade.speculation.cost_model import Timing
from cascade.types import Block

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.router.circuit_breaker import CircuitBreaker
    from cascade.router.tier_session import MessageFactory, TierSession
    from cascade.speculation.draft_length import DraftPlan
    from cascade.types import Session, Verdict

MIN_AHEAD_CHANCE = 0.2  # of a whole block's acceptance, below which drafting ahead is wasted
ALIGNMENT_TOKENS = 3  # committed tokens that must recur in a prediction to resume it there
LEASE_WAIT_SHARE = 0.1  # of the draft deadline, that a new session waits for its first lease
# The causes of a missing draft where no tier has failed.
NO_LEASE = "lease"
NO_TOKENS = "empty"


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A block on its way to the verifier."""

    block: Block = field(default_factory=Block)
    deferred: bool = False  # the drafter's own rule leaves the next token to the expert
    passes: int = 0  # forward passes of the drafter
    timing: Timing = field(default_factory=Timing)
    predicted: bool = False  # taken from the client's prediction
    branched: bool = False  # drafted in advance on a verdict other than the likeliest
    lost_mass: float = 0.0  # of tokens that the expert has not, summed over the block
    undrafted: str = ""  # why there is no draft, though one was wanted


NO_DRAFT = Draft()
"""The expert writes the next token itself."""


class Drafter(Protocol):
    """Proposes blocks."""

    def hint(self, session: Session, plan: DraftPlan) -> None:
        """Start on what `propose` will be asked next, if that takes no waiting."""
        ...

    async def propose(self, session: Session, plan: DraftPlan) -> Draft:
        """Return a block that follows the session, at most as long as planned; it may be empty."""
        ...

    def observe(self, session: Session, draft: Draft, verdict: Verdict) -> None:
        """Learn from the verdict on a draft that followed the session."""
        ...


class NoDrafter:
    """Never drafts."""

    def hint(self, session: Session, plan: DraftPlan) -> None:
        """Do nothing."""

    async def propose(self, session: Session, plan: DraftPlan) -> Draft:
        """Return an empty draft."""
        del session, plan
        return NO_DRAFT

    def observe(self, session: Session, draft: Draft, verdict: Verdict) -> None:
        """Do nothing."""


class RemoteDrafter:
    """Drafts on a replica of the drafter tier."""

    def __init__(
        self,
        tier_session: TierSession,
        *,
        ahead: int = 0,
        branches: int = 0,
        until_deferral: bool = False,
    ) -> None:
        """Draft over a tier session.

        Args:
            tier_session: Where the session is on the drafter tier.
            ahead: Blocks drafted ahead of the verifier, assuming earlier ones are accepted.
            branches: Other likely verdicts that the drafter continues from, at most.
            until_deferral: Blocks end where the drafter's own rule defers to the expert.
        """
        self.tier_session = tier_session
        self._ahead = ahead
        self._branches = branches
        self._until_deferral = until_deferral

    def hint(self, session: Session, plan: DraftPlan) -> None:
        """Ask for the block before it is needed."""
        if plan.tokens:
            self.tier_session.hint(session, self.message(session, plan))

    async def propose(self, session: Session, plan: DraftPlan) -> Draft:
        """Return the replica's block; empty if the tier failed and is not required.

        Raises:
            CascadeError: A required tier is given up.
        """
        if plan.tokens == 0:
            return NO_DRAFT
        proposal = await self.tier_session.ask(session, self.message(session, plan))
        if proposal is None:
            return NO_DRAFT
        assert isinstance(proposal, Proposal), "a drafter replies to Propose with Proposal"
        block = proposal.block.prefix(plan.within(proposal.block))
        return Draft(
            block=block,
            deferred=proposal.deferred and block is proposal.block,
            passes=proposal.passes,
            timing=proposal.timing,
            branched=proposal.branched,
            lost_mass=proposal.lost_mass,
        )

    def observe(self, session: Session, draft: Draft, verdict: Verdict) -> None:
        """Do nothing."""

    def message(self, session: Session, plan: DraftPlan) -> MessageFactory:
        """Return what builds the message that asks for a block."""

        def propose(epoch: int, digest: int, missing: tuple[int, ...]) -> Propose:
            return Propose(
                session_id=session.id,
                epoch=epoch,
                position=session.position,
                digest=digest,
                count=plan.tokens,
                tokens=missing,
                until_deferral=self._until_deferral,
                ahead=self._ahead if plan.survival >= MIN_AHEAD_CHANCE else 0,
                floor=plan.survival_floor,
                branches=self._branches,
            )

        return propose


class BestEffortDrafter:
    """Drafts only while a drafter is there, in time, and worth asking.

    The answer waits for a block until the deadline, once. A late drafter keeps the session, since
    it may only have a long prompt to prefill. From then on the answer does not wait for it, until
    one of its blocks comes in time. The answer waits for a lease only when it begins, and briefly.
    A draft that is missing says why: how the tier failed, `lease` while no lease is granted yet, or
    `empty` if the drafter's text gives no token to draft.
    """

    def __init__(
        self, remote: RemoteDrafter, *, breaker: CircuitBreaker, deadline_s: float
    ) -> None:
        """Draft through another drafter whose tier is not required.

        Args:
            remote: The drafter.
            breaker: Says which drafters are not worth asking.
            deadline_s: After which a block is late.
        """
        self._remote = remote
        self._tier_session = remote.tier_session
        self._breaker = breaker
        self._deadline_s = deadline_s
        self._lease_wait_s = LEASE_WAIT_SHARE * deadline_s
        self._prompt_hash: int | None = None
        self._allowed = 0  # blocks until the breaker is asked again

    def hint(self, session: Session, plan: DraftPlan) -> None:
        """Ask for the block before it is needed."""
        self._remote.hint(session, plan)

    async def propose(self, session: Session, plan: DraftPlan) -> Draft:
        """Return a block; empty if no drafter delivers one in time."""
        if plan.tokens == 0:
            return NO_DRAFT
        ready = await self._ready(session, plan)
        draft = await self._remote.propose(session, plan) if ready else NO_DRAFT
        if draft.block.length or draft.deferred:
            return draft
        failure = self._tier_session.retry_state.last
        return replace(draft, undrafted=str(failure or (NO_TOKENS if ready else NO_LEASE)))

    def observe(self, session: Session, draft: Draft, verdict: Verdict) -> None:
        """Record how much of a draft was accepted."""
        if draft.block.length == 0:
            return
        if self._prompt_hash is None:
            self._prompt_hash = hash((session.source, session.prompt))
        address = self._tier_session.address
        self._breaker.record(address, session, verdict, prompt=self._prompt_hash)

    async def _ready(self, session: Session, plan: DraftPlan) -> bool:
        tier = self._tier_session
        if tier.retry_state.late:
            return await self._back_in_time(session, plan)
        if tier.paused:
            return False
        wait_s, self._lease_wait_s = self._lease_wait_s, 0.0
        if not await tier.has_lease(within_s=wait_s):
            return False
        if self._allowed == 0:
            if not self._breaker.allows(tier.address, session.rule):
                tier.fail(Failure.COLLAPSED)
                return False
            self._allowed = ALLOWED_BLOCKS
        self._allowed -= 1
        return True

    async def _back_in_time(self, session: Session, plan: DraftPlan) -> bool:
        """Return whether the last block came in time after all; else ask again now and then."""
        tier = self._tier_session
        received = await tier.receive_late()
        if received and now_s() - tier.sent_s <= self._deadline_s:
            return True
        if tier.retry_state.late and (received or not tier.paused):
            tier.fail(Failure.LATE)
            tier.send(session, self._remote.message(session, plan))
        return False


class WaitingDrafter(BestEffortDrafter):
    """Drafts whatever is wanted: waits until a drafter delivers, up to a deadline."""

    async def propose(self, session: Session, plan: DraftPlan) -> Draft:
        """Return a block.

        Raises:
            DrafterUnavailable: No drafter delivers one before the deadline.
            ContextTooLong: The answer has become too long for a drafter.
        """
        try:
            async with asyncio.timeout(self._deadline_s):
                return await self._remote.propose(session, plan)
        except TimeoutError as error:
            raise DrafterUnavailable(
                f"no drafter delivered a draft within {self._deadline_s:g} s; the request waits for"
                " one (`on_drafter_loss`)"
            ) from error
        except REPLICA_ERRORS as error:
            raise DrafterUnavailable(
                f"the drafter fails, and the request waits for it (`on_drafter_loss`): {error}"
            ) from error
        except ContextTooLong as error:
            raise ContextTooLong(
                f"the drafter is full, and the request waits for it (`on_drafter_loss`): {error}"
            ) from error


class PredictionDrafter:
    """Proposes the client's prediction; where that does not fit, another drafter is asked.

    A prediction costs no drafting, so its blocks are long even where drafting would not pay.
    """

    def __init__(
        self, prediction: Sequence[int], fallback: Drafter, *, block_tokens: int, limit: int
    ) -> None:
        """Draft from a prediction.

        Args:
            prediction: Tokens that the client expects.
            fallback: Drafts where the answer has left the prediction.
            block_tokens: The longest block.
            limit: Position of the answer that no block goes beyond.
        """
        self._prediction = tuple(prediction)
        self._fallback = fallback
        self._block_tokens = block_tokens
        self._limit = limit
        self._next = 0  # index into the prediction of the session's next token
        self._seen = 0  # committed tokens compared with the prediction so far

    def hint(self, session: Session, plan: DraftPlan) -> None:
        """Pass the hint on where the fallback drafts next."""
        if not self._predicted(session):
            self._fallback.hint(session, plan)

    async def propose(self, session: Session, plan: DraftPlan) -> Draft:
        """Return the prediction's next tokens while the answer follows it."""
        tokens = self._predicted(session)
        if not tokens:
            return await self._fallback.propose(session, plan)
        return Draft(block=Block(tokens=tokens), predicted=True)

    def observe(self, session: Session, draft: Draft, verdict: Verdict) -> None:
        """Pass on verdicts on the fallback's own drafts."""
        if not draft.predicted:
            self._fallback.observe(session, draft, verdict)

    def _predicted(self, session: Session) -> tuple[int, ...]:
        self._align(session.tokens)
        count = max(0, min(self._block_tokens, self._limit - session.position))
        return self._prediction[self._next : self._next + count]

    def _align(self, committed: tuple[int, ...]) -> None:
        new = committed[self._seen :]
        self._seen = len(committed)
        if new == self._prediction[self._next : self._next + len(new)]:
            self._next += len(new)
            return
        tail = committed[-ALIGNMENT_TOKENS:]
        for start in range(len(self._prediction) - ALIGNMENT_TOKENS + 1):
            if self._prediction[start : start + ALIGNMENT_TOKENS] == tail:
                self._next = start + ALIGNMENT_TOKENS
                return
        self._next = len(self._prediction)
