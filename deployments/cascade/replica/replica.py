"""What drafter and expert share: seats between a gRPC server and an engine.

The event loop owns every seat; the engine's thread sees only steps and their tasks. While steps of
a seat are in flight, items that arrive are parked, and the last is served next.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar, Generic, Self, TypeVar

from cascade.engine.engine import Engine
from cascade.engine.model_loader import load
from cascade.engine.settings import EngineSettings
from cascade.engine.tokenizer import load as load_tokenizer
from cascade.errors import CascadeError, ContextTooLong, Internal, InvalidRequest, Unauthenticated
from cascade.observability.tracing import TracedTier
from cascade.protocol.grpc_status import refusal
from cascade.protocol.messages import Close, Judge, Need, Open, Propose, Score
from cascade.protocol.server import TierServer
from cascade.protocol.services import Description
from cascade.replica.lease_book import LeaseBook
from cascade.replica.session import ReplicaSession
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence

    from torch import Tensor

    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.request import ForwardRequest, LogitsOutput
    from cascade.engine.tokenizer import Tokenizer

    # MOVED
    from cascade.protocol.messages import FromDrafter, FromExpert, ToDrafter, ToExpert
    from cascade.protocol.server import Connection
    from cascade.protocol.services import LeaseTicket, TierKind


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaOptions:
    """What a replica serves, and how patient it is."""

    model: str
    revision: str | None = None
    trust_remote_code: bool = False
    engine: EngineSettings = field(default_factory=EngineSettings)
    connect_timeout_s: float = 10.0  # from a lease to its session
    idle_timeout_s: float = 120.0  # of a session without items
    pass_timeout_s: float = 120.0  # of a forward pass, until its device is taken to hang


Item = TypeVar("Item", Propose, Judge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the engine's thread hands to the event loop for one seat after a pass."""

    session: ReplicaSession
    item: FromDrafter | FromExpert | None = None
    committed: tuple[int, ...] = ()  # by this replica itself
    done: bool = True  # the seat is free for its next item


