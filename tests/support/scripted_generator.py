"""A generator without models: it yields given tokens in blocks. For tests of the APIs."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import TYPE_CHECKING

from cascade.types import (
    Caller,
    FinishReason,
    Mode,
    Origin,
    OutputChunk,
    Request,
    Round,
    Statistics,
    TokenLogprob,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

_LOGPROB = -0.25

_GAP = 0.5  # between the log-probabilities of neighbours in a list of alternatives


async def _at_once(_request: Request, _position: int) -> None:
    return


@dataclass(slots=True, kw_only=True)
class ScriptedGenerator:
    """A `Generator` whose tokens are `script` of the request.

    Each block is drafted and its last token rejected; `blocks` are the sizes, repeated. `pause` is
    awaited before each block: it can wait for a test, or raise an error.
    """

    script: Callable[[Request], Sequence[int]]
    blocks: tuple[int, ...] = (3, 1, 4, 2)
    pause: Callable[[Request, int], Awaitable[None]] = _at_once
    undrafted: str = ""  # what every round reports as the cause of a missing draft
    open: int = 0  # generations that run now
    idle: asyncio.Event = field(default_factory=asyncio.Event)  # set when the last of them ends
    requests: list[Request] = field(default_factory=list)

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield the script in blocks, up to the request's limit or its first stop token."""
        self.open += 1
        self.idle.clear()
        self.requests.append(request)
        try:
            async for chunk in self._chunks(request):
                yield chunk
        finally:
            self.open -= 1
            if not self.open:
                self.idle.set()

    async def score(
        self, tokens: Sequence[int], *, top: int, caller: Caller | None = None
    ) -> tuple[TokenLogprob, ...]:
        """Return a made-up log-probability for each token but the first."""
        del caller
        return tuple(_logprob(token, top) for token in tokens[1:])

    async def _chunks(self, request: Request) -> AsyncGenerator[OutputChunk]:
        output, finish = _cut(self.script(request), request)
        statistics = Statistics()
        at = 0
        for size in cycle(self.blocks):
            await self.pause(request, at)
            tokens = output[at : at + size]
            at += len(tokens)
            _record(statistics, request, tokens, undrafted=self.undrafted)
            yield _chunk(tokens, request, finish if at == len(output) else None, statistics)
            if at == len(output):
                return


def _cut(script: Sequence[int], request: Request) -> tuple[tuple[int, ...], FinishReason]:
    stops = request.policy.stop_ids
    ends = [at for at, token in enumerate(script) if token in stops]
    length = min(ends[0] + 1 if ends else len(script), request.max_tokens)
    stopped = bool(ends) and ends[0] < request.max_tokens
    return tuple(script[:length]), FinishReason.STOP if stopped else FinishReason.LENGTH


def _chunk(
    tokens: tuple[int, ...], request: Request, finish: FinishReason | None, statistics: Statistics
) -> OutputChunk:
    top = request.policy.logprobs
    return OutputChunk(
        tokens=tokens,
        origins=_origins(tokens, request),
        logprobs=() if top is None else tuple(_logprob(token, top) for token in tokens),
        finish=finish,
        statistics=statistics,
    )


def _origins(tokens: tuple[int, ...], request: Request) -> tuple[Origin, ...]:
    """Return the origins: the last token is the expert's, and odd drafted tokens are kept."""
    if request.mode is Mode.EXPERT_ONLY:
        return (Origin.EXPERT,) * len(tokens)
    drafted = [Origin.KEPT if token % 2 else Origin.DRAFTER for token in tokens[:-1]]
    return (*drafted, *[Origin.EXPERT] * bool(tokens))


def _record(
    statistics: Statistics, request: Request, tokens: tuple[int, ...], *, undrafted: str
) -> None:
    origins = _origins(tokens, request)
    accepted = len(tokens) - origins.count(Origin.EXPERT)
    statistics.rounds += 1
    statistics.draft_length_reasons["scripted"] = statistics.rounds
    if undrafted:
        statistics.undrafted_rounds = {undrafted: statistics.rounds}
    statistics.drafted += len(tokens)
    statistics.accepted += accepted
    statistics.judged += len(tokens)
    statistics.deferred += len(tokens) - accepted
    statistics.drafter_tokens += origins.count(Origin.DRAFTER)
    statistics.kept_tokens += origins.count(Origin.KEPT)
    statistics.expert_tokens += origins.count(Origin.EXPERT)
    lengths = statistics.accepted_lengths
    lengths.extend([0] * (accepted + 1 - len(lengths)))
    lengths[accepted] += 1
    if request.trace:
        statistics.trace.append(replace(_round(statistics, tokens, accepted), undrafted=undrafted))


def _round(statistics: Statistics, tokens: tuple[int, ...], accepted: int) -> Round:
    committed = statistics.drafter_tokens + statistics.kept_tokens + statistics.expert_tokens
    return Round(
        position=committed - len(tokens),
        drafted=len(tokens),
        accepted=accepted,
        deferred=len(tokens) - accepted,
        tokens=len(tokens),
        draft_ms=0.0,
        judge_ms=0.0,
    )


def _logprob(token: int, top: int) -> TokenLogprob:
    """Return a made-up log-probability, and alternatives that are less likely."""
    others = tuple((max(token - at, 0), _LOGPROB - at * _GAP) for at in range(top))
    return TokenLogprob(token=token, logprob=_LOGPROB, top=others)
