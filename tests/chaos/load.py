"""Clients of the HTTP door, and what each of them heard."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from cascade.evaluation.tasks import Family, held_out
from cascade.types import Origin

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable, Sequence

HANGS_S = 900.0  # a stream that takes longer hangs
BLOCK = 4  # tokens, whether they pay or not: there must be drafters to lose
REFUSED_PAUSE_S = 0.5
QUESTIONS = 12  # of each kind
DRAFTER = Origin.DRAFTER.value

Body = dict[str, Any]


def greedy(prompt: str, *, tokens: int, **more: Any) -> Body:
    """Return a streamed completion without chance, of an exact length."""
    return {
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        "cascade": {"mode": "speculative", "rule": {"kind": "lossless"}, "draft_tokens": BLOCK},
        **more,
    }


def seeded(prompt: str, seed: int, *, tokens: int) -> Body:
    """Return a sampled completion whose words are a function of its seed."""
    body = greedy(prompt, tokens=tokens, temperature=1.0, seed=seed)
    return body | {"cascade": body["cascade"] | {"coupling": "gumbel"}}


def questions(*, tokens: int) -> list[Body]:
    """Return questions of two kinds, greedy and sampled."""
    items = held_out(Family.FACTS, count=QUESTIONS) + held_out(Family.PROBLEMS, count=QUESTIONS)
    prompts = [item.prompt for item in items]
    return [
        *(greedy(prompt, tokens=tokens) for prompt in prompts[::2]),
        *(seeded(prompt, seed, tokens=tokens) for seed, prompt in enumerate(prompts[1::2])),
    ]


@dataclass(kw_only=True)
class Answer:
    """What one client heard; times are of `time.monotonic`."""

    asked: Body
    began_s: float
    status: int = 0
    retry_after: str | None = None
    text: str = ""
    error: str = ""  # the code of an error event, or of a refusal
    broken: str = ""  # how the connection ended before its time
    done: bool = False
    ended_s: float = 0.0
    heard_s: list[float] = field(default_factory=list)  # when words came
    origins: list[str] = field(default_factory=list)  # and who wrote them
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def gap_s(self) -> float:
        """Return the longest silence between words, in seconds."""
        return max((b - a for a, b in itertools.pairwise(self.heard_s)), default=0.0)

    def silence_at(self, moment_s: float, *, for_s: float) -> float:
        """Return the longest silence that ended after a moment and began before it or soon after.

        Args:
            moment_s: When something happened.
            for_s: For how long after it a silence may have begun.
        """
        pairs = itertools.pairwise((*self.heard_s, *(() if self.done else (self.ended_s,))))
        return max((b - a for a, b in pairs if b > moment_s > a - for_s), default=0.0)

    def drafted_after(self, moment_s: float) -> float | None:
        """Return when the first words by a drafter came after a moment."""
        told = zip(self.heard_s, self.origins, strict=True)
        return next((s for s, who in told if s > moment_s and DRAFTER in who), None)

    @property
    def token_s(self) -> float:
        """Return the mean time of a token after the first words, in seconds."""
        tokens = self.usage["completion_tokens"]
        return (self.heard_s[-1] - self.heard_s[0]) / max(1, tokens - 1)

    @property
    def causes(self) -> dict[str, int]:
        """Return why it went on elsewhere, or without a tier, and how often."""
        return self.usage.get("cascade", {}).get("failover_causes", {})

    def hear(self, data: str) -> None:
        """Take in one event."""
        if data == "[DONE]":
            self.done = True
            return
        event = json.loads(data)
        if "error" in event:
            self.error = event["error"]["code"]
            return
        self.usage = event.get("usage") or self.usage
        for choice in event["choices"]:
            self.text += choice["text"]
            self.heard_s.append(time.monotonic())
            self.origins.append(choice["cascade"]["origins"])


class Clients:
    """Asks over HTTP, each question on a connection of its own if need be."""

    def __init__(self, url: str) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        self._http = httpx.AsyncClient(base_url=url, limits=limits, timeout=HANGS_S)
        self.open = 0
        self.most = 0

    async def ask(
        self,
        body: Body,
        *,
        until: Callable[[Answer], bool] | None = None,
        into: list[Answer] | None = None,
    ) -> Answer:
        """Return what was heard to the end, or to where `until` says that the client leaves.

        The answer is appended to `into` when its question is asked.
        """
        answer = Answer(asked=body, began_s=time.monotonic())
        if into is not None:
            into.append(answer)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            async with asyncio.timeout(HANGS_S):
                await self._listen(answer, until)
        except TimeoutError:
            answer.broken = f"hung for {HANGS_S:g} s"
        except httpx.TransportError as error:
            answer.broken = f"{type(error).__name__}: {error}"
        finally:
            self.open -= 1
            answer.ended_s = time.monotonic()
        return answer

    async def _listen(self, answer: Answer, until: Callable[[Answer], bool] | None) -> None:
        async with self._http.stream("POST", "/v1/completions", json=answer.asked) as response:
            answer.status = response.status_code
            answer.retry_after = response.headers.get("retry-after")
            if not response.is_success:
                answer.error = (await response.aread()).decode()
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    answer.hear(line.removeprefix("data: "))
                    if until is not None and until(answer):
                        return

    async def close(self) -> None:
        await self._http.aclose()


@asynccontextmanager
async def clients(url: str) -> AsyncGenerator[Clients]:
    """Open a pool of connections."""
    made = Clients(url)
    try:
        yield made
    finally:
        await made.close()


async def references(asking: Clients, bodies: Sequence[Body]) -> dict[str, str]:
    """Return the text of each question on a cluster where nothing dies."""
    answers = await asyncio.gather(*(asking.ask(body) for body in bodies))
    for answer in answers:
        assert answer.done, (answer.status, answer.error, answer.broken)
    return {key(answer.asked): answer.text for answer in answers}


def key(body: Body) -> str:
    """Return a name of a question."""
    return json.dumps(body, sort_keys=True)


@asynccontextmanager
async def streams(
    asking: Clients, bodies: Sequence[Body], *, count: int
) -> AsyncGenerator[list[Answer]]:
    """Keep `count` streams open until the block ends, and then let each of them end.

    Yields all answers, to which those that are being written belong. Who is refused asks again.
    """
    over = asyncio.Event()
    endless = itertools.cycle(bodies)
    answers: list[Answer] = []

    async def one() -> None:
        while not over.is_set():
            answer = await asking.ask(next(endless), into=answers)
            if not answer.done:
                await asyncio.sleep(REFUSED_PAUSE_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
        try:
            yield answers
        finally:
            over.set()