class Replica(ABC, Generic[Item]):
    """One model behind one gRPC server; `Drafter` and `Expert` say what an item means.

    Made by `start`, inside a running event loop.
    """

    kind: ClassVar[TierKind]
    session_class: ClassVar[type[ReplicaSession]] = ReplicaSession
    clock = staticmethod(time.monotonic)  # the engine's

    def __init__(
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        options: ReplicaOptions,
        *,
        token: str | None,
    ) -> None:
        self.address = ""
        self.leases = LeaseBook(
            connect_timeout_s=options.connect_timeout_s,
            idle_timeout_s=options.idle_timeout_s,
            standing=token,
            clock=self.clock,
        )
        settings = replace(options.engine, vocabulary=min(tokenizer.size, model.vocabulary))
        self.engine = self.make_engine(model, settings)
        self._description = Description(
            model=options.model,
            vocab_size=settings.vocabulary,
            context_length=self.engine.limit_tokens,
            tokenizer_fingerprint=fingerprint(tokenizer),
        )
        self.server = TierServer(TracedTier(self), self.kind)
        self._pass_timeout_s = options.pass_timeout_s
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[tuple[Connection, SessionId], ReplicaSession] = {}
        self._keys = itertools.count()

    @classmethod
    async def start(
        cls,
        options: ReplicaOptions,
        *,
        address: str,
        advertised_host: str | None = None,
        token: str | None = None,
    ) -> Self:
        """Load the model and serve it on `address` (port 0 picks a free one).

        Args:
            options: What to serve.
            address: `host:port` to bind.
            advertised_host: Host in the address that leases give; the bound one if absent.
            token: A lease token that is always good, for tiers without Ray.

        Raises:
            StartupError: The model cannot be served exactly, or the address not bound.
        """
        model = await asyncio.to_thread(
            load,
            options.model,
            device=options.engine.device,
            dtype=options.engine.dtype,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        tokenizer = await asyncio.to_thread(
            load_tokenizer,
            options.model,
            revision=options.revision,
            trust_remote_code=options.trust_remote_code,
        )
        replica = cls(model, tokenizer, options, token=token)
        replica.engine.start()
        bound = await replica.server.start(address)
        port = bound.rpartition(":")[2]
        replica.address = bound if advertised_host is None else f"{advertised_host}:{port}"
        return replica

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Take no new streams, cut the open ones after `grace_s` seconds, end the engine."""
        await self.server.stop(grace_s=grace_s)
        await asyncio.to_thread(self.engine.stop)

    def make_engine(self, model: LoadedModel, settings: EngineSettings) -> Engine:
        """Return the engine whose head this is; not started."""
        return Engine(model, handler=self, settings=settings, clock=self.clock)

    @abstractmethod
    def begin(self, seat: ReplicaSession, item: Item) -> Sequence[ForwardRequest]:
        """Return the steps that serve the item, if it takes any; the seat is free and caught up."""

    @abstractmethod
    def finish(self, outputs: Sequence[LogitsOutput], logits_NV: Tensor) -> Sequence[ForwardRequest]:
        """Consume a pass's logits on the engine's thread; return the steps that follow at once."""

    @abstractmethod
    def session_of(self, step: ForwardRequest) -> ReplicaSession | None:
        """Return the seat that a step belongs to."""

    def score(self, connection: Connection, item: Score) -> None:
        """Answer a `Score`; only the expert does."""
        del connection, item
        raise InvalidRequest("a drafter does not score; send Score to an expert")

    @property
    def sessions(self) -> int:
        """Return the number of open sessions."""
        return len(self._sessions)

    @property
    def alive(self) -> bool:
        """Whether the engine runs, and its device does not hang."""
        return self.engine.alive and self.engine.working_s < self._pass_timeout_s

    def describe(self) -> Description:
        """Return what is served here."""
        return self._description

    async def lease(self) -> AsyncGenerator[LeaseTicket]:
        """Hold a lease for the caller (a streaming Serve method)."""
        async for ticket in self.leases.hold(self.address, self._drop):
            yield ticket

    def receive(self, connection: Connection, item: ToDrafter | ToExpert) -> None:
        """Serve one item of a stream; a CascadeError refuses its session."""
        match item:
            case Open():
                self._open(connection, item)
            case Score():
                self.leases.claim(item.lease)
                self.score(connection, item)
            case Close():
                if seat := self._sessions.get((connection, item.session_id)):
                    self._close(seat)
            case Propose() | Judge():
                self._take(self._sessions[connection, item.session_id], item)

    def disconnected(self, connection: Connection) -> None:
        """Free every session of a stream that ended."""
        for seat in [seat for seat in self._sessions.values() if seat.connection is connection]:
            self._close(seat)

    def publish(self, results: Sequence[Result]) -> None:
        """Hand the results of one pass to the event loop; called on the engine's thread."""
        if results and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, results)

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Refuse the session whose step cannot run; called on the engine's thread."""
        known = error if isinstance(error, CascadeError) else Internal(f"a pass failed: {error}")
        if seat := self.session_of(request):
            self._loop.call_soon_threadsafe(self._refuse, seat, known)

    def check_context(self, held: int, more: int) -> None:
        """Raise ContextTooLong unless `more` tokens fit after `held`."""
        room = self._description.context_length - held
        if more > room:
            raise ContextTooLong(
                f"{held} tokens and {more} more do not fit the context of "
                f"{self._description.context_length}"
            )

    def _open(self, connection: Connection, item: Open) -> None:
        self.leases.claim(item.lease)
        session = item.session
        if not session.prompt:
            raise InvalidRequest("the prompt is empty; a session needs at least one token")
        self.check_context(len(session.prompt) + session.position, 0)
        place = (connection, session.id)
        if old := self._sessions.get(place):
            self._close(old)
        seat = self.session_class(
            connection=connection,
            opened=session,
            epoch=item.epoch,
            token=item.lease,
            key=SessionId(f"{session.id}/{next(self._keys)}"),
            answer=list(session.tokens),
        )
        self._sessions[place] = seat
        if seat.length > 1:
            seat.busy = True
            self.engine.submit(seat.prefill(seat))

    def _take(self, seat: ReplicaSession, item: Propose | Judge) -> None:
        self.leases.touch(seat.token)
        if seat.busy and seat.repeats(item):
            return
        seat.asked_s = self.clock()
        if seat.busy:
            seat.queued.append(item)
        else:
            self._serve(seat, item)

    def _serve(self, seat: ReplicaSession, item: Propose | Judge) -> None:
        lacking = seat.sync_tokens(position=item.position, tokens=item.tokens, digest=item.digest)
        if lacking is None:
            steps = self.begin(seat, item)  # pyright: ignore[reportArgumentType] - wire sends a tier its own
            if steps:
                seat.busy, seat.serving = True, item
            for step in steps:
                self.engine.submit(step)
        elif len(item.tokens) == item.position:
            raise InvalidRequest(
                "the digest does not match the tokens sent; open the session again"
            )
        else:
            seat.connection.send(
                Need(session_id=item.session_id, epoch=seat.epoch, position=lacking)
            )

    def _deliver(self, results: Sequence[Result]) -> None:
        for result in results:
            if not result.session.closed:
                self._settle(result)

    def _settle(self, result: Result) -> None:
        seat = result.session
        self.leases.touch(seat.token)
        seat.commit(result.committed)
        if result.item is not None:
            seat.connection.send(result.item)
        if not result.done:
            return
        seat.busy = False
        if not seat.queued:
            return
        *passed, item = seat.queued
        seat.queued.clear()
        for one in passed:
            seat.sync_tokens(position=one.position, tokens=one.tokens, digest=one.digest)
        try:
            self._serve(seat, item)
        except CascadeError as error:
            self._refuse(seat, error)

    def _refuse(self, seat: ReplicaSession, error: CascadeError) -> None:
        if not seat.closed:
            self._close(seat)
            seat.connection.send(refusal(seat.opened.id, seat.epoch, error))

    def _close(self, seat: ReplicaSession) -> None:
        seat.closed = True
        del self._sessions[seat.connection, seat.opened.id]
        self.engine.release(seat.key)
        self.leases.end(seat.token)

    def _drop(self, token: str) -> None:
        for seat in [seat for seat in self._sessions.values() if seat.token == token]:
            self._refuse(seat, Unauthenticated("the lease has ended; take another"))


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a digest of which token each id means; pairs that share a vocabulary share it."""
    text = "\0".join(f"{id_}\0{token}" for id_, token in sorted(tokenizer.tokens.items()))
    return hashlib.sha256(text.encode()).hexdigest()
