"""One session on one tier: its lease, its stream, and what the replica already knows.

A session recovers in one way only: it takes another lease and opens the whole `Session` there under
the next epoch. `retry` decides when.
"""

from __future__ import annotations

import asyncio
import logging
import math
import sys
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from cascade.errors import (
    CascadeError,
    ContextTooLong,
    Internal,
    Overloaded,
    Unauthenticated,
    Unavailable,
)
from cascade.observability.tracing import traceparent
from cascade.protocol.grpc_status import error_from_refusal
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
    extend_digest,
)
from cascade.protocol.services import DRAFTER, PROTOCOL_VERSION
from cascade.router.leases import LeaseQueue, release_when_granted
from cascade.router.retry import SERVED, STAY_S, Failure, RetryPolicy, RetryState
from cascade.types import Caller

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine

    from cascade.protocol.client import ReplicaClients, SessionStream
    from cascade.router.leases import Lease, LeaseSource
    from cascade.types import Session, SessionId, Statistics, TokenLogprob

WATCH_S = 0.5  # between two looks at a tier's connections
GONE_S = 2.0  # without a connected replica, after which a tier cannot be reached
SILENCE_POLL_S = 0.25
LAST_LEASE_S = 1.0  # for the lease after a replica that took most of the time of an attempt
REPLICA_ERRORS = (Unavailable, Overloaded, Internal)  # all others are the request's own fault
BEST_EFFORT_ERRORS = (*REPLICA_ERRORS, ContextTooLong)  # for a drafter: the expert may hold more

logger = logging.getLogger(__name__)

T = TypeVar("T")
Reply: TypeAlias = Proposal | Judgement
MessageFactory: TypeAlias = "Callable[[int, int, tuple[int, ...]], Propose | Judge]"
"""Builds a message from the epoch, the prefix hash and the tokens that the replica lacks."""


class TierClient:
    """All replicas of one tier, as the router reaches them."""

    def __init__(
        self,
        *,
        leases: LeaseSource,
        clients: ReplicaClients,
        max_queued: int = 256,
        always_there: bool = True,
        context_tokens: int | None = None,
    ) -> None:
        """Reach the replicas of a tier.

        Args:
            leases: Grants leases; sessions that wait for one do so here, by turns.
            clients: Connects to the replicas.
            max_queued: Sessions that may wait for a lease; -1: any number.
            always_there: Whether the tier keeps a replica while nobody calls it.
            context_tokens: Of the model, until a replica has said what it holds.
        """
        self.leases = LeaseQueue(leases, limit=max_queued if max_queued >= 0 else sys.maxsize)
        self.clients = clients
        self.always_there = always_there
        self.was_connected = False  # a replica has been connected
        self._connected_s = -math.inf  # when a replica was last seen to be
        self._context_tokens = context_tokens

    @property
    def name(self) -> str:
        """Return drafter or expert."""
        return self.clients.kind.name

    @property
    def reachable(self) -> bool:
        """Whether a replica is connected, or was a moment ago; also full replicas are."""
        if self.clients.connected:
            self._connected_s = now_s()
        return now_s() - self._connected_s <= GONE_S

    @property
    def context_tokens(self) -> int | None:
        """Return the tokens that a session may have on any connected replica, if one has said."""
        described = [client.description for client in self.clients.connected]
        lengths = [one.context_length for one in described if one is not None]
        self._context_tokens = min(lengths, default=self._context_tokens)
        return self._context_tokens

    @property
    def tokenizers(self) -> set[str]:
        """Return the digests of what token ids mean to the connected replicas that have said so."""
        described = [client.description for client in self.clients.connected]
        return {one.tokenizer_fingerprint for one in described if one is not None}

    async def watch(self) -> None:
        """Keep up `reachable` and `context_tokens` until cancelled."""
        while True:
            try:
                # A tier that may have no replica would start one for being asked.
                if self.always_there and not self.clients.connected:
                    await self.connect()
                for client in self.clients.connected:
                    if client.description is None:
                        await client.describe()
            except (Overloaded, Unavailable) as error:
                logger.debug("No %s can be asked: %s", self.name, error)
            self.was_connected = self.reachable or self.was_connected
            await asyncio.sleep(WATCH_S)

    async def connect(self) -> None:
        """Connect to a replica and ask what it serves; raises as `LeaseQueue.take` does."""
        lease = await self.leases.take(Caller())
        try:
            client = self.clients[lease.address]
            client.connect(lease.token)
            description = await client.describe()
        finally:
            lease.close()
        self._context_tokens = description.context_length  # until its connection is up
        if description.protocol_version != PROTOCOL_VERSION:
            logger.error(
                "The %s at %s speaks protocol version %d and this router %d; deploy both from one"
                " release",
                *(self.name, lease.address, description.protocol_version, PROTOCOL_VERSION),
            )

    def error(self, refusal: Refusal) -> CascadeError:
        """Return the router's error for a refusal; a lost lease counts as a lost replica."""
        lost = self.clients.kind.unavailable
        error = error_from_refusal(refusal, lost=lost)
        return lost(error.message) if isinstance(error, Unauthenticated) else error


