"""Microbenchmarks: the router alone, one engine step of a tier alone, and the size of drafts.

The router runs over tiers that answer at once. An engine step runs without router or gRPC: a
drafter's step runs one token per session and draws the next, an expert's step runs one block per
session and verifies it. Sessions keep their length, so every step does the same work.
"""

from __future__ import annotations

import asyncio
import gc
import os
import time
import timeit
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cascade.engine import threads
from cascade.engine.engine import Engine
from cascade.engine.model_loader import load
from cascade.engine.request import NOBODYS, ForwardRequest
from cascade.engine.settings import EngineSettings
from cascade.protocol.client import ReplicaClients
from cascade.protocol.convert import encode_block
from cascade.protocol.messages import Judge, Judgement, Proposal, Propose, Score, Scores
from cascade.protocol.server import TierServer
from cascade.protocol.services import DRAFTER, EXPERT, Description
from cascade.router.leases import FixedLeases
from cascade.router.router import Router, RouterOptions
from cascade.router.tier_session import TierClient
from cascade.sampling.token_mask import allowed_bits
from cascade.speculation.draft import DraftTask, block_of, draft_step
from cascade.speculation.draft_length import DraftLengthTuner
from cascade.speculation.payload import payload_spec
from cascade.speculation.verify import VerifyTask, rows_needed, verify
from cascade.speculation.verify_batch import mask_blocks
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
from cascade.v1 import tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor

    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.request import LogitsOutput
    from cascade.protocol.codec import ClientMessage
    from cascade.protocol.server import Connection
    from cascade.protocol.services import TierKind
    from cascade.structured.grammar import GrammarCompiler
    from cascade.types import Grammar

DESCRIPTION = Description(
    model="instant",
    vocab_size=2**31 - 1,
    context_length=2**31 - 1,
    tokenizer_fingerprint="none",
    draft_limit=2**31 - 1,
)

BLOCK, BLOCKS = 4, 64  # tokens of a block, blocks of an answer

_WARM_UP_STEPS = 3  # which allocate memory
_TOKENS = 50  # fewer than any vocabulary has
_ACCEPTANCE = 0.7  # about the chance of a drafted token if the verifying model is uniform


