"""What drafter and expert share: sessions between a gRPC server and an engine.

The event loop owns every session; the engine's thread sees only forward requests and their tasks.
While requests of a session are in flight its messages are queued, and the last is served next.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import logging
import time
from abc import ABC, abstractmethod
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from cascade.engine import threads
from cascade.engine.engine import Engine
from cascade.engine.request import Share
from cascade.engine.tensor_parallel import load
from cascade.engine.tokenizer import load as load_tokenizer
from cascade.errors import (
    CascadeError,
    ContextTooLong,
    Internal,
    InvalidRequest,
    Unauthenticated,
    Unavailable,
)
from cascade.observability.tracing import TracedTier
from cascade.protocol.grpc_status import refusal
from cascade.protocol.messages import Close, Judge, Need, Open, Propose, Score
from cascade.protocol.server import TierServer
from cascade.protocol.services import Description
from cascade.replica.lease_book import LeaseBook
from cascade.replica.session import ReplicaSession
from cascade.sampling.token_mask import constraint_masks
from cascade.speculation.cost_model import Timing
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

    from torch import Tensor

    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.request import ForwardRequest, LogitsOutput
    from cascade.engine.settings import EngineSettings
    from cascade.engine.tensor_parallel import Launch
    from cascade.engine.tokenizer import Tokenizer
    from cascade.protocol.messages import FromDrafter, FromExpert, ToDrafter, ToExpert
    from cascade.protocol.server import Connection
    from cascade.protocol.services import LeaseTicket, TierKind
    from cascade.protocol.tls import Credentials
    from cascade.replica.options import ReplicaOptions

log = logging.getLogger(__name__)

Message = TypeVar("Message", Propose, Judge)


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What the engine's thread hands to the event loop for one session after a forward pass."""

    session: ReplicaSession
    message: FromDrafter | FromExpert | None = None
    committed: tuple[int, ...] = ()  # by this replica itself
    done: bool = True  # the session can serve its next message


