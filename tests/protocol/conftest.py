"""Any value of the wire from its type, servers on loopback, and a line between them to cut."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, TypeVar, get_args

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from cascade.protocol import messages
from cascade.protocol.server import TierServer
from cascade.rules import Rule
from cascade.types import (
    Block,
    Bonus,
    Coupling,
    DecodingParams,
    DraftStats,
    Origin,
    RowFormat,
    SamplingParams,
    Session,
    SessionId,
    SparseProbs,
    TokenLogprob,
    Verdict,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from tests.support.recording_tier import RecordingTier

    from cascade.protocol.services import TierKind

Value = TypeVar("Value")

# A shared machine stalls now and then; what matters is that the examples pass.
settings.register_profile("wire", deadline=None, max_examples=50)

settings.load_profile("wire")

TOKENS = st.integers(0, 2**32 - 1)

COUNTS = st.integers(0, 2**31 - 1)

LONGS = st.integers(0, 2**63 - 1)

FINITE = st.floats(allow_nan=False, allow_infinity=False)

PROBABILITIES = st.floats(0, 1)

LOGPROBS = st.floats(max_value=0)

# Protobuf text is UTF-8, which has no lone surrogates.
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20)

IDS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=128).map(SessionId)


def several(
    values: st.SearchStrategy[Value], least: int = 0, most: int = 8
) -> st.SearchStrategy[tuple[Value, ...]]:
    return st.lists(values, min_size=least, max_size=most).map(tuple)


def exactly(values: st.SearchStrategy[Value], count: int) -> st.SearchStrategy[tuple[Value, ...]]:
    return several(values, count, count)


@st.composite
def rows(draw: st.DrawFn) -> SparseProbs:
    """Sparse or full, with or without unscaled weights."""
    count = draw(st.integers(1, 6))
    floats = arrays(np.float16, count, elements=st.floats(0, 1, width=16))
    weights = draw(floats)
    weights[draw(st.integers(0, count - 1))] = 1
    width = draw(st.sampled_from((0, count)))
    ids = draw(arrays(np.uint32, width, elements=TOKENS))
    return SparseProbs(
        ids=ids, weights=np.abs(weights), unscaled=draw(st.none() | floats.map(np.abs))
    )


gates = st.builds(DraftStats, peak=PROBABILITIES, favourite=TOKENS, entropy=FINITE)

logprobs = st.builds(
    TokenLogprob,
    token=TOKENS,
    logprob=LOGPROBS,
    top=several(st.tuples(TOKENS, LOGPROBS), most=3),
)


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    """Every list absent, as long as the block, or one longer where that may be."""
    count = draw(st.integers(0, 4))

    def maybe(values: st.SearchStrategy[Value], *lengths: int) -> tuple[Value, ...]:
        return draw(exactly(values, draw(st.sampled_from((0, *lengths)))))

    return Block(
        tokens=draw(exactly(TOKENS, count)),
        likelihoods=maybe(PROBABILITIES, count),
        unscaled=maybe(PROBABILITIES, count),
        draft_stats=maybe(gates, count, count + 1),
        draft_probs=maybe(rows(), count, count + 1),
        logprobs=maybe(logprobs, count),
    )


@st.composite
def verdicts(draw: st.DrawFn) -> Verdict:
    """As many origins as tokens."""
    count = draw(st.integers(0, 4))
    reported = draw(st.sampled_from((0, count)))
    return Verdict(
        accepted=draw(COUNTS),
        tokens=draw(exactly(TOKENS, count)),
        origins=draw(exactly(st.sampled_from(Origin), count)),
        judged=draw(COUNTS),
        deferred=draw(COUNTS),
        logprobs=draw(exactly(logprobs, reported)),
    )


@st.composite
def sessions(draw: st.DrawFn) -> Session:
    """As many origins as tokens."""
    count = draw(st.integers(0, 4))
    return Session(
        id=draw(IDS),
        prompt=draw(several(TOKENS, 1)),
        policy=draw(policies),
        tokens=draw(exactly(TOKENS, count)),
        origins=draw(exactly(st.sampled_from(Origin), count)),
    )


samplings = st.builds(
    SamplingParams,
    temperature=st.floats(0, allow_infinity=False),
    top_k=COUNTS,
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=PROBABILITIES,
    repetition_penalty=st.floats(0, exclude_min=True, allow_infinity=False),
    presence_penalty=FINITE,
    frequency_penalty=FINITE,
    logit_bias=several(st.tuples(TOKENS, FINITE)),
)

policies = st.builds(
    DecodingParams,
    sampling=samplings,
    rule=st.one_of(*(st.from_type(kind) for kind in get_args(Rule))),
    coupling=st.sampled_from(Coupling),
    bonus=st.sampled_from(Bonus),
    verification=st.sampled_from(Verification),
    rows=st.sampled_from(RowFormat),
    row_entries=st.integers(1, 2**31 - 1),
    seed=LONGS,
    stop_ids=several(TOKENS),
    logprobs=st.none() | COUNTS,
)

heads: dict[str, st.SearchStrategy[Any]] = {"session_id": IDS, "epoch": LONGS}

DIGESTS = st.integers(0, 2**64 - 1)

# The wire has whole microseconds.
DURATIONS = st.integers(0, 10**12).map(lambda microseconds: microseconds / 1e6)

timings = st.builds(
    messages.Timing, service_s=DURATIONS, step_s=DURATIONS, tokens=COUNTS, sessions=COUNTS
)

steps = heads | {"position": st.integers(8, 2**63 - 1), "digest": DIGESTS}

answers = heads | {"position": LONGS, "cached_prompt_tokens": COUNTS}

STRATEGIES: dict[type, st.SearchStrategy[Any]] = {
    DraftStats: gates,
    TokenLogprob: logprobs,
    SparseProbs: rows(),
    Block: blocks(),
    Verdict: verdicts(),
    DecodingParams: policies,
    Session: sessions(),
    messages.Open: st.builds(
        messages.Open, session=sessions(), epoch=LONGS, lease=TEXTS, traceparent=TEXTS
    ),
    messages.Propose: st.builds(
        messages.Propose,
        **steps,
        count=COUNTS,
        tokens=several(TOKENS),
        until_deferral=st.booleans(),
        ahead=COUNTS,
        floor=PROBABILITIES,
        branches=COUNTS,
    ),
    messages.Judge: st.builds(
        messages.Judge, **steps, block=blocks(), tokens=several(TOKENS), ahead=COUNTS
    ),
    messages.Score: st.builds(
        messages.Score, **heads, lease=TEXTS, tokens=several(TOKENS, 1), top=COUNTS
    ),
    messages.Close: st.builds(messages.Close, **heads),
    messages.Proposal: st.builds(
        messages.Proposal,
        **answers,
        digest=DIGESTS,
        block=blocks(),
        deferred=st.booleans(),
        passes=COUNTS,
        timing=timings,
        branched=st.booleans(),
    ),
    messages.Judgement: st.builds(
        messages.Judgement, **answers, digest=DIGESTS, verdict=verdicts(), timing=timings
    ),
    messages.Scores: st.builds(messages.Scores, **heads, logprobs=several(logprobs, most=3)),
    messages.Need: st.builds(messages.Need, **heads, position=LONGS),
    messages.Refusal: st.builds(messages.Refusal, **heads, code=TEXTS, reason=TEXTS, message=TEXTS),
}

for kind, strategy in STRATEGIES.items():
    st.register_type_strategy(kind, strategy)


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[RecordingTier, TierKind], Awaitable[str]]]:
    """Serve a tier on loopback and return its address."""
    servers: list[TierServer] = []

    async def start(tier: RecordingTier, kind: TierKind) -> str:
        servers.append(TierServer(tier, kind))
        return await servers[-1].start("127.0.0.1:0")

    yield start
    for server in servers:
        await server.stop()


class Line:
    """A TCP relay before an address, to be cut without a goodbye or to fall silent."""

    def __init__(self, host: str, port: int) -> None:
        self.target = host, port
        self.address = ""
        self.silent = False
        self._writers: list[asyncio.StreamWriter] = []
        self._listener: asyncio.Server | None = None

    async def open(self) -> None:
        self._listener = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        host, port = self._listener.sockets[0].getsockname()
        self.address = f"{host}:{port}"

    def cut(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def close(self) -> None:
        self.cut()
        if self._listener is not None:
            self._listener.close()
            await self._listener.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward, back = await asyncio.open_connection(*self.target)
        self._writers += (writer, back)
        await asyncio.gather(self._pump(reader, back), self._pump(onward, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                if not self.silent:
                    writer.write(data)
                    await writer.drain()
        except OSError:
            self.cut()


@pytest.fixture
async def relay() -> AsyncIterator[Callable[[str], Awaitable[Line]]]:
    """Put a line before an address."""
    lines: list[Line] = []

    async def start(address: str) -> Line:
        host, _, port = address.rpartition(":")
        lines.append(Line(host, int(port)))
        await lines[-1].open()
        return lines[-1]

    yield start
    for line in lines:
        await line.close()
