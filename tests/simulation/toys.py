"""Replicas as they are, but for their engines: the law of a token is a checksum of what was fed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import zip_longest
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zlib import crc32

from cascade.drafter.drafter import Drafter
from cascade.engine.request import LogitsOutput
from cascade.engine.stats import ForwardPass
from cascade.errors import InvalidRequest, Overloaded
from cascade.expert.expert import Expert
from cascade.protocol.messages import Open
from cascade.replica.replica import ReplicaOptions
from cascade.rules import Lossless
from cascade.speculation.confidence import TokenConfidence
from cascade.speculation.draft import DraftToken
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
HANGS_S = 5.0  # an engine that runs nothing for so long


def expert_token(row: int) -> int:
    """Return what the expert writes where what was fed has this checksum."""
    return row % VOCABULARY


def drafter_token(row: int) -> int:
    """Return what the drafter writes there: three times in four the same."""
    return (row + (row >> 8) % 4 // 3) % VOCABULARY


def keeps(row: int) -> bool:
    """Return whether a rule that keeps tokens keeps the drafter's there."""
    return (row >> 12) % 3 == 0


def unlawful(prompt: Sequence[int], written: Sequence[tuple[int, Origin]], *, keeping: bool) -> int:
    """Return the first place of a token that its origin could not have written, or -1.

    Args:
        prompt: What the tokens follow.
        written: Tokens and who wrote each.
        keeping: Whether the drafter's tokens may stand wherever it writes.
    """
    text = bytes(prompt)
    for place, (token, origin) in enumerate(written):
        row = crc32(text)
        drafted, judged = token == drafter_token(row), token == expert_token(row)
        lawful = {
            Origin.DRAFTER: drafted and judged,
            Origin.KEPT: drafted and (keeping or keeps(row)),
            Origin.EXPERT: judged,
        }
        if not lawful[origin]:
            return place
        text += bytes((token,))
    return -1


@dataclass(eq=False, kw_only=True)
class ToyEngine:
    """Keeps what each session was fed; a step takes a while, and some have no room."""

    head: LogitsHandler
    chance: Random
    step_s: float
    full: float  # chance that a new session finds no room, or a branch
    limit_tokens: int = CONTEXT
    fed: dict[str, bytearray] = field(default_factory=dict[str, bytearray])
    trunks: dict[str, str] = field(default_factory=dict[str, str])  # of branches
    waiting: dict[str, asyncio.TimerHandle] = field(default_factory=dict[str, asyncio.TimerHandle])
    steps: dict[str, ForwardRequest] = field(
        default_factory=dict["str", "ForwardRequest"]
    )  # that wait
    current_pass: ForwardPass = field(default_factory=ForwardPass)
    stalled_until_s: float = 0.0
    stalled_since_s: float = 0.0
    alive: bool = True

    def stall(self, *, for_s: float) -> None:
        """Run nothing for a while."""
        self.stalled_since_s = asyncio.get_running_loop().time()
        self.stalled_until_s = self.stalled_since_s + for_s

    @property
    def working_s(self) -> float:
        now_s = asyncio.get_running_loop().time()
        stalled = self.waiting and now_s < self.stalled_until_s
        return now_s - self.stalled_since_s if stalled else 0.0

    def submit(self, step: ForwardRequest) -> None:
        assert step.session not in self.waiting, "one step in flight"
        loop = asyncio.get_running_loop()
        begins_s = max(loop.time(), self.stalled_until_s)
        takes_s = self.step_s * self.chance.expovariate(1)
        if step.parent is not None and not self._branch(step):
            loop.call_soon_threadsafe(self.head.fail, step, Overloaded("no room"))
            return
        self.steps[step.session] = step
        self.waiting[step.session] = loop.call_at(begins_s + takes_s, self._run, step)

    @property
    def spare(self) -> float:
        return self.chance.choice((0.0, 0.5, 1.0))

    def _branch(self, step: ForwardRequest) -> bool:
        trunk = self.fed.get(str(step.parent), b"")
        if len(trunk) < step.base or self.chance.random() < self.full:
            return False
        self.fed[step.session] = bytearray(trunk[: step.base])
        self.trunks[step.session] = str(step.parent)
        return True

    def adopt(self, session: str, *, branch: str) -> None:
        if branch not in self.fed:
            return
        self._cancel(session)
        self.fed[session] = self.fed.pop(branch)
        del self.trunks[branch]
        if timer := self.waiting.pop(branch, None):
            step = self.steps.pop(branch)
            step.session = SessionId(session)
            self.steps[session], self.waiting[session] = step, timer

    def release(self, session: str) -> None:
        for name in [one for one, trunk in self.trunks.items() if trunk == session]:
            self.release(name)
        self._cancel(session)
        self.trunks.pop(session, None)
        self.fed.pop(session, None)

    def _cancel(self, session: str) -> None:
        self.steps.pop(session, None)
        if timer := self.waiting.pop(session, None):
            timer.cancel()

    def stop(self) -> None:
        for timer in self.waiting.values():
            timer.cancel()

    def cached_tokens(self, session: str) -> int:
        del session
        return 0

    def _run(self, step: ForwardRequest) -> None:
        del self.waiting[step.session], self.steps[step.session]
        text = self.fed.setdefault(step.session, bytearray())
        if not text and self.chance.random() < self.full:
            del self.fed[step.session]
            self.head.fail(step, Overloaded("no room"))
            return
        if not 0 <= step.base <= len(text):
            self.head.fail(step, InvalidRequest(f"{step.base} of {len(text)} cannot be kept"))
            return
        text[step.base :] = bytes(step.tokens)
        first = len(text) - step.num_logits
        rows: Any = [crc32(text[:end]) for end in range(first + 1, len(text) + 1)]
        ready = LogitsOutput(request=step, first=0, count=step.num_logits, position=first)
        for follow in self.head.finish([ready], rows):
            self.submit(follow)


