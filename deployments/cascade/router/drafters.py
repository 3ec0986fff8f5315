"""A drafter that the answer does not wait for: without it, the expert goes on alone."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cascade.protocol.messages import Proposal, Propose
from cascade.router.retry import Failure
from cascade.router.tier_session import REPLICA_ERRORS, failure_of, now_s
from cascade.rules import Lossless, Lossy
from cascade.speculation.cost_model import Timing
from cascade.types import Block, Session, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    # MOVED
    from cascade.router.circuit_breaker import CircuitBreaker
    from cascade.router.tier_session import MessageFactory, Reply, TierSession
    from cascade.speculation.draft_length import DraftPlan
    from cascade.types import DecodingParams, Session, Verdict

LIKELY = 0.2  # chance of a block's standing below which drafting on from its end is in vain

ALIGNMENT = 3  # committed tokens that must recur in a prediction to take it up again


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A block on its way to whoever judges."""

    block: Block = field(default_factory=Block)
    deferred: bool = False  # the drafter's own rule gives the next token to the expert
    passes: int = 0  # of the drafter
    timing: Timing = field(default_factory=Timing)
    predicted: bool = False  # the client's own words
    branched: bool = False  # drafted in advance, on another guess than that all before it stands


NO_DRAFT = Draft()

"""The expert writes the next token itself."""


class Drafter(Protocol):
    """Proposes blocks."""

    def hint(self, session: Session, wanted: DraftPlan) -> None:
        """Hear what `propose` will be asked next, to begin with it if that takes no waiting."""
        ...

    async def propose(self, session: Session, wanted: DraftPlan) -> Draft:
        """Return a block no longer than is wanted after the session's; none is an answer."""
        ...

    def observe(self, policy: DecodingParams, offer: Draft, verdict: Verdict) -> None:
        """Hear what became of a block."""
        ...


class NoDrafter:
    """Never drafts."""

    def hint(self, session: Session, wanted: DraftPlan) -> None:
        """Think nothing of it."""

    async def propose(self, session: Session, wanted: DraftPlan) -> Draft:
        """Return nothing."""
        del session, wanted
        return NO_DRAFT

    def observe(self, policy: DecodingParams, offer: Draft, verdict: Verdict) -> None:
        """Think nothing of it."""


class RemoteDrafter:
    """Drafts on a replica of the drafter tier, `ahead` blocks ahead of the expert.

    It also drafts on up to `branches` other verdicts than that all stands.
    """

    def __init__(
        self, place: TierSession, *, ahead: int = 0, branches: int = 0, until_deferral: bool = False
    ) -> None:
        self.place = place
        self._ahead = ahead
        self._branches = branches
        self._until_deferral = until_deferral

    def hint(self, session: Session, wanted: DraftPlan) -> None:
        """Ask for the block in advance."""
        if wanted.tokens:
            self.place.hint(session, self.question(session, wanted))

    async def propose(self, session: Session, wanted: DraftPlan) -> Draft:
        """Return the replica's block; raises DrafterUnavailable when none is left."""
        if wanted.tokens == 0:
            return NO_DRAFT
        return self.offer(await self.place.ask(session, self.question(session, wanted)), wanted)

    def observe(self, policy: DecodingParams, offer: Draft, verdict: Verdict) -> None:
        """Think nothing of it."""

    def question(self, session: Session, wanted: DraftPlan) -> MessageFactory:
        """Return what builds the question for a block."""

        def item(epoch: int, digest: int, lacking: tuple[int, ...]) -> Propose:
            return Propose(
                session_id=session.id,
                epoch=epoch,
                position=session.position,
                digest=digest,
                count=wanted.tokens,
                tokens=lacking,
                until_deferral=self._until_deferral,
                ahead=self._ahead if wanted.sure >= LIKELY else 0,
                floor=wanted.floor,
                branches=self._branches,
            )

        return item

    def offer(self, answer: Reply, wanted: DraftPlan) -> Draft:
        """Return the block that the replica answered with."""
        assert isinstance(answer, Proposal), "a drafter answers Propose with a Proposal"
        block = answer.block.cut(wanted.tokens)
        deferred = answer.deferred and block is answer.block
        return Draft(
            block=block,
            deferred=deferred,
            passes=answer.passes,
            timing=answer.timing,
            branched=answer.branched,
        )