class InstantTier:
    """Answers at once: drafts token 0, accepts every block whole, scores every token 0 nats."""

    def __init__(self, description: Description = DESCRIPTION) -> None:
        self.description = description

    def receive(self, connection: Connection, message: ClientMessage) -> None:
        """Answer a message; `Open` and `Close` have no answer."""
        match message:
            case Propose():
                answer = Proposal(
                    session_id=message.session_id,
                    epoch=message.epoch,
                    position=message.position,
                    digest=message.digest,
                    block=Block(tokens=(0,) * message.count),
                )
            case Judge(block=block):
                origins = (Origin.DRAFTER,) * block.length
                answer = Judgement(
                    session_id=message.session_id,
                    epoch=message.epoch,
                    position=message.position,
                    digest=message.digest,
                    verdict=Verdict(accepted=block.length, tokens=block.tokens, origins=origins),
                )
            case Score():
                logprobs = tuple(TokenLogprob(token=t, logprob=0.0) for t in message.tokens[1:])
                answer = Scores(
                    session_id=message.session_id, epoch=message.epoch, logprobs=logprobs
                )
            case _:
                return
        connection.send(answer)

    def disconnected(self, connection: Connection) -> None:
        """Do nothing: there is no session to free."""

    def describe(self) -> Description:
        """Return what the tier was made with."""
        return self.description

    def authenticate(self, lease: str) -> None:
        """Let any token in."""

    @property
    def alive(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterSpeed:
    """Rounds of the router, with both tiers in the same process."""

    rounds: int
    seconds: float
    grown_bytes: int  # of resident memory, since the first tenth of the rounds

    @property
    def per_second(self) -> float:
        """Return rounds per second."""
        return self.rounds / self.seconds


async def measure_router(*, streams: int, rounds: int) -> RouterSpeed:
    """Time the router's loop.

    Args:
        streams: Answers generated at once.
        rounds: Blocks drafted and verified, at least.
    """
    async with AsyncExitStack() as cleanup:
        router = Router(
            drafters=await _instant_tier(DRAFTER, cleanup),
            experts=await _instant_tier(EXPERT, cleanup),
            automatic=DraftLengthTuner().session,
            options=RouterOptions(),
        )
        await _generate(router, streams=streams, rounds=rounds // 10)
        before_bytes, began_s = _resident_bytes(), time.perf_counter()
        done = await _generate(router, streams=streams, rounds=rounds)
        seconds = time.perf_counter() - began_s
        grown_bytes = _resident_bytes() - before_bytes
    return RouterSpeed(rounds=done, seconds=seconds, grown_bytes=grown_bytes)


async def _instant_tier(kind: TierKind, cleanup: AsyncExitStack) -> TierClient:
    server, clients = TierServer(InstantTier(), kind), ReplicaClients(kind)
    address = await server.start("127.0.0.1:0")
    cleanup.push_async_callback(server.stop)
    cleanup.push_async_callback(clients.close)
    return TierClient(leases=FixedLeases([address], token=""), clients=clients)


async def _generate(router: Router, *, streams: int, rounds: int) -> int:
    request = Request(
        prompt=(1,) * 32,
        policy=DecodingParams(sampling=SamplingParams(temperature=0.0), bonus=Bonus.NONE),
        mode=Mode.SPECULATIVE,
        max_tokens=BLOCK * BLOCKS,
        draft_tokens=BLOCK,
    )

    async def stream() -> int:
        answers = -(-rounds // (streams * BLOCKS))
        return sum([1 for _ in range(answers) async for _ in router.generate(request)])

    return sum(await asyncio.gather(*(stream() for _ in range(streams))))


def _resident_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@torch.inference_mode()
def greedy_logits(
    model: LoadedModel, prompts: Sequence[Sequence[int]], *, tokens: int = 16
) -> list[torch.Tensor]:
    """Return the logits [B, V] of each greedy answer of a model.

    Args:
        model: The drafter.
        prompts: Token ids.
        tokens: Of each answer, at most.
    """
    network: Any = model.model
    found: list[torch.Tensor] = []
    for prompt in prompts:
        text = network.generate(
            torch.tensor([prompt]), max_new_tokens=tokens, do_sample=False, use_cache=True
        )
        found.append(network(text).logits[0, len(prompt) - 1 : -1, : model.vocabulary])
    return found


@torch.inference_mode()
def draft_bytes(logits: Iterable[torch.Tensor], *, policy: DecodingParams) -> float:
    """Return the mean bytes of a drafted token in a message.

    Args:
        logits: What `greedy_logits` returned; a token is drafted at each position.
        policy: What decides how much of a distribution is sent.
    """
    sizes: list[int] = []
    for logits_BV in logits:
        positions = range(len(logits_BV))
        tasks = [DraftTask(policy=policy, position=i, block_start=i) for i in positions]
        for draft in draft_step(logits_BV, tasks):
            proto = tokens_pb2.Block()
            encode_block(block_of([draft]), proto)
            sizes.append(proto.ByteSize())
    return fmean(sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """The time of one kind of step."""

    step_tokens: int  # of each session
    step_ms: float  # median: scheduling, forward pass and logits handler
    mean_ms: float
    handler_ms: float  # median of drawing or verifying alone
    mask_ms: float = 0.0  # median of finding and applying the masks of a grammar, a part of it

    @property
    def handler_share(self) -> float:
        """Return the share of a step that is spent on drawing or verifying."""
        return self.handler_ms / self.step_ms if self.step_ms else 0.0

    @property
    def mask_share(self) -> float:
        """Return the share of a step that is spent on masks."""
        return self.mask_ms / self.step_ms if self.step_ms else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarText:
    """A text that matches a grammar, of which sessions judge different blocks."""

    compiler: GrammarCompiler
    grammar: Grammar
    tokens: Sequence[int]

    @classmethod
    def random(cls, compiler: GrammarCompiler, grammar: Grammar, *, length: int) -> GrammarText:
        """Return a text of random tokens that may follow.

        Args:
            compiler: Of the vocabulary.
            grammar: What the text matches; nothing that ends before `length`.
            length: Tokens of the text.
        """
        mask, rng, tokens = compiler.mask(grammar, ()), np.random.default_rng(0), list[int]()
        while len(tokens) < length:
            bits_1W = allowed_bits([mask], tokens, stop_ids=(), vocabulary=compiler.vocabulary)
            assert bits_1W is not None, "the grammar has not ended"
            flags = np.unpackbits(bits_1W.view(np.uint8), bitorder="little")
            tokens.append(int(rng.choice(np.flatnonzero(flags))))
        return cls(compiler=compiler, grammar=grammar, tokens=tokens)


class StepBenchmark:
    """Runs the steps of an engine by hand; it is the engine's logits handler.

    Args:
        model: A folder, a repository id or a model in memory.
        policy: Of every session; by default sampling at temperature 1, lossless.
        settings: Of the engine.
        text: If given, blocks to verify are parts of it, and have its grammar's masks.

    Raises:
        UnsupportedModel: There is no such model, or it cannot be served.
    """

    def __init__(
        self,
        model: LoadedModel | str,
        *,
        policy: DecodingParams | None = None,
        settings: EngineSettings | None = None,
        text: GrammarText | None = None,
    ) -> None:
        self._settings = settings or EngineSettings()
        self._text = text
        if isinstance(model, str):
            model = load(model, device=self._settings.device, dtype=self._settings.dtype)
        self._policy = policy or DecodingParams()
        self._likelihood = 1 / (_ACCEPTANCE * model.vocabulary)
        self._verifying = False
        self._repeat = False  # whether the same step follows
        self._handler_s: list[float] = []
        self._mask_s: list[float] = []
        self._engine = Engine(model, handler=self, settings=self._settings)

    def time(
        self,
        *,
        sessions: int,
        block_tokens: int | None = None,
        context_tokens: int = 128,
        passes: int = 40,
    ) -> StepTime:
        """Time a step.

        Args:
            sessions: Sessions in each step.
            block_tokens: Drafted tokens of each block to verify; if absent, a token is drafted.
            context_tokens: Tokens of each session before the step.
            passes: Number of timed steps.
        """
        threads.apply(threads=self._settings.threads)
        self._verifying = block_tokens is not None
        steps = [
            self._step(
                number,
                context_tokens=context_tokens,
                task=self._task(number, context_tokens, block_tokens, sessions=sessions),
            )
            for number in range(sessions)
        ]
        for number, step in enumerate(steps):
            context = [(3 * position + number) % _TOKENS for position in range(context_tokens)]
            self._engine.submit(
                ForwardRequest(
                    share=NOBODYS, session=step.session, base=0, tokens=context, num_logits=0
                )
            )
        self._engine.step()
        while self._engine.stats().waiting:
            self._engine.step()
        for step in steps:
            self._engine.submit(step)
        self._repeat = True
        for _ in range(_WARM_UP_STEPS):
            self._engine.step()
        self._handler_s.clear()
        self._mask_s.clear()
        step_s = timeit.repeat(self._engine.step, number=1, repeat=passes)
        handler_s, mask_s = list(self._handler_s), list(self._mask_s)
        self._repeat = False
        self._engine.step()
        for step in steps:
            self._engine.release(step.session)
        return StepTime(
            step_tokens=len(steps[0].tokens),
            step_ms=1e3 * median(step_s),
            mean_ms=1e3 * fmean(step_s),
            handler_ms=1e3 * median(handler_s),
            mask_ms=1e3 * median(mask_s or [0.0]),
        )

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Draw or verify, and request the same step again."""
        steps = [one.request for one in outputs if one.request.task is not None]
        if not steps:
            return []
        tasks = [step.task for step in steps]
        began_s = time.perf_counter()
        if self._verifying:
            if self._text is not None:
                _, tasks = mask_blocks(logits_NV, tasks)
                self._mask_s.append(time.perf_counter() - began_s)
                tasks = [replace(task, masks=()) for task in tasks]
            verify(logits_NV, tasks)
        else:
            draft_step(logits_NV, tasks)
        self._handler_s.append(time.perf_counter() - began_s)
        return steps if self._repeat else []

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Raise the error of a step."""
        del request
        raise error

    def _step(
        self, number: int, *, context_tokens: int, task: VerifyTask | DraftTask
    ) -> ForwardRequest:
        """Return the step of one session: always the same, so that contexts keep their length."""
        drafted = task.block.tokens if isinstance(task, VerifyTask) else ()
        num_logits = rows_needed(self._policy, drafted) if drafted else 1
        return ForwardRequest(
            share=NOBODYS,
            session=SessionId(str(number)),
            base=context_tokens - 1,
            tokens=(number % _TOKENS, *drafted[: num_logits - 1]),
            num_logits=num_logits,
            task=task,
        )

    def _task(
        self, number: int, context_tokens: int, block_tokens: int | None, *, sessions: int
    ) -> VerifyTask | DraftTask:
        """Return the task of one session: a block to verify, or a token to draft."""
        policy, position = self._policy, context_tokens - 1
        if block_tokens is None:
            return DraftTask(policy=policy, position=position, block_start=position)
        if self._text is None:
            tokens = [7 * index % _TOKENS for index in range(block_tokens)]
            return VerifyTask(policy=policy, position=position, block=self._block(tokens))
        text = self._text.tokens
        start = number * (len(text) - block_tokens) // sessions
        return VerifyTask(
            policy=policy,
            position=position,
            block=self._block(text[start : start + block_tokens]),
            answer=text[:start],
            masks=(self._text.compiler.mask(self._text.grammar, ()),),
        )

    def _block(self, tokens: Sequence[int]) -> Block:
        """Return a drafted block, with as many probabilities as a drafter sends."""
        probs = list[SparseProbs]()
        if payload_spec(self._policy).probs:
            ids = np.arange(max(self._policy.row_entries, _TOKENS + 1), dtype=np.uint32)
            weights = np.full(len(ids), self._likelihood, np.float16)
            weights[-1] = 1
            for token in tokens:
                own = ids if token < len(ids) else np.array([token, *ids[1:]], np.uint32)
                probs.append(SparseProbs(ids=own, weights=weights))
        return Block(
            tokens=tuple(tokens),
            likelihoods=(self._likelihood,) * len(tokens),
            draft_probs=tuple(probs),
        )
