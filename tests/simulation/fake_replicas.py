"""Real drafters and experts on a fake engine, whose logits are a checksum of all tokens so far.

Both models are deterministic functions of that checksum, so the simulator can tell from the tokens
and their origins alone whether an answer is right.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import chain, islice, zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zlib import crc32

from cascade.drafter.drafter import Drafter
from cascade.engine.request import LogitsOutput
from cascade.engine.stats import ForwardPass
from cascade.errors import InvalidRequest, Overloaded
from cascade.expert.expert import Expert
from cascade.protocol.messages import Open
from cascade.replica.options import ReplicaOptions
from cascade.rules import Lossless
from cascade.speculation.confidence import TokenConfidence
from cascade.speculation.draft import DraftToken
from cascade.speculation.verify import live_length, rows_needed
from cascade.types import DraftStats, Origin, SessionId, Verdict

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from cascade.engine.request import ForwardRequest, LogitsHandler
    from cascade.protocol.server import Connection
    from cascade.replica.session import ReplicaSession
    from cascade.speculation.verify import VerifyTask

VOCABULARY = 9
STOP = 0
CONTEXT = 64
HANG_S = 5.0  # an engine that runs nothing for so long counts as hanging


def expert_token(checksum: int) -> int:
    """Return the expert's next token."""
    return checksum % VOCABULARY