class PredictionDrafter:
    """Proposes from the client's prediction, and asks `other` where that does not fit.

    A prediction costs no drafting, so blocks of it are long even where drafting would not pay.
    """

    def __init__(
        self, prediction: Sequence[int], other: Drafter, *, block_tokens: int, limit: int
    ) -> None:
        self._prediction = tuple(prediction)
        self._fallback = other
        self._block_tokens = block_tokens
        self._limit = limit  # position that no block goes beyond
        self._next = 0  # place in the prediction of the session's next token
        self._seen = 0  # committed tokens looked at

    def hint(self, session: Session, wanted: DraftPlan) -> None:
        """Tell the other if it is its turn."""
        if not self._predicted(session):
            self._fallback.hint(session, wanted)

    async def propose(self, session: Session, wanted: DraftPlan) -> Draft:
        """Return the prediction's next tokens while the answer follows it."""
        tokens = self._predicted(session)
        if not tokens:
            return await self._fallback.propose(session, wanted)
        return Draft(block=Block(tokens=tokens), predicted=True)

    def observe(self, policy: DecodingParams, offer: Draft, verdict: Verdict) -> None:
        """Tell the other of its own blocks."""
        if not offer.predicted:
            self._fallback.observe(policy, offer, verdict)

    def _predicted(self, session: Session) -> tuple[int, ...]:
        self._follow(session.tokens)
        count = max(0, min(self._block_tokens, self._limit - session.position))
        return self._prediction[self._next : self._next + count]

    def _follow(self, committed: tuple[int, ...]) -> None:
        fresh = committed[self._seen :]
        self._seen = len(committed)
        if fresh == self._prediction[self._next : self._next + len(fresh)]:
            self._next += len(fresh)
            return
        tail = committed[-ALIGNMENT:]
        for start in range(len(self._prediction) - ALIGNMENT + 1):
            if self._prediction[start : start + ALIGNMENT] == tail:
                self._next = start + ALIGNMENT
                return
        self._next = len(self._prediction)


ENTRY_SHARE = 0.1  # of the deadline: for which a session waits for a drafter when it begins


class BestEffortDrafter:
    """Drafts while a drafter is there, in time, and worth asking; else offers nothing.

    The answer waits for a block until the deadline, once. A late drafter keeps the session, for it
    may only have a long prompt to read; from then on it is asked without being waited for, until it
    answers in time. A lease is waited for at the very beginning alone, and not for long.
    """

    def __init__(
        self, drafting: RemoteDrafter, *, trust: CircuitBreaker, deadline_s: float
    ) -> None:
        self._drafting = drafting
        self._place = drafting.place
        self._trust = trust
        self._deadline_s = deadline_s
        self._entry_s = ENTRY_SHARE * deadline_s

    def hint(self, session: Session, wanted: DraftPlan) -> None:
        """Ask for the block in advance."""
        self._drafting.hint(session, wanted)

    async def propose(self, session: Session, wanted: DraftPlan) -> Draft:
        """Return a block, or nothing where the drafter does not answer in time."""
        if wanted.tokens == 0:
            return NO_DRAFT
        try:
            if not await self._ready(session, wanted):
                return NO_DRAFT
            async with asyncio.timeout(self._deadline_s):
                question = self._drafting.question(session, wanted)
                answer = await self._place.attempt(session, question)
        except TimeoutError:
            self._place.fail(Failure.LATE)
        except REPLICA_ERRORS as error:
            self._place.fail(failure_of(error))
        else:
            return self._drafting.offer(answer, wanted)
        return NO_DRAFT

    def observe(self, policy: DecodingParams, offer: Draft, verdict: Verdict) -> None:
        """Learn whether the drafter is worth asking, where no rule wishes its tokens away."""
        if offer.block.length and isinstance(policy.rule, Lossless | Lossy):
            accepted = verdict.accepted
            self._trust.record(self._place.address, drafted=offer.block.length, accepted=accepted)

    async def _ready(self, session: Session, wanted: DraftPlan) -> bool:
        place = self._place
        if place.retry_state.late:
            return await self._in_time_again(session, wanted)
        if place.paused:
            return False
        entry_s, self._entry_s = self._entry_s, 0.0
        if not await place.leased(within_s=entry_s):
            return False
        if self._trust.is_open(place.address):
            place.fail(Failure.COLLAPSED)
            return False
        return True

    async def _in_time_again(self, session: Session, wanted: DraftPlan) -> bool:
        """Return whether the drafter has answered the last question in time, or ask it another."""
        place = self._place
        heard = await place.poll()
        if heard and now_s() - place.asked_s <= self._deadline_s:
            return True
        if heard or not place.paused:
            place.fail(Failure.LATE)
            place.send(session, self._drafting.question(session, wanted))
        return False
