"""Clients of the HTTP API, and what each received."""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import httpx

from cascade.evaluation.tasks import TaskFamily, held_out
from cascade.types import Origin

if TYPE_CHECKING:
    import ssl
    from collections.abc import AsyncGenerator, Callable, Sequence

    from tests.chaos.grpc_load import GrpcClients

HANG_S = 900.0  # a stream that takes longer hangs
BLOCK = 4  # tokens; fixed, so that every answer uses a drafter
REFUSED_PAUSE_S = 0.5
PROMPTS = 12  # of each kind
DRAFTER = Origin.DRAFTER.value

Body = dict[str, Any]


def greedy(prompt: str, *, tokens: int, **more: Any) -> Body:
    """Return a streamed greedy completion of an exact length."""
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
    """Return a sampled completion whose text depends on its seed alone."""
    body = greedy(prompt, tokens=tokens, temperature=1.0, seed=seed)
    return body | {"cascade": body["cascade"] | {"coupling": "gumbel"}}


def request_bodies(*, tokens: int) -> list[Body]:
    """Return requests for facts and problems, half of them greedy and half sampled."""
    items = held_out(TaskFamily.FACTS, count=PROMPTS) + held_out(TaskFamily.PROBLEMS, count=PROMPTS)
    prompts = [item.prompt for item in items]
    return [
        *(greedy(prompt, tokens=tokens) for prompt in prompts[::2]),
        *(seeded(prompt, seed, tokens=tokens) for seed, prompt in enumerate(prompts[1::2])),
    ]


@dataclass(kw_only=True)
class Answer:
    """What one client received; times are of `time.monotonic`."""

    body: Body
    began_s: float
    status: int = 0
    retry_after: str | None = None
    text: str = ""
    error: str = ""  # the code of an error event, or of a refusal
    broken: str = ""  # how the connection broke
    done: bool = False
    ended_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)  # when text came
    origins: list[str] = field(default_factory=list)  # of that text
    usage: dict[str, Any] = field(default_factory=dict)

    @property
    def gap_s(self) -> float:
        """Return the longest gap between chunks of text, in seconds."""
        return max((b - a for a, b in itertools.pairwise(self.chunk_times_s)), default=0.0)

    def gap_at(self, moment_s: float, *, for_s: float) -> float:
        """Return the longest gap that ended after a moment and began before it or soon after.

        Args:
            moment_s: When something happened.
            for_s: The gap began at most so many seconds later.
        """
        pairs = itertools.pairwise((*self.chunk_times_s, *(() if self.done else (self.ended_s,))))
        return max((b - a for a, b in pairs if b > moment_s > a - for_s), default=0.0)

    def drafted_after(self, moment_s: float) -> float | None:
        """Return when the first drafted text came after a moment."""
        chunks = zip(self.chunk_times_s, self.origins, strict=True)
        return next((s for s, origins in chunks if s > moment_s and DRAFTER in origins), None)

    @property
    def token_s(self) -> float:
        """Return the mean time per token after the first text, in seconds."""
        tokens = self.usage["completion_tokens"]
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / max(1, tokens - 1)

    @property
    def causes(self) -> dict[str, int]:
        """Return the causes of its failovers, and how often each occurred."""
        return self.usage.get("cascade", {}).get("failover_causes", {})

    def receive(self, data: str) -> None:
        """Add one server-sent event."""
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
            self.chunk_times_s.append(time.monotonic())
            self.origins.append(choice["cascade"]["origins"])


class Clients:
    """Sends requests over HTTP, on as many connections as needed."""

    def __init__(
        self, url: str, *, verify: ssl.SSLContext | bool = True, key: str | None = None
    ) -> None:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
        headers = {} if key is None else {"authorization": f"Bearer {key}"}
        self._http = httpx.AsyncClient(
            base_url=url, limits=limits, timeout=HANG_S, verify=verify, headers=headers
        )
        self.open = 0
        self.most = 0

    async def complete(
        self,
        body: Body,
        *,
        until: Callable[[Answer], bool] | None = None,
        into: list[Answer] | None = None,
    ) -> Answer:
        """Return what was received to the end, or until the client leaves.

        Args:
            body: The request.
            until: Whether the client leaves, after each event.
            into: The answer is appended when the request is sent.
        """
        answer = Answer(body=body, began_s=time.monotonic())
        if into is not None:
            into.append(answer)
        self.open += 1
        self.most = max(self.most, self.open)
        try:
            async with asyncio.timeout(HANG_S):
                await self._read(answer, until)
        except TimeoutError:
            answer.broken = f"hung for {HANG_S:g} s"
        except httpx.TransportError as error:
            answer.broken = f"{type(error).__name__}: {error}"
        finally:
            self.open -= 1
            answer.ended_s = time.monotonic()
        return answer

    async def _read(self, answer: Answer, until: Callable[[Answer], bool] | None) -> None:
        async with self._http.stream("POST", "/v1/completions", json=answer.body) as response:
            answer.status = response.status_code
            answer.retry_after = response.headers.get("retry-after")
            if not response.is_success:
                answer.error = (await response.aread()).decode()
                return
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    answer.receive(line.removeprefix("data: "))
                    if until is not None and until(answer):
                        return

    async def close(self) -> None:
        await self._http.aclose()


@asynccontextmanager
async def open_clients(url: str, *, key: str | None = None) -> AsyncGenerator[Clients]:
    """Open a connection pool, and close it at the end."""
    made = Clients(url, key=key)
    try:
        yield made
    finally:
        await made.close()


async def references(clients: Clients, bodies: Sequence[Body]) -> dict[str, str]:
    """Return the text of each request on a cluster without faults."""
    answers = await asyncio.gather(*(clients.complete(body) for body in bodies))
    for answer in answers:
        assert answer.done, (answer.status, answer.error, answer.broken)
    return {key(answer.body): answer.text for answer in answers}


def key(body: Body) -> str:
    """Return a request as a dictionary key."""
    return json.dumps(body, sort_keys=True)


@asynccontextmanager
async def streams(
    clients: Clients | GrpcClients, bodies: Sequence[Body], *, count: int
) -> AsyncGenerator[list[Answer]]:
    """Keep `count` streams open until the block ends, and then let each of them end.

    Yields all answers, unfinished ones included. A refused request is followed by another.
    """
    over = asyncio.Event()
    endless = itertools.cycle(bodies)
    answers: list[Answer] = []

    async def one() -> None:
        while not over.is_set():
            answer = await clients.complete(next(endless), into=answers)
            if not answer.done:
                await asyncio.sleep(REFUSED_PAUSE_S)

    async with asyncio.TaskGroup() as group:
        for _ in range(count):
            group.create_task(one())
        try:
            yield answers
        finally:
            over.set()
