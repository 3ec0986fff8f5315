"""A session's place on a tier: a lease, a link, and what that replica was told.

Moving is the only recovery there is: when a replica is gone, or lost the session, the place takes
another lease and opens the whole `Session` there under the next epoch.
"""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from cascade.decoding.session import SessionId
from cascade.errors import (
    CascadeError,
    Internal,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from cascade.operations.tracing import traceparent
from cascade.wire.digest import extend
from cascade.wire.frames import (
    Judge,
    Judgement,
    Need,
    Open,
    Proposal,
    Propose,
    Refusal,
    Score,
    Scores,
)
from cascade.wire.status import refused
from cascade.wire.tiers import PROTOCOL_VERSION

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.decoding.generation import Statistics
    from cascade.decoding.session import Session, TokenLogprob
    from cascade.operations.leases import Lease, LeaseSource
    from cascade.wire.channel import Link, Peers

GREETING_PAUSE_S = 0.5
MOVE_PAUSE_S = 0.2

Lacking: TypeAlias = tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tier:
    """All replicas of one kind, as the router reaches them."""

    leases: LeaseSource
    peers: Peers

    @property
    def name(self) -> str:
        """Return drafter or expert."""
        return self.peers.kind.name

    async def greet(self) -> None:
        """Wait until a replica grants a lease and says what it serves.

        Raises:
            Internal: It speaks another version of the protocol.
        """
        while True:
            try:
                lease = await self.leases.take()
            except (Overloaded, Unavailable):
                await asyncio.sleep(GREETING_PAUSE_S)
                continue
            try:
                described = await self.peers[lease.address].describe()
            except Unavailable:
                continue
            finally:
                lease.close()
            if described.protocol_version != PROTOCOL_VERSION:
                raise Internal(
                    f"the {self.name} at {lease.address} speaks protocol version "
                    f"{described.protocol_version} and this router {PROTOCOL_VERSION}; deploy both "
                    "from one release"
                )
            return

    def error(self, refusal: Refusal) -> CascadeError:
        """Return what a refusal means to the router; a lost lease is a lost replica."""
        lost = self.peers.kind.unavailable
        error = refused(refusal, lost=lost)
        return lost(error.message) if isinstance(error, Unauthenticated) else error


class Place:
    """One session's place on one tier; not entered until first asked."""

    def __init__(self, tier: Tier, statistics: Statistics, *, moves: int) -> None:
        self.tier = tier
        self._statistics = statistics
        self._moves = moves
        self._lease: Lease | None = None
        self._link: Link | None = None
        self._epoch = 0
        self._known = 0  # answer tokens the replica has committed
        self._digest = 0
        self._digested = 0  # tokens of prompt and answer in the digest

    @property
    def entered(self) -> bool:
        """Whether a replica holds the session."""
        return self._link is not None

    async def enter(self, session: Session) -> None:
        """Take a lease and open the session there, which starts its prefill."""
        self._epoch += 1
        self._lease = await self.tier.leases.take()
        self._link = self.tier.peers.link(self._lease.address, session.id, self._epoch)
        lease, trace = self._lease.token, traceparent()
        self._link.send(Open(session=session, epoch=self._epoch, lease=lease, traceparent=trace))
        self._known = session.position

    def leave(self) -> None:
        """Free the session there and give the lease back; safe to repeat."""
        if self._link is not None:
            self._statistics.sent_bytes += self._link.sent_bytes
            self._statistics.received_bytes += self._link.received_bytes
            self._link.close()
            self._link = None
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    async def ask(
        self, session: Session, make: Callable[[int, int, Lacking], Propose | Judge]
    ) -> Proposal | Judgement:
        """Send the item that `make(epoch, digest, lacking tokens)` builds; return its answer.

        Moves to another replica when this one is lost or full; raises what says that none is left.
        """
        for move in range(self._moves):
            try:
                return await self._ask(session, make)
            except (Unavailable, Overloaded) as error:
                self.leave()
                self.failed("full" if isinstance(error, Overloaded) else "lost")
                self._statistics.failovers += 1
            # The first move is free: others need the time in which a death becomes known.
            await asyncio.sleep(move * MOVE_PAUSE_S)
        return await self._ask(session, make)

    async def answer(self, session: Session) -> Proposal | Judgement | Need:
        """Return the next answer that stands after the session; others came late."""
        assert self._link is not None, "enter first"
        while True:
            match await self._link.receive():
                case Refusal() as refusal:
                    raise self.tier.error(refusal)
                case Need() as need:
                    return need
                case Proposal() as item if not self._continues(item, session):
                    self._statistics.drafter_passes += item.passes
                case Proposal() | Judgement() as item if item.position == session.position:
                    self._statistics.cached_prompt_tokens = max(
                        self._statistics.cached_prompt_tokens, item.cached_prompt_tokens
                    )
                    return item
                case _:
                    continue

    def failed(self, cause: str) -> None:
        """Note why the session goes on elsewhere, or without this tier: lost, full or late."""
        causes, name = self._statistics.failover_causes, f"{self.tier.name} {cause}"
        causes[name] = causes.get(name, 0) + 1

    def judged(self, committed: int) -> None:
        """Note that the expert made a pass, and itself committed so many tokens more."""
        self._statistics.expert_passes += 1
        self._known += committed

    async def _ask(
        self, session: Session, make: Callable[[int, int, Lacking], Propose | Judge]
    ) -> Proposal | Judgement:
        if self._link is None:
            await self.enter(session)
        assert self._link is not None
        while True:
            lacking = session.tokens[self._known :]
            self._link.send(make(self._epoch, self._digest_of(session), lacking))
            match await self.answer(session):
                case Need() as need:
                    self._known = need.position
                case item:
                    self._known = session.position
                    return item

    def _continues(self, item: Proposal, session: Session) -> bool:
        """Return whether the block was drafted after just these tokens."""
        return item.position == session.position and item.digest == self._digest_of(session)

    def _digest_of(self, session: Session) -> int:
        length = len(session.prompt) + session.position
        if self._digested == 0:
            self._digest = extend(0, session.prompt)
            self._digested = len(session.prompt)
        if self._digested < length:
            fresh = session.tokens[self._digested - len(session.prompt) :]
            self._digest = extend(self._digest, fresh)
            self._digested = length
        return self._digest


async def score(tier: Tier, tokens: tuple[int, ...], *, top: int) -> tuple[TokenLogprob, ...]:
    """Return a replica's log-probability of each token but the first, under a lease of its own."""
    lease = await tier.leases.take()
    session_id = SessionId(uuid.uuid4().hex)
    link = tier.peers.link(lease.address, session_id, 1)
    try:
        link.send(Score(session_id=session_id, epoch=1, lease=lease.token, tokens=tokens, top=top))
        match await link.receive():
            case Scores() as scores:
                return scores.logprobs
            case Refusal() as refusal:
                raise tier.error(refusal)
            case item:
                raise Internal(f"the {tier.name} answered a Score with {type(item).__name__}")
    finally:
        link.close()
        lease.close()
