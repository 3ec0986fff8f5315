"""A drafter that the answer does not wait for: without it, the expert goes on alone."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cascade.decoding.rules import Lossless, Lossy
from cascade.operations.failover import Failure
from cascade.operations.places import MISFORTUNES, failure_of, now_s
from cascade.operations.roles import NOTHING

if TYPE_CHECKING:
    from cascade.decoding.draft_length import Length
    from cascade.decoding.session import Policy, Session, Verdict
    from cascade.operations.roles import Drafting, Offer
    from cascade.operations.trust import Trust

ENTRY_SHARE = 0.1  # of the deadline: for which a session waits for a drafter when it begins


class Hurried:
    """Drafts while a drafter is there, in time, and worth asking; else offers nothing.

    The answer waits for a block until the deadline, once. A late drafter keeps the session, for it
    may only have a long prompt to read; from then on it is asked without being waited for, until it
    answers in time. A lease is waited for at the very beginning alone, and not for long.
    """

    def __init__(self, drafting: Drafting, *, trust: Trust, deadline_s: float) -> None:
        self._drafting = drafting
        self._place = drafting.place
        self._trust = trust
        self._deadline_s = deadline_s
        self._entry_s = ENTRY_SHARE * deadline_s

    def hint(self, session: Session, wanted: Length) -> None:
        """Ask for the block in advance."""
        self._drafting.hint(session, wanted)

    async def propose(self, session: Session, wanted: Length) -> Offer:
        """Return a block, or nothing where the drafter does not answer in time."""
        if wanted.tokens == 0:
            return NOTHING
        try:
            if not await self._ready(session, wanted):
                return NOTHING
            async with asyncio.timeout(self._deadline_s):
                question = self._drafting.question(session, wanted)
                answer = await self._place.attempt(session, question)
        except TimeoutError:
            self._place.fail(Failure.LATE)
        except MISFORTUNES as error:
            self._place.fail(failure_of(error))
        else:
            return self._drafting.offer(answer, wanted)
        return NOTHING

    def hear(self, policy: Policy, offer: Offer, verdict: Verdict) -> None:
        """Learn whether the drafter is worth asking, where no rule wishes its tokens away."""
        if offer.block.length and isinstance(policy.rule, Lossless | Lossy):
            accepted = verdict.accepted
            self._trust.learn(self._place.address, drafted=offer.block.length, accepted=accepted)

    async def _ready(self, session: Session, wanted: Length) -> bool:
        place = self._place
        if place.standing.late:
            return await self._in_time_again(session, wanted)
        if place.paused:
            return False
        entry_s, self._entry_s = self._entry_s, 0.0
        if not await place.leased(within_s=entry_s):
            return False
        if self._trust.shuns(place.address):
            place.fail(Failure.COLLAPSED)
            return False
        return True

    async def _in_time_again(self, session: Session, wanted: Length) -> bool:
        """Return whether the drafter has answered the last question in time, or ask it another."""
        place = self._place
        heard = await place.poll()
        if heard and now_s() - place.asked_s <= self._deadline_s:
            return True
        if heard or not place.paused:
            place.fail(Failure.LATE)
            place.send(session, self._drafting.question(session, wanted))
        return False