class TierSession:
    """One session on one tier; nothing is opened before the first use."""

    def __init__(
        self,
        tier: TierClient,
        statistics: Statistics,
        *,
        policy: RetryPolicy,
        caller: Caller | None = None,
    ) -> None:
        """Prepare a session.

        Args:
            tier: Where it will be.
            statistics: Counts its failures and bytes.
            policy: How it is retried.
            caller: Whose turn it takes where it waits for a lease.
        """
        self.tier = tier
        self._caller = caller or Caller()
        self.retry_state = RetryState()
        self.sent_s = 0.0  # when the last message was sent
        self._statistics = statistics
        self._policy = policy
        self._errors = REPLICA_ERRORS if policy.required else BEST_EFFORT_ERRORS
        self._lease_request: asyncio.Task[Lease] | None = None
        self._lease_requested_s: float | None = None
        self._lease: Lease | None = None
        self._stream: SessionStream | None = None
        self._epoch = 0
        self._opened_s = 0.0
        self._known = 0  # answer tokens that the replica has committed
        self._hash = 0
        self._hashed = 0  # tokens of prompt and answer in the hash
        self._sent_early: Session | None = None  # whose message `hint` has sent already
        self._taken_s = 0.0  # of passes, as the replica has said

    @property
    def address(self) -> str:
        """Return the address of the leased replica, or nothing."""
        return "" if self._lease is None else self._lease.address

    @property
    def paused(self) -> bool:
        """Whether it is too early to ask the tier again."""
        return now_s() < self.retry_state.resume_s

    async def open(self, session: Session) -> None:
        """Open the session on a replica, which starts its prefill; retries as `ask` does."""
        await self._retry(lambda: self._open(session, message_follows=False))

    async def ask(
        self, session: Session, make: MessageFactory, *, pushed: bool = False
    ) -> Reply | None:
        """Return the reply to a message, trying other replicas where one fails.

        Args:
            session: The session that the reply must follow.
            make: Builds the message.
            pushed: The replica sends this reply without being asked.

        Returns:
            None if the tier failed and the session can do without it (`RetryPolicy.required`).

        Raises:
            CascadeError: A required tier is given up, or the message is wrong.
        """
        return await self._retry(lambda: self._attempt(session, make, pushed=pushed))

    async def score(
        self, session_id: SessionId, tokens: tuple[int, ...], *, top: int
    ) -> tuple[TokenLogprob, ...]:
        """Return the log-probability of each token but the first; retries as `ask` does.

        Args:
            session_id: A new one.
            tokens: At least one token.
            top: Alternatives wanted at each position.
        """
        scores = await self._retry(lambda: self._score(session_id, tokens, top=top))
        assert scores is not None, "only an expert scores, and that is required"
        return scores

    def hint(self, session: Session, make: MessageFactory) -> None:
        """Send the next message before `ask` is called, if the replica has replied so far."""
        if self._stream is not None and self.retry_state == SERVED:
            with suppress(Unavailable):  # `ask` notices it
                self.send(session, make)
                self._sent_early = session

    def send(self, session: Session, make: MessageFactory) -> None:
        """Send a message without waiting for its reply."""
        assert self._stream is not None, "open first"
        self.sent_s = now_s()
        missing = session.tokens[self._known :]
        self._stream.send(make(self._epoch, self._hash_of(session), missing))

    async def has_lease(self, *, within_s: float) -> bool:
        """Return whether there is a lease, after waiting at most so long; the request goes on."""
        try:
            if self._lease is None:
                request = self._request_lease()
                if not request.done():
                    await asyncio.wait({request}, timeout=within_s)
                if request.done():
                    await self._take_lease()
        except self._errors as error:
            self.fail(failure_of(error))
        return self._lease is not None

    @property
    def missing(self) -> bool:
        """Whether no replica serves the session, though it was asked for."""
        return self._lease_request is not None or self.retry_state.failures > 0

    async def receive_late(self) -> bool:
        """Read replies that missed their deadline, without waiting; return whether any came."""
        assert self._stream is not None, "open first"
        received = False
        try:
            while self._stream.has_message:
                received = True
                match await self._receive():
                    case Need() as need:
                        self._known = need.position
                    case Proposal() as proposal:
                        self._statistics.drafter_passes += proposal.passes
                    case _:
                        continue
        except self._errors as error:
            self.fail(failure_of(error))
            return False
        return received

    def fail(self, failure: Failure) -> None:
        """Record a failure, and close the session on the replica unless the reply is only late."""
        if not (failure is Failure.LATE and self.retry_state.late):
            causes, name = self._statistics.failover_causes, f"{self.tier.name} {failure}"
            causes[name] = causes.get(name, 0) + 1
        if failure is not Failure.LATE and self._stayed:
            self.retry_state = self.retry_state.after_stay(now_s=now_s())
        self.retry_state = self.retry_state.after_failure(
            failure, self._policy, now_s=now_s(), since_s=self._lease_requested_s
        )
        if failure is not Failure.LATE:
            self.close()

    def close(self) -> None:
        """Close the session on the replica and release the lease; safe to repeat."""
        if self._lease_request is not None:
            self._lease_request.add_done_callback(release_when_granted)
            self._lease_request.cancel()
            self._lease_request = self._lease_requested_s = None
        if self._stream is not None:
            self._statistics.sent_bytes += self._stream.sent_bytes
            self._statistics.received_bytes += self._stream.received_bytes
            self._stream.close()
            self._stream = None
        if self._lease is not None:
            self._lease.close()
            self._lease = None

    def record_verdict(self, committed: int) -> None:
        """Count an expert pass, after which the replica has committed so many tokens more."""
        self._statistics.expert_passes += 1
        self._known += committed

    @property
    def _stayed(self) -> bool:
        reached = self._stream is not None and self._stream.replica_active
        return reached and now_s() - self._opened_s > STAY_S

    async def _retry(self, attempt: Callable[[], Awaitable[T]]) -> T | None:
        deadline_s = self._policy.deadline_s
        if not self.retry_state.served and not self.retry_state.failures:
            self.retry_state = replace(self.retry_state, since_s=now_s())
        while True:
            try:
                if deadline_s is None:
                    return await attempt()
                async with asyncio.timeout(deadline_s):
                    return await attempt()
            except TimeoutError:
                self.fail(Failure.LATE)
                return None
            except self._errors as error:
                self.fail(failure_of(error))
                if not self._policy.required:
                    return None
                if self.retry_state.given_up(self._policy):
                    raise
                self._statistics.failovers += 1
            await asyncio.sleep(self.retry_state.resume_s - now_s())

    async def _attempt(self, session: Session, make: MessageFactory, *, pushed: bool) -> Reply:
        """Ask one replica, repeating the message if it is slow: messages are idempotent."""
        sent = pushed or self._sent_early is session
        self._sent_early = None
        if self._stream is None:
            await self._open(session, message_follows=True)
            sent = False
        timeout_s = self._policy.reply_timeout_s
        while True:
            if not sent:
                self.send(session, make)
            sent = False
            try:
                async with asyncio.timeout(timeout_s):
                    reply = await self._unless_silent(self._next_reply(session))
            except TimeoutError:
                timeout_s *= 2
                continue
            if not isinstance(reply, Need):
                self._known = session.position
                self.retry_state = SERVED
                return reply
            self._known = reply.position

    async def _open(self, session: Session, *, message_follows: bool) -> None:
        stream, token = await self._connect(session.id)
        stream.send(
            Open(
                session=session,
                epoch=self._epoch,
                lease=token,
                traceparent=traceparent(),
                caller=self._caller.name,
                weight=self._caller.weight,
                message_follows=message_follows,
            )
        )
        self._known = session.position

    async def _score(
        self, session_id: SessionId, tokens: tuple[int, ...], *, top: int
    ) -> tuple[TokenLogprob, ...]:
        stream, token = await self._connect(session_id)
        epoch = self._epoch
        stream.send(
            Score(
                session_id=session_id,
                epoch=epoch,
                lease=token,
                tokens=tokens,
                top=top,
                caller=self._caller.name,
                weight=self._caller.weight,
            )
        )
        reply = await self._unless_silent(self._receive())
        assert isinstance(reply, Scores), "an expert replies to Score with Scores"
        return reply.logprobs

    async def _connect(self, session_id: SessionId) -> tuple[SessionStream, str]:
        """Return a stream to a replica, and the token of the lease that allows to open it."""
        if self._lease is None:
            await self._take_lease()
        assert self._lease is not None
        self._epoch += 1
        self._opened_s = now_s()
        self._taken_s = 0.0
        self._stream = self.tier.clients.open_stream(self._lease, session_id, self._epoch)
        return self._stream, self._lease.token

    async def _unless_silent(self, receiving: Coroutine[Any, Any, T]) -> T:
        """Return what is received; a session that has not begun leaves a silent replica.

        Raises:
            CascadeError: As `receiving` does, or heartbeats of the replica are missing.
        """
        if self.retry_state.served or not self._policy.required:
            return await receiving
        assert self._stream is not None, "open first"
        task = asyncio.ensure_future(receiving)
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=SILENCE_POLL_S)
                waited_s = now_s() - self._opened_s
                if task.done() or waited_s < self._policy.entry_s / 2:
                    continue
                if self._stream.replica_silent:
                    since_s = min(self.retry_state.since_s, self._opened_s)
                    self.retry_state = replace(self.retry_state, since_s=since_s)
                    raise self._unavailable(f"the {self.tier.name} at {self.address} is silent")
            return task.result()
        finally:
            task.cancel()

    def _request_lease(self) -> asyncio.Task[Lease]:
        if self._lease_request is None:
            self._lease_requested_s = now_s()
            self._lease_request = asyncio.ensure_future(self.tier.leases.take(self._caller))
        return self._lease_request

    async def _take_lease(self) -> None:
        request = self._request_lease()
        if self._policy.required:
            await self._wait_for_lease(request)
        self._lease = await request
        self._lease_request = self._lease_requested_s = None

    async def _wait_for_lease(self, request: asyncio.Task[Lease]) -> None:
        """Wait until the session is given up; at its beginning longer if the tier is only full.

        Raises:
            Overloaded: No slot came free in time.
            Unavailable: No replica was there in time.
        """
        policy, began_s = self._policy, now_s()
        left_s = max(self.retry_state.give_up_s(policy) - began_s, LAST_LEASE_S)
        await asyncio.wait({request}, timeout=None if math.isinf(left_s) else left_s)
        full = bool(self.tier.clients.connected) and not self.retry_state.served
        if not request.done() and full:
            await asyncio.wait({request}, timeout=max(0.0, policy.lease_s - (now_s() - began_s)))
        if request.done():
            return
        waited = f"within {now_s() - began_s:.1f} s"
        if full:
            raise Overloaded(f"no {self.tier.name} replica came free {waited}")
        raise self._unavailable(f"no {self.tier.name} replica answered {waited}")

    def _unavailable(self, message: str) -> Unavailable:
        return self.tier.clients.kind.unavailable(message)

    async def _next_reply(self, session: Session) -> Reply | Need:
        """Return the next reply that follows the session; replies to earlier ones are skipped."""
        while True:
            match await self._receive():
                case Need() as need:
                    return need
                case Proposal() | Judgement() as reply if self._follows(reply, session):
                    self._statistics.cached_prompt_tokens = max(
                        self._statistics.cached_prompt_tokens, reply.cached_prompt_tokens
                    )
                    return reply
                case Proposal() as late:
                    self._statistics.drafter_passes += late.passes
                case _:
                    continue

    async def _receive(self) -> object:
        assert self._stream is not None, "open first"
        message = await self._stream.receive()
        if isinstance(message, Refusal):
            raise self.tier.error(message)
        if isinstance(message, Proposal | Judgement):
            self._record_taken(message.timing.taken_s)
        return message

    def _record_taken(self, taken_s: float) -> None:
        """Count the seconds of passes that the replica says to have spent on the session."""
        more_s, self._taken_s = max(0.0, taken_s - self._taken_s), max(taken_s, self._taken_s)
        if self.tier.clients.kind is DRAFTER:
            self._statistics.drafter_pass_s += more_s
        else:
            self._statistics.expert_pass_s += more_s

    def _follows(self, reply: Reply, session: Session) -> bool:
        """Return whether the block was drafted, or verified, after exactly these tokens."""
        return reply.position == session.position and reply.digest == self._hash_of(session)

    def _hash_of(self, session: Session) -> int:
        length = len(session.prompt) + session.position
        if self._hashed == 0:
            self._hash = extend_digest(0, session.prompt)
            self._hashed = len(session.prompt)
        if self._hashed < length:
            new = session.tokens[self._hashed - len(session.prompt) :]
            self._hash = extend_digest(self._hash, new)
            self._hashed = length
        return self._hash


def failure_of(error: CascadeError) -> Failure:
    """Return what an error means for the replica that raised it."""
    match error:
        case Overloaded():
            return Failure.FULL
        case Internal():
            return Failure.BROKEN
        case ContextTooLong():
            return Failure.CONTEXT
        case _:
            return Failure.LOST


def now_s() -> float:
    """Return the event loop's time, which all deadlines of a session use."""
    return asyncio.get_running_loop().time()