class Replica(ABC, Generic[Message]):
    """One model behind one gRPC server; `Drafter` and `Expert` handle the messages.

    Made by `start`, inside a running event loop.
    """

    kind: ClassVar[TierKind]
    session_class: ClassVar[type[ReplicaSession]] = ReplicaSession
    clock = staticmethod(time.monotonic)  # also the engine's

    def __init__(  # noqa: PLR0913 - as in `start`
        self,
        model: LoadedModel,
        tokenizer: Tokenizer,
        options: ReplicaOptions,
        *,
        token: str | None,
        credentials: Credentials | None = None,
        vocab_size: int | None = None,
    ) -> None:
        """Make a replica; it serves once its engine and server are started.

        Args:
            model: The model.
            tokenizer: Of the token ids in messages.
            options: What is served.
            token: A lease token that is always accepted.
            credentials: Of TLS; None: without.
            vocab_size: Token ids in messages are below it; default: the model's own.
        """
        vocab_size = model.vocabulary if vocab_size is None else vocab_size
        self.address = ""
        self.leases = LeaseBook(
            connect_timeout_s=options.connect_timeout_s,
            idle_timeout_s=options.idle_timeout_s,
            shared_token=token,
            clock=self.clock,
        )
        self.engine = self.make_engine(model, options.engine)
        self._description = Description(
            model=options.model,
            vocab_size=vocab_size,
            context_length=self.engine.limit_tokens,
            source_length=self.engine.limit_source,
            tokenizer_fingerprint=fingerprint(tokenizer),
        )
        self._grammars = GrammarCompiler(partial(TokenTexts.of, tokenizer, vocab_size))
        self._compiling = ThreadPoolExecutor(1, thread_name_prefix="grammars")
        self.server = TierServer(TracedTier(self), self.kind, credentials=credentials)
        self._pass_timeout_s = options.pass_timeout_s
        self._loop = asyncio.get_running_loop()
        self._sessions: dict[tuple[Connection, SessionId], ReplicaSession] = {}
        self._drained: asyncio.Event | None = None  # while it drains; set once no session is open
        self._engine_ids = itertools.count()

    @classmethod
    async def start(  # noqa: PLR0913 - one parameter for each thing that only the caller knows
        cls,
        options: ReplicaOptions,
        *,
        address: str,
        advertised_host: str | None = None,
        token: str | None = None,
        credentials: Credentials | None = None,
        launch: Launch | None = None,
    ) -> Self:
        """Load the model and serve it.

        Args:
            options: What to serve.
            address: `host:port` to bind; port 0 picks a free one.
            advertised_host: Host in the address that leases give; the bound one if absent.
            token: A lease token that is always accepted, for tiers without Ray.
            credentials: Of TLS; None: without.
            launch: Starts the processes of a sharded model; None for children of this process.

        Raises:
            StartupError: The model cannot be served exactly, or the address not bound.
        """
        began_s = cls.clock()
        source: dict[str, Any] = {
            "revision": options.revision,
            "trust_remote_code": options.trust_remote_code,
        }
        loading = partial(load, options.model, settings=options.engine, launch=launch, **source)
        model = await asyncio.to_thread(threads.run_in_own_thread, loading)
        log.info("Reading the tokenizer of %s", options.model)
        try:
            tokenizer = await asyncio.to_thread(load_tokenizer, options.model, **source)
            shared = min(tokenizer.size, model.vocabulary)  # ids beyond the tokenizer are padding
            make = await asyncio.to_thread(cls.maker, options, tokenizer, model.vocabulary)
            replica = make(
                replace(model, vocabulary=shared),
                tokenizer,
                options,
                token=token,
                credentials=credentials,
            )
            replica.engine.start()
            bound = await replica.server.start(address)
        except BaseException:
            if model.ranks is not None:
                model.ranks.stop()
            raise
        port = bound.rpartition(":")[2]
        replica.address = bound if advertised_host is None else f"{advertised_host}:{port}"
        log.info(
            "The %s serves %s on %s, %.1f s after it began to load",
            *(cls.kind.name, options.model, replica.address, cls.clock() - began_s),
        )
        return replica

    @classmethod
    def maker(
        cls, options: ReplicaOptions, tokenizer: Tokenizer, vocabulary: int
    ) -> Callable[..., Self]:
        """Return what makes the replica of a loaded model; not called on the event loop.

        Args:
            options: What is served.
            tokenizer: The model's.
            vocabulary: Logits of the model.

        Raises:
            StartupError: The model cannot be served so.
        """
        del options, tokenizer, vocabulary
        return cls

    async def drain(self) -> None:
        """Open no more sessions, and return when those that are open have ended."""
        self._drained = asyncio.Event()
        await self.server.set_serving(serving=False)
        if self._sessions:
            await self._drained.wait()

    async def stop(self, *, grace_s: float = 0.0) -> None:
        """Accept no new streams, cut the open ones after `grace_s` seconds, stop the engine."""
        await self.server.stop(grace_s=grace_s)
        self._compiling.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.engine.stop)

    def make_engine(self, model: LoadedModel, settings: EngineSettings) -> Engine:
        """Return an engine that hands its logits to this replica; not started."""
        return Engine(model, handler=self, settings=settings, clock=self.clock)

    @abstractmethod
    def begin(self, session: ReplicaSession, message: Message) -> Sequence[ForwardRequest]:
        """Return the forward requests that serve a message, if it needs any.

        The session is not busy, and has the tokens and the digest of the message.
        """

    @abstractmethod
    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Consume the logits of a forward pass; return the requests that follow at once.

        Called on the engine's thread. A request's task is its session, or has it as `session`.
        """

    @property
    def num_sessions(self) -> int:
        """Return the number of open sessions."""
        return len(self._sessions)

    @property
    def alive(self) -> bool:
        """Whether the engine runs and its device does not hang."""
        return self.engine.alive and self.engine.working_s < self._pass_timeout_s

    def describe(self) -> Description:
        """Return what is served here."""
        return self._description

    def authenticate(self, lease: str) -> None:
        """Raise Unauthenticated unless a token is that of a lease here."""
        self.leases.check(lease)

    def lease(self) -> AsyncGenerator[LeaseTicket]:
        """Hold a lease for the caller, until it closes the generator or the session ends."""
        return self.leases.hold(self.address, self._end_lease)

    def receive(self, connection: Connection, message: ToDrafter | ToExpert) -> None:
        """Serve one message of a stream.

        Raises:
            CascadeError: The message cannot be served; the server then refuses its session.
        """
        match message:
            case Open():
                self._open(connection, message)
            case Score():
                raise InvalidRequest("a drafter does not score; send Score to an expert")
            case Close():
                if session := self._sessions.get((connection, message.session_id)):
                    self._close(session)
            case Propose() | Judge():
                session = self._sessions[connection, message.session_id]
                self.leases.touch(session.lease)
                if session.busy and session.repeats(message):
                    return
                session.received_s = self.clock()
                if session.busy:
                    session.queued.append(message)
                else:
                    self._serve(session, message)

    def disconnected(self, connection: Connection) -> None:
        """Close every session of a stream that ended."""
        for session in list(self._sessions.values()):
            if session.connection is connection:
                self._close(session)

    def publish(self, results: Sequence[Result]) -> None:
        """Hand the results of one pass to the event loop; called on the engine's thread."""
        if results and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._deliver, results)

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Refuse the session whose request failed; called on the engine's thread."""
        task = request.task
        session: ReplicaSession = task if isinstance(task, ReplicaSession) else task.session
        self._loop.call_soon_threadsafe(self._refuse, session, as_cascade_error(error))

    def check_context(self, num_held: int, num_new: int) -> None:
        """Check that so many new tokens fit after those that a session holds.

        Raises:
            ContextTooLong: They do not.
        """
        limit = self._description.context_length
        if num_held + num_new > limit:
            raise ContextTooLong(
                f"{num_held} tokens and {num_new} more do not fit the context of {limit}"
            )

    def timing(self, session: ReplicaSession, service_s: float, *, now_s: float) -> Timing:
        """Return the timing of a reply made from the current pass; on the engine's thread."""
        current = self.engine.current_pass
        return Timing(
            service_s=service_s,
            step_s=now_s - current.began_s,
            tokens=current.tokens,
            sessions=current.sessions,
            open=self.num_sessions,
            taken_s=self.engine.taken_s(session.engine_id),
        )

    def _open(self, connection: Connection, message: Open) -> None:
        if self._drained is not None:
            raise Unavailable("this replica is about to stop; open the session at another one")
        self.leases.claim(message.lease)
        opened = message.session
        if not opened.prompt:
            raise InvalidRequest("the prompt is empty; a session needs at least one token")
        if old := self._sessions.get((connection, opened.id)):
            self._close(old)
        session = self.new_session(
            connection=connection,
            opened=opened,
            epoch=message.epoch,
            lease=message.lease,
            message_follows=message.message_follows,
            share=Share(message.caller, message.weight),
            engine_id=SessionId(f"{opened.id}/{next(self._engine_ids)}"),
            tokens=list(opened.tokens),
            masks=constraint_masks(opened.policy, self._description.vocab_size),
            vocabulary=self._description.vocab_size,
        )
        self._sessions[connection, opened.id] = session
        work = self.preparation(session)
        if work is None:
            self._begin(session)
            return
        session.busy = True
        prepared = self._loop.run_in_executor(self._compiling, work)
        prepared.add_done_callback(partial(self._begin_prepared, session))

    def new_session(self, **fields: Any) -> ReplicaSession:
        """Return a session that has been opened."""
        session = self.session_class(**fields)
        self.check_context(session.engine_length(session.tokens), 0)
        return session

    def preparation(self, session: ReplicaSession) -> Callable[[], object] | None:
        """Return what another thread must do before a session begins; None: nothing."""
        grammar = session.opened.policy.grammar
        if grammar is None or self._grammars.find(grammar) is not None:
            return None
        return partial(self._grammars.compile, grammar)

    def _begin_prepared(self, session: ReplicaSession, prepared: asyncio.Future[Any]) -> None:
        """Begin a session that is prepared, or refuse it."""
        if session.closed or prepared.cancelled():
            return
        if (error := prepared.exception()) is not None:
            self._refuse(session, as_cascade_error(error))
            return
        session.busy = False
        self._begin(session)
        if session.queued:
            self._serve_queued(session)

    def _begin(self, session: ReplicaSession) -> None:
        """Give a session its masks, and the engine its prompt unless a message runs it at once."""
        policy = session.opened.policy
        if policy.grammar is not None:
            mask = self._grammars.mask(policy.grammar, policy.stop_ids)
            session.masks = (*session.masks, mask)
        has_prefill = session.engine_length(session.tokens) > 1 or session.opened.source
        if has_prefill and not (session.message_follows or session.queued):
            self.engine.submit(session.prefill())

    def _serve(self, session: ReplicaSession, message: Propose | Judge) -> None:
        missing_from = session.sync_tokens(message)
        if missing_from is None:
            requests = self.begin(session, message)  # pyright: ignore[reportArgumentType] - the server checks that a tier gets its own
            if requests:
                session.busy, session.serving = True, message
            for request in requests:
                self.engine.submit(request)
        elif len(message.tokens) == message.position:
            raise InvalidRequest(
                "the digest does not match the tokens sent; open the session again"
            )
        else:
            session.connection.send(
                Need(session_id=message.session_id, epoch=session.epoch, position=missing_from)
            )

    def _deliver(self, results: Sequence[Result]) -> None:
        for result in results:
            session = result.session
            if session.closed:
                continue
            self.leases.touch(session.lease)
            session.commit(result.committed)
            if result.message is not None:
                session.connection.send(result.message)
            if result.done:
                session.busy = False
                if session.queued:
                    self._serve_queued(session)

    def _serve_queued(self, session: ReplicaSession) -> None:
        """Serve the last queued message; of those before it only the tokens matter."""
        *superseded, message = session.queued
        session.queued.clear()
        for earlier in superseded:
            session.sync_tokens(earlier)
        try:
            self._serve(session, message)
        except CascadeError as error:
            self._refuse(session, error)

    def _refuse(self, session: ReplicaSession, error: CascadeError) -> None:
        if not session.closed:
            self._close(session)
            session.connection.send(refusal(session.opened.id, session.epoch, error))

    def _close(self, session: ReplicaSession) -> None:
        session.closed = True
        del self._sessions[session.connection, session.opened.id]
        self.engine.release(session.engine_id)
        self.leases.end(session.lease)
        if self._drained is not None and not self._sessions:
            self._drained.set()

    def _end_lease(self, token: str) -> None:
        for session in list(self._sessions.values()):
            if session.lease == token:
                self._refuse(session, Unauthenticated("the lease has ended; take another"))


def as_cascade_error(error: BaseException) -> CascadeError:
    """Return the error that a client receives for a failed forward pass."""
    if isinstance(error, CascadeError):
        return error
    return Internal(f"a forward pass failed: {error}")


def fingerprint(tokenizer: Tokenizer) -> str:
    """Return a digest of which token each id means; pairs that share a vocabulary share it."""
    text = "\0".join(f"{id_}\0{token}" for id_, token in sorted(tokenizer.tokens.items()))
    return hashlib.sha256(text.encode()).hexdigest()
