"""OpenTelemetry spans: one per answer, one per round, and one per message that a tier serves.

All are in one trace: the router sends its context with `Open`. Nothing is recorded unless the
process has a tracer provider, which Serve's `tracing_config` sets up.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, TypeVar

from opentelemetry import context, trace
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from cascade.protocol.messages import Close, Judge, Judgement, Open, Proposal, Propose, Refusal

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from opentelemetry.context import Context
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

    from cascade.observability.request_record import RequestRecord
    from cascade.protocol.codec import ClientMessage, ServerMessage
    from cascade.protocol.server import Connection, TierServicer
    from cascade.protocol.services import Description
    from cascade.types import Request, SessionId

T = TypeVar("T")

_TRACER = trace.get_tracer("cascade")

_PROPAGATOR = TraceContextTextMapPropagator()


def traceparent() -> str:
    """Return the W3C context of the current span; empty if nothing is traced."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get("traceparent", "")


class RequestSpan:
    """The span of one answer, and one below it per round."""

    def __init__(self, request: Request, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._clock_ns = clock_ns
        span = _TRACER.start_span("cascade.answer", start_time=clock_ns())
        self._span: Span | None = span if span.is_recording() else None
        if self._span is None:
            return
        self._context = trace.set_span_in_context(span)
        self._last_ns = clock_ns()
        self._counts: dict[str, float] = {}
        span.set_attributes(
            {
                "cascade.request": request.name,
                "cascade.mode": request.mode.value,
                "cascade.rule": request.policy.rule.kind,
                "cascade.prompt_tokens": len(request.client_prompt),
            }
        )

    async def run(self, work: Awaitable[T]) -> T:
        """Await something within the span."""
        if self._span is None:
            return await work
        token = context.attach(self._context)
        try:
            return await work
        finally:
            context.detach(token)

    def record_round(self, record: RequestRecord) -> None:
        """Record the round that just ended."""
        if self._span is None:
            return
        began_ns, self._last_ns = self._last_ns, self._clock_ns()
        before, self._counts = self._counts, _counts(record)
        grown = {key: value - before.get(key, 0) for key, value in self._counts.items()}
        position = record.tokens - int(grown["cascade.tokens"])
        span = _TRACER.start_span(
            "cascade.round",
            context=self._context,
            start_time=began_ns,
            attributes={"cascade.position": position, **grown},
        )
        span.end(self._last_ns)

    def end(self, record: RequestRecord) -> None:
        """Record how the answer ended."""
        if self._span is None:
            return
        self._span.set_attributes({"cascade.finish": record.finish, **_counts(record)})
        if record.error is not None:
            self._span.set_status(trace.StatusCode.ERROR, type(record.error).__name__)
        self._span.end(self._clock_ns())


class TracedTier:
    """A tier whose work on traced sessions is recorded, from each message to its reply."""

    def __init__(self, tier: TierServicer, *, clock_ns: Callable[[], int] = time.time_ns) -> None:
        self._tier = tier
        self._clock_ns = clock_ns
        self._sessions: dict[Connection, dict[SessionId, _Traced]] = {}

    @property
    def traced(self) -> int:
        """Return the number of open sessions whose requests are traced."""
        return sum(map(len, self._sessions.values()))

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        """Serve a message."""
        match message:
            case Open() if message.traceparent:
                self._open(connection, message)
            case Close():
                self._sessions.get(connection, {}).pop(message.session_id, None)
            case Propose() | Judge() if connection in self._sessions:
                if traced := self._sessions[connection].get(message.session_id):
                    traced.since_ns = self._clock_ns()
            case _:
                pass
        self._tier.receive(connection, message)

    def disconnected(self, connection: Connection) -> None:
        """Close all sessions of a stream that ended."""
        self._sessions.pop(connection, None)
        self._tier.disconnected(connection)

    def describe(self) -> Description:
        """Return what is served."""
        return self._tier.describe()

    def authenticate(self, lease: str) -> None:
        """Raise Unauthenticated unless a token is that of a lease."""
        self._tier.authenticate(lease)

    @property
    def alive(self) -> bool:
        """Whether the tier works."""
        return self._tier.alive

    def _open(self, connection: Connection, message: Open) -> None:
        parent = _PROPAGATOR.extract({"traceparent": message.traceparent})
        if not trace.get_current_span(parent).get_span_context().trace_flags.sampled:
            return
        if connection not in self._sessions:
            self._sessions[connection] = {}
            connection.on_send = lambda reply: self._replied(connection, reply)
        self._sessions[connection][message.session.id] = _Traced(parent, self._clock_ns())

    def _replied(self, connection: Connection, reply: ServerMessage) -> None:
        sessions = self._sessions.get(connection, {})
        traced = sessions.get(reply.session_id)
        if traced is None:
            return
        since_ns, traced.since_ns = traced.since_ns, self._clock_ns()
        span = _TRACER.start_span(
            f"cascade.{connection.kind.name}",
            context=traced.parent,
            kind=trace.SpanKind.SERVER,
            start_time=since_ns,
            attributes=_attributes(reply),
        )
        span.end(traced.since_ns)
        if isinstance(reply, Refusal):
            del sessions[reply.session_id]


class _Traced:
    """A traced session on a tier: its parent span, and when its current work began."""

    def __init__(self, parent: Context, since_ns: int) -> None:
        self.parent = parent
        self.since_ns = since_ns


def _counts(record: RequestRecord) -> dict[str, float]:
    entry = record.statistics
    return {
        "cascade.tokens": record.tokens,
        "cascade.drafted": entry.drafted,
        "cascade.accepted": entry.accepted,
        "cascade.judged": entry.judged,
        "cascade.deferred": entry.deferred,
        "cascade.undrafted": sum(entry.undrafted_rounds.values()),
        "cascade.drafter_s": entry.drafter_s,
        "cascade.expert_s": entry.expert_s,
        "cascade.drafter_pass_s": entry.drafter_pass_s,
        "cascade.expert_pass_s": entry.expert_pass_s,
        "cascade.divergence": entry.divergence,
        "cascade.unmeasured_tokens": entry.unmeasured_tokens,
    }


def _attributes(reply: ServerMessage) -> dict[str, AttributeValue]:
    match reply:
        case Proposal():
            return {"cascade.position": reply.position, "cascade.drafted": reply.block.length}
        case Judgement():
            return {
                "cascade.position": reply.position,
                "cascade.accepted": reply.verdict.accepted,
                "cascade.tokens": len(reply.verdict.tokens),
            }
        case Refusal():
            return {"cascade.refused": reply.code}
        case _:
            return {}
