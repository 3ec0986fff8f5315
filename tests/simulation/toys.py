"""Replicas as they are, but for their engines: the law of a token is a checksum of what was fed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from zlib import crc32

from cascade.decoding.drafting import Draft
from cascade.decoding.session import Origin, Verdict
from cascade.drafter import Drafter
from cascade.engine.stats import Pass
from cascade.engine.step import Ready
from cascade.errors import InvalidRequest, Overloaded
from cascade.expert import Expert
from cascade.operations.options import ReplicaOptions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

    from cascade.decoding.verification import Task
    from cascade.engine.step import Head, Step

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


def answer(prompt: Sequence[int], *, limit: int, stop_ids: Sequence[int]) -> tuple[int, ...]:
    """Return what the expert writes alone."""
    text = list(prompt)
    while len(text) < len(prompt) + limit:
        text.append(expert_token(crc32(bytes(text))))
        if text[-1] in stop_ids:
            break
    return tuple(text[len(prompt) :])


@dataclass(eq=False, kw_only=True)
class ToyEngine:
    """Keeps what each session was fed; a step takes a while, and some have no room."""

    head: Head
    chance: Random
    step_s: float
    full: float  # chance that a new session finds no room
    limit_tokens: int = CONTEXT
    fed: dict[str, bytearray] = field(default_factory=dict[str, bytearray])
    waiting: dict[str, asyncio.TimerHandle] = field(default_factory=dict[str, asyncio.TimerHandle])
    current: Pass = field(default_factory=Pass)
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

    def submit(self, step: Step) -> None:
        assert step.session not in self.waiting, "one step in flight"
        loop = asyncio.get_running_loop()
        begins_s = max(loop.time(), self.stalled_until_s)
        takes_s = self.step_s * self.chance.expovariate(1)
        self.waiting[step.session] = loop.call_at(begins_s + takes_s, self._run, step)

    def release(self, session: str) -> None:
        if timer := self.waiting.pop(session, None):
            timer.cancel()
        self.fed.pop(session, None)

    def stop(self) -> None:
        for timer in self.waiting.values():
            timer.cancel()

    def cached_tokens(self, session: str) -> int:
        del session
        return 0

    def _run(self, step: Step) -> None:
        del self.waiting[step.session]
        text = self.fed.setdefault(step.session, bytearray())
        if not text and self.chance.random() < self.full:
            del self.fed[step.session]
            self.head.fail(step, Overloaded("no room"))
            return
        if not 0 <= step.base <= len(text):
            self.head.fail(step, InvalidRequest(f"{step.base} of {len(text)} cannot be kept"))
            return
        text[step.base :] = bytes(step.tokens)
        first = len(text) - step.rows
        rows: Any = [crc32(text[:end]) for end in range(first + 1, len(text) + 1)]
        ready = Ready(step=step, first=0, count=step.rows, index=first)
        for follow in self.head.finish([ready], rows):
            self.submit(follow)


class _Toy:
    """What both tiers' toys share."""

    engine: Any
    clock = staticmethod(lambda: asyncio.get_running_loop().time())

    def __init__(self, chance: Random, *, step_s: float, full: float) -> None:
        self._chance = chance
        self._step_s = step_s
        self._full = full
        model: Any = SimpleNamespace(vocabulary=VOCABULARY)
        tokenizer: Any = SimpleNamespace(size=VOCABULARY, tokens={})
        options = ReplicaOptions(model="toy", pass_timeout_s=HANGS_S)
        super().__init__(model, tokenizer, options, token=None)  # pyright: ignore[reportCallIssue] - that of a replica

    def make_engine(self, model: Any, settings: Any) -> Any:
        del model, settings
        head: Any = self
        return ToyEngine(head=head, chance=self._chance, step_s=self._step_s, full=self._full)


class ToyDrafter(_Toy, Drafter):
    def draft(self, logits_NV: Any, tasks: Sequence[Any]) -> Sequence[Draft]:
        return [Draft(token=drafter_token(row)) for row, _ in zip(logits_NV, tasks, strict=True)]


class ToyExpert(_Toy, Expert):
    def verdicts(self, rows: Sequence[Any], tasks: Sequence[Task]) -> Sequence[Verdict]:
        return [_verdict(own, task) for own, task in zip(rows, tasks, strict=True)]


def _verdict(rows: Sequence[int], task: Task) -> Verdict:
    tokens: list[int] = []
    for row in rows:
        tokens.append(expert_token(row))
        drafted = task.block.tokens[len(tokens) - 1 : len(tokens)]
        if drafted != (tokens[-1],):
            origins = (Origin.DRAFTER,) * (len(tokens) - 1) + (Origin.EXPERT,)
            return Verdict(accepted=len(tokens) - 1, tokens=tuple(tokens), origins=origins)
    return Verdict(
        accepted=len(tokens), tokens=tuple(tokens), origins=(Origin.DRAFTER,) * len(tokens)
    )