class _Toy:
    """What both tiers' toys share."""

    engine: Any
    broken: list[str]  # what should not have happened
    _sessions: dict[Any, ReplicaSession]
    clock = staticmethod(lambda: asyncio.get_running_loop().time())

    def __init__(self, chance: Random, *, step_s: float, full: float, broken: list[str]) -> None:
        self.broken = broken
        self._chance = chance
        self._step_s = step_s
        self._full = full
        model: Any = SimpleNamespace(vocabulary=VOCABULARY)
        tokenizer: Any = SimpleNamespace(size=VOCABULARY, tokens={})
        options = ReplicaOptions(model="toy", pass_timeout_s=HANGS_S)
        super().__init__(model, tokenizer, options, token=None)  # pyright: ignore[reportCallIssue] - that of a replica

    def receive(self, connection: Connection, message: Any) -> None:
        """Serve a message; one of an old epoch should have been stopped before."""
        if not isinstance(message, Open):
            seat = self._sessions.get((connection, message.session_id))
            if seat is not None and seat.epoch != message.epoch:
                self.broken.append(f"epoch {message.epoch} reached a seat of epoch {seat.epoch}")
        super().receive(connection, message)  # pyright: ignore[reportAttributeAccessIssue] - as above

    def make_engine(self, model: Any, settings: Any) -> Any:
        del model, settings
        head: Any = self
        return ToyEngine(head=head, chance=self._chance, step_s=self._step_s, full=self._full)


class ToyDrafter(_Toy, Drafter):
    def draft(self, logits_NV: Any, tasks: Sequence[Any]) -> Sequence[DraftToken]:
        return [_draft(row) for row, _ in zip(logits_NV, tasks, strict=True)]


class ToyExpert(_Toy, Expert):
    def verdicts(self, rows: Sequence[Any], tasks: Sequence[VerifyTask]) -> Sequence[Verdict]:
        return [_verdict(own, task) for own, task in zip(rows, tasks, strict=True)]


def _draft(row: int) -> DraftToken:
    token, other = drafter_token(row), (row + 1) % VOCABULARY
    rival = expert_token(row) if expert_token(row) != token else other
    return DraftToken(
        token=token,
        draft_stats=DraftStats(max_prob=float(keeps(row)), argmax=token, entropy=0.0),
        confidence=TokenConfidence(probability=0.5, runner_up=rival, runner_up_share=0.5),
    )


def _verdict(rows: Sequence[int], task: VerifyTask) -> Verdict:
    """Judge greedily; any rule but lossless keeps where `keeps` says so."""
    tokens: list[int] = []
    origins: list[Origin] = []
    lossless = isinstance(task.policy.rule, Lossless)
    for row, drafted in zip_longest(rows, task.block.tokens[: len(rows)]):
        own = expert_token(row)
        if drafted == own:
            tokens.append(own)
            origins.append(Origin.DRAFTER)
        elif drafted is not None and keeps(row) and not lossless:
            tokens.append(drafted)
            origins.append(Origin.KEPT)
        else:
            tokens.append(own)
            origins.append(Origin.EXPERT)
            break
    accepted = len(tokens) - (Origin.EXPERT in origins)
    return Verdict(accepted=accepted, tokens=tuple(tokens), origins=tuple(origins))
