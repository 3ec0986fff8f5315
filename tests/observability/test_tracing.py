"""One trace joins the router's rounds and the tiers' work on them; without a provider, nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from tests.observability.test_observer import Scripted

from cascade.benchmark.microbench import InstantTier
from cascade.errors import ExpertUnavailable
from cascade.observability import tracing
from cascade.observability.observer import ObservedGenerator
from cascade.observability.tracing import TracedTier
from cascade.protocol.messages import Close, Judge, Open
from cascade.protocol.server import Connection
from cascade.protocol.services import EXPERT
from cascade.types import DecodingParams, Mode, Request, SamplingParams, Session, SessionId

if TYPE_CHECKING:
    from collections.abc import Iterator

    from opentelemetry.sdk.trace import ReadableSpan

    from cascade.local import LocalServer

SAMPLED = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


@pytest.fixture
def spans(monkeypatch: pytest.MonkeyPatch) -> Iterator[InMemorySpanExporter]:
    exporter, provider = InMemorySpanExporter(), TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("test"))
    yield exporter
    provider.shutdown()


def asked() -> Request:
    policy = DecodingParams(sampling=SamplingParams(temperature=0))
    return Request(
        prompt=(1, 2), policy=policy, mode=Mode.SPECULATIVE, max_tokens=20, draft_tokens=4, name="n"
    )


def named(spans: InMemorySpanExporter, name: str) -> list[ReadableSpan]:
    return [span for span in spans.get_finished_spans() if span.name == name]


async def test_rounds_and_tiers_are_in_one_trace(
    toy_stack: LocalServer, spans: InMemorySpanExporter
) -> None:
    pieces = [
        piece async for piece in ObservedGenerator(toy_stack.router, observers=()).generate(asked())
    ]
    entry = pieces[-1].statistics
    assert entry is not None
    (answer,) = named(spans, "cascade.answer")
    rounds = named(spans, "cascade.round")
    drafts, verdicts = named(spans, "cascade.drafter"), named(spans, "cascade.expert")
    assert len(rounds) == entry.rounds
    assert len(verdicts) == entry.expert_passes
    assert drafts
    parent = answer.context
    assert parent is not None
    for span in (*rounds, *drafts, *verdicts):
        assert span.context is not None
        assert span.parent is not None
        assert span.context.trace_id == parent.trace_id
        assert span.parent.span_id == parent.span_id
        assert span.start_time is not None
        assert span.end_time is not None
        assert span.start_time <= span.end_time
    assert answer.attributes is not None
    assert answer.attributes["cascade.request"] == "n"
    assert answer.attributes["cascade.finish"] == "length"
    places = [dict(span.attributes or {})["cascade.position"] for span in rounds]
    judged = [dict(span.attributes or {})["cascade.position"] for span in verdicts]
    assert places == judged


async def test_what_is_not_traced_sends_no_context(toy_stack: LocalServer) -> None:
    """As it comes: no provider, so no span records and `Open` is as it was."""
    assert tracing.traceparent() == ""
    pieces = [
        piece async for piece in ObservedGenerator(toy_stack.router, observers=()).generate(asked())
    ]
    assert sum(len(piece.tokens) for piece in pieces) == 20


async def test_a_trace_that_is_not_sampled_costs_no_spans(
    toy_stack: LocalServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    exporter, provider = InMemorySpanExporter(), TracerProvider(sampler=ALWAYS_OFF)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    monkeypatch.setattr(tracing, "_TRACER", provider.get_tracer("test"))
    async for _ in ObservedGenerator(toy_stack.router, observers=()).generate(asked()):
        pass
    assert exporter.get_finished_spans() == ()


async def test_the_span_of_an_answer_that_fails_says_so(spans: InMemorySpanExporter) -> None:
    def fail() -> None:
        raise ExpertUnavailable("gone")

    with pytest.raises(ExpertUnavailable):
        async for _ in ObservedGenerator(Scripted(2, end=fail), observers=()).generate(asked()):
            pass
    (answer,) = named(spans, "cascade.answer")
    assert answer.status.description == "ExpertUnavailable"


async def test_a_tier_forgets_the_traces_of_sessions_that_are_over(
    spans: InMemorySpanExporter,
) -> None:
    tier, connection = TracedTier(InstantTier()), Connection(EXPERT)
    for name in ("a", "b"):
        session = Session(id=SessionId(name), prompt=(1,), policy=DecodingParams())
        tier.receive(connection, Open(session=session, epoch=1, lease="", traceparent=SAMPLED))
        ask = Judge(session_id=session.id, epoch=1, position=0, digest=0)
        tier.receive(connection, ask)
    tier.receive(connection, Close(session_id=SessionId("a"), epoch=1))
    assert len(named(spans, "cascade.expert")) == 2
    assert tier.traced == 1
    tier.disconnected(connection)
    assert tier.traced == 0
