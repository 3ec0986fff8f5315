"""What one caller with many long prompts costs another with short ones: time to its first token.

Each round first asks for the small caller alone, then beside the large one, so that both see the
same machine. Router in this process, each tier in its own, as `systems.separate_processes`.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

from cascade.api import build_request
from cascade.api.completion import Completions
from cascade.api.schema import ChatBody, CompletionBody
from cascade.benchmark import systems
from cascade.evaluation.client import InProcessClient
from cascade.types import Caller

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.settings import Application

SMALL, LARGE = Caller(name="small", has_key=True), Caller(name="large", has_key=True)
LONG_PROMPTS = 8  # of the large caller, at the same time
LONG_TOKENS = 900  # of each; the pair that ships has a context of 1,024
_WARM_UP = 20
_BEFORE_S = 2.0  # from the first long prompt to the first short one
_AFTER_S = 1.0  # in which what was cancelled leaves the tiers
_TOKENS = range(100, 3000)  # that the pair that ships has, and that end nothing
_OPTIONS: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "stream": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """Times to the first token of the small caller, in seconds."""

    alone_s: list[float]
    beside_s: list[float]

    @property
    def ratio(self) -> float:
        """Return how many times as long the 95th percentile is beside the other."""
        return p95(self.beside_s) / p95(self.alone_s)

    def __str__(self) -> str:
        parts = (
            f"{name}: median {1e3 * median(found):.0f} ms, p95 {1e3 * p95(found):.0f} ms"
            for name, found in (("alone", self.alone_s), ("beside", self.beside_s))
        )
        return f"{'; '.join(parts)}; {self.ratio:.2f} times"


def p95(values: list[float]) -> float:
    """Return the 95th percentile, the nearest above."""
    return sorted(values)[min(len(values) - 1, int(0.95 * len(values)))]


async def measure(
    settings: Application, *, rounds: int, requests: int, progress: Callable[[str], object]
) -> list[Round]:
    """Return the times of each round.

    Args:
        settings: The pair.
        rounds: How often both are measured.
        requests: Of the small caller, in each half of a round.
        progress: Called with a line per round.
    """
    draw = Random(0)  # noqa: S311 - prompts, no secrets
    found: list[Round] = []
    async with systems.separate_processes(settings, (0.0,)) as [system]:
        assert isinstance(system.client, InProcessClient), "it starts a router here"
        service = system.client.service
        async with _beside(service, draw):
            for _ in range(_WARM_UP):
                await _ask(_short(service, draw), service)
        for _ in range(rounds):
            alone_s = [await _ask(_short(service, draw), service) for _ in range(requests)]
            async with _beside(service, draw):
                beside_s = [await _ask(_short(service, draw), service) for _ in range(requests)]
            found.append(Round(alone_s=alone_s, beside_s=beside_s))
            progress(str(found[-1]))
    return found


@asynccontextmanager
async def _beside(service: ServingContext, draw: Random) -> AsyncGenerator[None]:
    """Keep long prompts of the large caller running."""

    async def ask_on() -> None:
        while True:
            await _ask(_long(service, draw), service, caller=LARGE)

    task = asyncio.create_task(ask_on())
    await asyncio.sleep(_BEFORE_S)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        await asyncio.sleep(_AFTER_S)


async def _ask(call: CompletionCall, service: ServingContext, *, caller: Caller = SMALL) -> float:
    """Return the time to the first token of a call, after its last."""
    first_s, began_s = 0.0, time.perf_counter()
    async for item in Completions(call, service, caller=caller).stream():
        if item is not None and not first_s:
            first_s = time.perf_counter() - began_s
    return first_s


def _short(service: ServingContext, draw: Random) -> CompletionCall:
    left, right = draw.randrange(10, 99), draw.randrange(10, 99)
    question = f"David has {left} shells and buys {right} more. How many shells has he then?"
    body = _OPTIONS | {"messages": [{"role": "user", "content": question}], "max_tokens": 8}
    return build_request.chat(ChatBody.model_validate(body), service)


def _long(service: ServingContext, draw: Random) -> CompletionCall:
    """Return a call of many prompts that nothing is cached of."""
    prompts = [draw.choices(_TOKENS, k=LONG_TOKENS) for _ in range(LONG_PROMPTS)]
    body = _OPTIONS | {"prompt": prompts, "max_tokens": 16}
    return build_request.completion(CompletionBody.model_validate(body), service)
