"""A session's place on a tier: a lease, a link, and what that replica was told.

Moving is the only recovery there is: when a replica is gone, or lost the session, the place takes
another lease and opens the whole `Session` there under the next epoch. When, `failover` says.
"""

from __future__ import annotations

import asyncio
import uuid
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

from cascade.errors import CascadeError, Internal, Overloaded, Unauthenticated, Unavailable
from cascade.observability.tracing import traceparent
from cascade.protocol.grpc_status import refused
from cascade.protocol.messages import (
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
from cascade.protocol.prefix_hash import extend
from cascade.protocol.services import PROTOCOL_VERSION
from cascade.router.leases import give_back
from cascade.router.retry import SERVED, STAY_S, Failure, RetryPolicy, RetryState
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from cascade.protocol.client import ReplicaClients, SessionStream
    from cascade.router.leases import Lease, LeaseSource
    from cascade.types import Session, Statistics, TokenLogprob

GREETING_PAUSE_S = 0.5

REPLICA_ERRORS = (Unavailable, Overloaded, Internal)  # of a replica; others are the request's own

Found = TypeVar("Found")

Reply: TypeAlias = Proposal | Judgement

MessageFactory: TypeAlias = "Callable[[int, int, tuple[int, ...]], Propose | Judge]"


@dataclass(frozen=True, slots=True, kw_only=True)
class TierClient:
    """All replicas of one kind, as the router reaches them."""

    leases: LeaseSource
    clients: ReplicaClients

    @property
    def name(self) -> str:
        """Return drafter or expert."""
        return self.clients.kind.name

    async def wait_ready(self) -> None:
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
                described = await self.clients[lease.address].describe()
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
        lost = self.clients.kind.unavailable
        error = refused(refusal, lost=lost)
        return lost(error.message) if isinstance(error, Unauthenticated) else error


class TierSession:
    """One session's place on one tier; not entered until first asked."""

    def __init__(self, tier: TierClient, statistics: Statistics, *, patience: RetryPolicy) -> None:
        self.tier = tier
        self.retry_state = RetryState()
        self.asked_s = 0.0  # when the last question was sent
        self._statistics = statistics
        self._patience = patience
        self._calling: asyncio.Task[Lease] | None = None
        self._called_s: float | None = None  # since when a lease is being sought
        self._lease: Lease | None = None
        self._link: SessionStream | None = None
        self._epoch = 0
        self._entered_s = 0.0
        self._known = 0  # answer tokens the replica has committed
        self._digest = 0
        self._digested = 0  # tokens of prompt and answer in the digest
        self._asked: Session | None = None  # of the question that was sent before it was asked

    @property
    def address(self) -> str:
        """Return where the lease is, or nothing."""
        return "" if self._lease is None else self._lease.address

    @property
    def paused(self) -> bool:
        """Whether it is too early to ask the tier again."""
        return now_s() < self.retry_state.resume_s

    async def leased(self, *, within_s: float) -> bool:
        """Return whether there is a lease, after waiting a while; what is not there yet may come.

        Raises:
            CascadeError: The tier has none.
        """
        if self._lease is None:
            call = self._request_lease()
            if not call.done():
                await asyncio.wait({call}, timeout=within_s)
            if call.done():
                await self._take_lease()
        return self._lease is not None

    async def open(self, session: Session) -> None:
        """Open the session on a replica, which starts its prefill; as patient as `ask`."""
        await self._persist(lambda: self._open(session))

    async def ask(self, session: Session, make: MessageFactory, *, coming: bool = False) -> Reply:
        """Ask until there is an answer, on other replicas where this one fails.

        Args:
            session: What the answer stands after.
            make: Builds the question from epoch, digest and the tokens that the replica lacks.
            coming: The replica has been asked already and will answer unasked.

        Raises:
            CascadeError: The tier is given up, or the question is wrong.
        """
        return await self._persist(lambda: self.attempt(session, make, coming=coming))

    async def attempt(
        self, session: Session, make: MessageFactory, *, coming: bool = False
    ) -> Reply:
        """Ask one replica, again where its answer is long in coming: rounds are idempotent."""
        coming = coming or self._asked is session
        self._asked = None
        if self._link is None:
            await self._open(session)
            coming = False
        patience_s = self._patience.reply_timeout_s
        while True:
            if not coming:
                self.send(session, make)
            coming = False
            try:
                async with asyncio.timeout(patience_s):
                    answer = await self._next_reply(session)
            except TimeoutError:
                patience_s *= 2
                continue
            if not isinstance(answer, Need):
                self._known = session.position
                self.retry_state = SERVED
                return answer
            self._known = answer.position

    def hint(self, session: Session, make: MessageFactory) -> None:
        """Send the next question before `attempt` asks it, where the replica has served so far."""
        if self._link is not None and self.retry_state == SERVED:
            with suppress(Unavailable):  # `attempt` will see it
                self.send(session, make)
                self._asked = session

    def send(self, session: Session, make: MessageFactory) -> None:
        """Send a question without waiting for its answer."""
        assert self._link is not None, "enter first"
        self.asked_s = now_s()
        lacking = session.tokens[self._known :]
        self._link.send(make(self._epoch, self._digest_of(session), lacking))

    async def poll(self) -> bool:
        """Take in answers that came too late, without waiting; return whether there were any."""
        assert self._link is not None, "enter first"
        heard = False
        while self._link.heard:
            heard = True
            match await self._receive():
                case Need() as need:
                    self._known = need.position
                case Proposal() as item:
                    self._statistics.drafter_passes += item.passes
                case _:
                    continue
        return heard

    def fail(self, failure: Failure) -> None:
        """Note why the session goes on elsewhere or without this tier; leave, unless it is late."""
        if not (failure is Failure.LATE and self.retry_state.late):
            causes, name = self._statistics.failover_causes, f"{self.tier.name} {failure}"
            causes[name] = causes.get(name, 0) + 1
        if failure is not Failure.LATE and self._stayed:
            self.retry_state = self.retry_state.after_stay()
        self.retry_state = self.retry_state.after_failure(
            failure, self._patience, now_s=now_s(), since_s=self._called_s
        )
        if failure is not Failure.LATE:
            self.close()

    def close(self) -> None:
        """Free the session there and give the lease back; safe to repeat."""
        if self._calling is not None:
            self._calling.add_done_callback(give_back)
            self._calling.cancel()
            self._calling = self._called_s = None
        if self._link is not None:
            self._statistics.sent_bytes += self._link.sent_bytes
            self._statistics.received_bytes += self._link.received_bytes
            self._link.close()
            self._link = None
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def record_verdict(self, committed: int) -> None:
        """Note that the expert made a pass, and itself committed so many tokens more."""
        self._statistics.expert_passes += 1
        self._known += committed

    @property
    def _stayed(self) -> bool:
        there = self._link is not None and self._link.lived
        return there and now_s() - self._entered_s > STAY_S

    async def _persist(self, attempt: Callable[[], Awaitable[Found]]) -> Found:
        while True:
            try:
                return await attempt()
            except REPLICA_ERRORS as error:
                self.fail(failure_of(error))
                if self.retry_state.given_up(self._patience):
                    raise
                self._statistics.failovers += 1
            await asyncio.sleep(self.retry_state.resume_s - now_s())

    async def _open(self, session: Session) -> None:
        if self._lease is None:
            await self._take_lease()
        assert self._lease is not None
        self._epoch += 1
        self._entered_s = now_s()
        self._link = self.tier.clients.open_stream(self._lease.address, session.id, self._epoch)
        lease, trace = self._lease.token, traceparent()
        self._link.send(Open(session=session, epoch=self._epoch, lease=lease, traceparent=trace))
        self._known = session.position

    def _request_lease(self) -> asyncio.Task[Lease]:
        if self._calling is None:
            self._called_s = now_s()
            self._calling = asyncio.ensure_future(self.tier.leases.take())
        return self._calling

    async def _take_lease(self) -> None:
        call = self._request_lease()
        self._lease = await call
        self._calling = self._called_s = None

    async def _next_reply(self, session: Session) -> Reply | Need:
        """Return the next answer that stands after the session; others came late."""
        while True:
            match await self._receive():
                case Need() as need:
                    return need
                case Proposal() | Judgement() as item if self._continues(item, session):
                    self._statistics.cached_prompt_tokens = max(
                        self._statistics.cached_prompt_tokens, item.cached_prompt_tokens
                    )
                    return item
                case Proposal() as late:
                    self._statistics.drafter_passes += late.passes
                case _:
                    continue

    async def _receive(self) -> object:
        assert self._link is not None, "enter first"
        item = await self._link.receive()
        if isinstance(item, Refusal):
            raise self.tier.error(item)
        return item

    def _continues(self, item: Reply, session: Session) -> bool:
        """Return whether the block was drafted, or judged, after just these tokens."""
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


def failure_of(error: CascadeError) -> Failure:
    """Return what an error says of the replica that raised it."""
    match error:
        case Overloaded():
            return Failure.FULL
        case Internal():
            return Failure.BROKEN
        case _:
            return Failure.LOST


def now_s() -> float:
    """Return the time by which sessions wait."""
    return asyncio.get_running_loop().time()


async def score(tier: TierClient, tokens: tuple[int, ...], *, top: int) -> tuple[TokenLogprob, ...]:
    """Return a replica's log-probability of each token but the first, under a lease of its own."""
    lease = await tier.leases.take()
    session_id = SessionId(uuid.uuid4().hex)
    link = tier.clients.open_stream(lease.address, session_id, 1)
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