def drafter_token(checksum: int) -> int:
    """Return the drafter's next token: the expert's in three cases of four."""
    return (checksum + (checksum >> 8) % 4 // 3) % VOCABULARY


def rule_keeps(checksum: int) -> bool:
    """Return whether a lossy rule keeps the drafter's token there."""
    return (checksum >> 12) % 3 == 0


def first_wrong(
    prompt: Sequence[int], written: Sequence[tuple[int, Origin]], *, keeping: bool
) -> int:
    """Return the index of the first token that its origin could not have produced, or -1.

    Args:
        prompt: The tokens before.
        written: Tokens and their origins.
        keeping: Any token of the drafter may be kept.
    """
    text = bytes(prompt)
    for index, (token, origin) in enumerate(written):
        checksum = crc32(text)
        by_drafter, by_expert = token == drafter_token(checksum), token == expert_token(checksum)
        possible = {
            Origin.DRAFTER: by_drafter and by_expert,
            Origin.KEPT: by_drafter and (keeping or rule_keeps(checksum)),
            Origin.EXPERT: by_expert,
        }
        if not possible[origin]:
            return index
        text += bytes((token,))
    return -1


@dataclass(eq=False, kw_only=True)
class SimEngine:
    """Remembers the tokens of each session; a request takes random time and may find no space."""

    handler: LogitsHandler
    rng: Random
    step_s: float  # mean
    full_prob: float  # that a new session or branch finds no cache space
    limit_tokens: int = CONTEXT
    limit_source: int = 0
    cache: dict[str, bytearray] = field(default_factory=dict[str, bytearray])
    parents: dict[str, str] = field(default_factory=dict[str, str])  # of branches
    timers: dict[str, asyncio.TimerHandle] = field(default_factory=dict[str, asyncio.TimerHandle])
    waiting: dict[str, ForwardRequest] = field(default_factory=dict["str", "ForwardRequest"])
    current_pass: ForwardPass = field(default_factory=ForwardPass)
    stalled_until_s: float = 0.0
    stalled_since_s: float = 0.0
    alive: bool = True
    decodes_ahead: bool = False
    reads_each: bool = False

    def stall(self, *, for_s: float) -> None:
        """Run nothing for a while."""
        self.stalled_since_s = asyncio.get_running_loop().time()
        self.stalled_until_s = self.stalled_since_s + for_s

    @property
    def working_s(self) -> float:
        now_s = asyncio.get_running_loop().time()
        stalled = self.timers and now_s < self.stalled_until_s
        return now_s - self.stalled_since_s if stalled else 0.0

    def submit(self, request: ForwardRequest) -> None:
        assert request.session not in self.timers, "one request of a session at a time"
        loop = asyncio.get_running_loop()
        begins_s = max(loop.time(), self.stalled_until_s)
        takes_s = self.step_s * self.rng.expovariate(1)
        if request.parent is not None and not self._branch(request):
            loop.call_soon_threadsafe(self.handler.fail, request, Overloaded("no space"))
            return
        self.waiting[request.session] = request
        self.timers[request.session] = loop.call_at(begins_s + takes_s, self._run, request)

    @property
    def spare(self) -> float:
        return self.rng.choice((0.0, 0.5, 1.0))

    def _branch(self, request: ForwardRequest) -> bool:
        parent = self.cache.get(str(request.parent), b"")
        if len(parent) < request.base or self.rng.random() < self.full_prob:
            return False
        self.cache[request.session] = bytearray(parent[: request.base])
        self.parents[request.session] = str(request.parent)
        return True

    def adopt(self, session: str, *, branch: str) -> None:
        if branch not in self.cache:
            return
        self._cancel(session)
        self.cache[session] = self.cache.pop(branch)
        del self.parents[branch]
        if timer := self.timers.pop(branch, None):
            request = self.waiting.pop(branch)
            request.session = SessionId(session)
            self.waiting[session], self.timers[session] = request, timer

    def release(self, session: str) -> None:
        for branch in [branch for branch, parent in self.parents.items() if parent == session]:
            self.release(branch)
        self._cancel(session)
        self.parents.pop(session, None)
        self.cache.pop(session, None)

    def _cancel(self, session: str) -> None:
        self.waiting.pop(session, None)
        if timer := self.timers.pop(session, None):
            timer.cancel()

    def stop(self) -> None:
        for timer in self.timers.values():
            timer.cancel()

    def cached_tokens(self, session: str) -> int:
        del session
        return 0

    def taken_s(self, session: str) -> float:
        del session
        return 0.0

    def _run(self, request: ForwardRequest) -> None:
        del self.timers[request.session], self.waiting[request.session]
        text = self.cache.setdefault(request.session, bytearray())
        if not text and self.rng.random() < self.full_prob:
            del self.cache[request.session]
            self.handler.fail(request, Overloaded("no space"))
            return
        if not 0 <= request.base <= len(text):
            error = InvalidRequest(f"{request.base} of {len(text)} tokens cannot be kept")
            self.handler.fail(request, error)
            return
        text[request.base :] = bytes(request.tokens)
        position = len(text) - request.num_logits
        logits: Any = [crc32(text[:end]) for end in range(position + 1, len(text) + 1)]
        count = request.num_logits
        output = LogitsOutput(request=request, first=0, count=count, position=position)
        for next_request in self.handler.finish([output], logits):
            self.submit(next_request)


class _SimReplica:
    """What both tiers share."""

    engine: Any
    violations: list[str]  # of the protocol
    _sessions: dict[Any, ReplicaSession]
    clock = staticmethod(lambda: asyncio.get_running_loop().time())

    def __init__(
        self, rng: Random, *, step_s: float, full_prob: float, violations: list[str]
    ) -> None:
        self.violations = violations
        self._rng = rng
        self._step_s = step_s
        self._full_prob = full_prob
        model: Any = SimpleNamespace(vocabulary=VOCABULARY)
        tokenizer: Any = SimpleNamespace(size=VOCABULARY, tokens={})
        options = ReplicaOptions(model="fake", pass_timeout_s=HANG_S)
        super().__init__(model, tokenizer, options, token=None)  # pyright: ignore[reportCallIssue] - that of a replica

    def receive(self, connection: Connection, message: Any) -> None:
        """Serve a message; the server should have stopped one of an old epoch."""
        if not isinstance(message, Open):
            session = self._sessions.get((connection, message.session_id))
            if session is not None and session.epoch != message.epoch:
                self.violations.append(
                    f"a message of epoch {message.epoch} reached a session of epoch {session.epoch}"
                )
        super().receive(connection, message)  # pyright: ignore[reportAttributeAccessIssue] - as above

    def make_engine(self, model: Any, settings: Any) -> Any:
        del model, settings
        handler: Any = self
        return SimEngine(
            handler=handler, rng=self._rng, step_s=self._step_s, full_prob=self._full_prob
        )


class SimDrafter(_SimReplica, Drafter):
    def draft(self, logits_NV: Any, tasks: Sequence[Any]) -> Sequence[DraftToken]:
        return [_draft(checksum) for checksum, _ in zip(logits_NV, tasks, strict=True)]


class SimExpert(_SimReplica, Expert):
    def verify_blocks(self, logits: Sequence[Any], tasks: Sequence[VerifyTask]) -> list[Verdict]:
        rows = chain.from_iterable(logits)
        counts = [rows_needed(task.policy, task.block.tokens) for task in tasks]
        return [
            _verdict([*islice(rows, count)], task)
            for count, task in zip(counts, tasks, strict=True)
        ]


def _draft(checksum: int) -> DraftToken:
    token, other = drafter_token(checksum), (checksum + 1) % VOCABULARY
    runner_up = expert_token(checksum) if expert_token(checksum) != token else other
    return DraftToken(
        token=token,
        draft_stats=DraftStats(max_prob=float(rule_keeps(checksum)), argmax=token, entropy=0.0),
        confidence=TokenConfidence(probability=0.5, runner_up=runner_up, runner_up_share=0.5),
    )


def _verdict(checksums: Sequence[int], task: VerifyTask) -> Verdict:
    """Verify greedily; any rule but lossless keeps tokens where `rule_keeps` says so."""
    tokens: list[int] = []
    origins: list[Origin] = []
    lossless = isinstance(task.policy.rule, Lossless)
    for checksum, drafted in zip_longest(checksums, task.block.tokens[: len(checksums)]):
        own = expert_token(checksum)
        if drafted == own:
            tokens.append(own)
            origins.append(Origin.DRAFTER)
        elif drafted is not None and rule_keeps(checksum) and not lossless:
            tokens.append(drafted)
            origins.append(Origin.KEPT)
        else:
            tokens.append(own)
            origins.append(Origin.EXPERT)
            break
    accepted = len(tokens) - (Origin.EXPERT in origins)
    judged = min(accepted + 1, live_length(task.policy, task.block.tokens))
    return Verdict(
        accepted=accepted,
        tokens=tuple(tokens),
        origins=tuple(origins),
        judged=judged,
        deferred=judged - accepted,
    )
