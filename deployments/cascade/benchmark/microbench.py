"""What one step of a tier costs: passes of an engine turned by hand, without router or wire.

A drafter's step runs one token a session and draws the next; an expert's step runs a block a
session and judges it. Sessions keep their length, so every step costs the same.
"""

from __future__ import annotations

import asyncio
import gc
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING

import numpy as np

from cascade.engine import threads
from cascade.engine.engine import Engine
from cascade.engine.model_loader import load
from cascade.engine.request import ForwardRequest
from cascade.engine.settings import EngineSettings
from cascade.local import DirectPeers
from cascade.protocol.client import ReplicaClients
from cascade.protocol.messages import (
    Close,
    Judge,
    Judgement,
    Open,
    Proposal,
    Propose,
    Score,
    Scores,
)
from cascade.protocol.server import TierServer
from cascade.protocol.services import DRAFTER, EXPERT, Description
from cascade.router.leases import FixedLeases
from cascade.router.router import Router, RouterOptions
from cascade.router.tier_session import TierClient
from cascade.speculation.draft import DraftTask, draft_step
from cascade.speculation.draft_length import DraftLengthTuner
from cascade.speculation.payload import ProbsPayload, payload_spec
from cascade.speculation.verify import VerifyTask, rows_needed, verify
from cascade.types import (
    Block,
    Bonus,
    DecodingParams,
    Mode,
    Origin,
    Request,
    SamplingParams,
    SessionId,
    SparseProbs,
    TokenLogprob,
    Verdict,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.request import LogitsOutput
    from cascade.protocol.codec import ClientMessage, ServerMessage
    from cascade.protocol.server import Connection
    from cascade.protocol.services import TierKind

DESCRIPTION = Description(
    model="echo",
    vocab_size=2**31 - 1,
    context_length=2**31 - 1,
    tokenizer_fingerprint="none",
    draft_limit=2**31 - 1,
)


class EchoTier:
    """Drafts token 0 as often as asked, accepts every block whole, scores every token 0 nats."""

    def __init__(self, description: Description = DESCRIPTION) -> None:
        self.description = description
        self.received: asyncio.Queue[tuple[Connection, ClientMessage]] = asyncio.Queue()
        self.ended: asyncio.Queue[Connection] = asyncio.Queue()

    def receive(self, connection: Connection, item: ClientMessage) -> None:
        """Answer the item and note it in `received`."""
        self.received.put_nowait((connection, item))
        answer = echo(item)
        if answer is not None:
            connection.send(answer)

    def disconnected(self, connection: Connection) -> None:
        """Note the end of the stream in `ended`."""
        self.ended.put_nowait(connection)

    def describe(self) -> Description:
        """Return what the tier was made with."""
        return self.description

    @property
    def alive(self) -> bool:
        """Always."""
        return True


def echo(item: ClientMessage) -> ServerMessage | None:
    """Return the answer to an item; `Open` and `Close` have none."""
    match item:
        case Propose(session_id=session_id, epoch=epoch, position=position, count=count):
            return Proposal(
                session_id=session_id,
                epoch=epoch,
                position=position,
                digest=item.digest,
                block=Block(tokens=(0,) * count),
            )
        case Judge(session_id=session_id, epoch=epoch, position=position, block=block):
            verdict = Verdict(
                accepted=block.length, tokens=block.tokens, origins=(Origin.DRAFTER,) * block.length
            )
            return Judgement(
                session_id=session_id,
                epoch=epoch,
                position=position,
                digest=item.digest,
                verdict=verdict,
            )
        case Score(session_id=session_id, epoch=epoch, tokens=tokens):
            logprobs = tuple(TokenLogprob(token=token, logprob=0.0) for token in tokens[1:])
            return Scores(session_id=session_id, epoch=epoch, logprobs=logprobs)
        case Open() | Close():
            return None


BLOCK, BLOCKS = 4, 64  # tokens of a block, blocks of an answer

PAGE_BYTES = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """What was measured, in one process with both tiers."""

    rounds: int
    seconds: float
    cpu_s: float  # of the process, tiers too
    grown_bytes: int  # of resident memory, since the first tenth of the rounds

    @property
    def per_second(self) -> float:
        """Return rounds a second."""
        return self.rounds / self.seconds


class InstantTier:
    """Drafts and accepts at once, and keeps nothing."""

    def receive(self, connection: Connection, item: ClientMessage) -> None:
        """Answer the item."""
        answer = echo(item)
        if answer is not None:
            connection.send(answer)

    def disconnected(self, connection: Connection) -> None:
        """Do nothing: nothing was kept."""

    def describe(self) -> Description:
        """Return what any request fits."""
        return DESCRIPTION

    @property
    def alive(self) -> bool:
        """Always."""
        return True


async def measure_router(*, streams: int, rounds: int, direct: bool = False) -> Rounds:
    """Return what `rounds` rounds or a few more take, `streams` answers at a time.

    Args:
        streams: Answers generated at once.
        rounds: Blocks drafted and judged, at least.
        direct: Call the tiers instead of going over gRPC: the loop alone.
    """
    async with AsyncExitStack() as cleanup:
        router = Router(
            drafters=await _tier(DRAFTER, cleanup, direct=direct),
            experts=await _tier(EXPERT, cleanup, direct=direct),
            automatic=DraftLengthTuner().session,
            options=RouterOptions(),
        )
        done = await _run(router, streams=streams, rounds=rounds // 10)
        gc.collect()
        held_bytes, began_s, cpu_s = _resident_bytes(), time.perf_counter(), time.process_time()
        done = await _run(router, streams=streams, rounds=rounds)
        seconds, cpu_s = time.perf_counter() - began_s, time.process_time() - cpu_s
        gc.collect()
        grown_bytes = _resident_bytes() - held_bytes
    return Rounds(rounds=done, seconds=seconds, cpu_s=cpu_s, grown_bytes=grown_bytes)


async def _tier(kind: TierKind, cleanup: AsyncExitStack, *, direct: bool) -> TierClient:
    tier = InstantTier()
    if direct:
        return TierClient(leases=FixedLeases(["here"], token=""), clients=DirectPeers(tier, kind))
    server = TierServer(tier, kind)
    address = await server.start("127.0.0.1:0")
    cleanup.push_async_callback(server.stop)
    peers = ReplicaClients(kind)
    cleanup.push_async_callback(peers.close)
    return TierClient(leases=FixedLeases([address], token=""), clients=peers)


async def _run(router: Router, *, streams: int, rounds: int) -> int:
    answers = -(-rounds // (streams * BLOCKS))
    counts = await asyncio.gather(*(_stream(router, answers=answers) for _ in range(streams)))
    return sum(counts)


async def _stream(router: Router, *, answers: int) -> int:
    policy = DecodingParams(sampling=SamplingParams(temperature=0.0), bonus=Bonus.NONE)
    request = Request(
        prompt=(1,) * 32,
        policy=policy,
        mode=Mode.SPECULATIVE,
        max_tokens=BLOCK * BLOCKS,
        draft_tokens=BLOCK,
    )
    done = 0
    for _ in range(answers):
        async for _ in router.generate(request):
            done += 1
    return done


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE_BYTES


class Work(StrEnum):
    """What a step does."""

    DRAFT = "draft"
    JUDGE = "judge"


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Steps of one kind, timed."""

    model: str
    work: Work
    sessions: int
    context_tokens: int  # of each session, before the step
    step_tokens: int  # of each session
    step_ms: float  # median: scheduling, forward pass and head
    mean_ms: float
    least_ms: float  # of the quickest step: what a machine of one's own would give
    head_ms: float  # median of drawing or judging alone

    @property
    def head_share(self) -> float:
        """Return the share of a step that is spent on drawing or judging."""
        return self.head_ms / self.step_ms if self.step_ms else 0.0


class Rig:
    """A model's engine, turned by hand.

    Args:
        model: A folder, a repository id or a model in memory.
        work: Whether the model drafts or judges.
        policy: Of every session; sampling at temperature 1, lossless, by default.
        settings: Of the engine.

    Raises:
        UnsupportedModel: There is no such model, or it cannot be served.
    """

    def __init__(
        self,
        model: LoadedModel | str,
        *,
        work: Work = Work.DRAFT,
        policy: DecodingParams | None = None,
        settings: EngineSettings | None = None,
    ) -> None:
        self._settings = settings or EngineSettings()
        if isinstance(model, str):
            model = load(model, device=self._settings.device, dtype=self._settings.dtype)
        self._head = _Head(
            model=model.name,
            work=work,
            policy=policy or DecodingParams(),
            likelihood=1 / (_STANDS * model.vocabulary),
        )
        self._engine = Engine(model, handler=self._head, settings=self._settings)

    def time(
        self, *, sessions: int, context_tokens: int = 128, block_tokens: int = 5, passes: int = 40
    ) -> StepTime:
        """Return what a step costs.

        Args:
            sessions: That step together.
            context_tokens: Tokens of each session before the step.
            block_tokens: Drafted tokens of each block that is judged.
            passes: Timed steps.
        """
        threads.apply(threads=self._settings.threads)
        self._head.block_tokens = block_tokens
        return _time(
            self._engine, self._head, sessions, context_tokens=context_tokens, passes=passes
        )


def measure_step(
    model: LoadedModel | str,
    *,
    work: Work = Work.DRAFT,
    sessions: Sequence[int] = (1, 16),
    policy: DecodingParams | None = None,
    settings: EngineSettings | None = None,
    **more: int,
) -> list[StepTime]:
    """Return what a step costs with each number of sessions; the rest is of `Rig` and its `time`.

    Raises:
        UnsupportedModel: There is no such model, or it cannot be served.
    """
    rig = Rig(model, work=work, policy=policy, settings=settings)
    return [rig.time(sessions=count, **more) for count in sessions]


@dataclass(slots=True, kw_only=True)
class _Head:
    """Draws or judges, and takes the time of it."""

    model: str
    work: Work
    policy: DecodingParams
    block_tokens: int = 5
    likelihood: float = 0.5  # that the drafter is taken to have given its tokens
    seconds: list[float] = field(default_factory=list[float])
    running: bool = True  # whether another step follows

    def step(self, number: int, *, context_tokens: int) -> ForwardRequest:
        """Return one session's step; always the same, so that contexts keep their length."""
        block = tuple((7 * place + number) % _IDS for place in range(self._drafted))
        rows = rows_needed(self.policy, block) if self.work is Work.JUDGE else 1
        return ForwardRequest(
            session=SessionId(str(number)),
            base=context_tokens - 1,
            tokens=(number % _IDS, *block[: rows - 1]),
            num_logits=rows,
            task=Block(
                tokens=block,
                likelihoods=(self.likelihood,) * len(block),
                rows=_rows(self.policy, len(block), likelihood=self.likelihood),
            ),
        )

    @property
    def _drafted(self) -> int:
        return self.block_tokens if self.work is Work.JUDGE else 0

    def finish(self, outputs: Sequence[LogitsOutput], logits_NV: Tensor) -> Sequence[ForwardRequest]:
        """Draw or judge, and ask for the same step again."""
        steps = [one.request for one in outputs if one.request.task is not None]
        if not steps:
            return []
        began_s = time.perf_counter()
        if self.work is Work.JUDGE:
            verify(
                logits_NV,
                [
                    VerifyTask(policy=self.policy, position=step.base, block=step.task)
                    for step in steps
                ],
            )
        else:
            draft_step(
                logits_NV,
                [DraftTask(policy=self.policy, position=s.base, start=s.base) for s in steps],
            )
        self.seconds.append(time.perf_counter() - began_s)
        return steps if self.running else []

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Raise what went wrong."""
        del request
        raise error


def _rows(policy: DecodingParams, count: int, *, likelihood: float) -> tuple[SparseProbs, ...]:
    """Return rows as a drafter ships them, with every entry there, if the policy wants any."""
    if payload_spec(policy).rows is not ProbsPayload.ALL:
        return ()
    ids = np.arange(max(policy.row_entries, _IDS + 1), dtype=np.uint32)
    weights = np.full(len(ids), likelihood, np.float16)
    weights[-1] = 1
    return (SparseProbs(ids=ids, weights=weights),) * count


_WARM = 3  # first steps, that allocate

_IDS = 50  # fewer than any vocabulary has

_STANDS = 0.7  # about the chance of a drafted token, where the judging model knows nothing


def _time(
    engine: Engine, head: _Head, sessions: int, *, context_tokens: int, passes: int
) -> StepTime:
    _fill(engine, sessions, context_tokens=context_tokens)
    steps = [head.step(number, context_tokens=context_tokens) for number in range(sessions)]
    for step in steps:
        engine.submit(step)
    head.running = True
    for _ in range(_WARM):
        engine.step()
    head.seconds.clear()
    taken_s = [_turn(engine) for _ in range(passes)]
    head_s = list(head.seconds)
    head.running = False
    engine.step()
    for step in steps:
        engine.release(step.session)
    return StepTime(
        model=head.model,
        work=head.work,
        sessions=sessions,
        context_tokens=context_tokens,
        step_tokens=len(steps[0].tokens),
        step_ms=median(taken_s) * 1e3,
        mean_ms=fmean(taken_s) * 1e3,
        least_ms=min(taken_s) * 1e3,
        head_ms=median(head_s) * 1e3,
    )


def _fill(engine: Engine, sessions: int, *, context_tokens: int) -> None:
    """Put every session's context into the cache."""
    for number in range(sessions):
        tokens = [(3 * place + number) % _IDS for place in range(context_tokens)]
        engine.submit(ForwardRequest(session=SessionId(str(number)), base=0, tokens=tokens, num_logits=0))
    engine.step()
    while engine.stats().waiting:
        engine.step()


def _turn(engine: Engine) -> float:
    began_s = time.perf_counter()
    engine.step()
    return time.perf_counter() - began_s
