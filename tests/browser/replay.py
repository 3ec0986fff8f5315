"""Streams faster than the models here: recorded answers, replayed through the server's own API."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from itertools import cycle, islice
from typing import TYPE_CHECKING

from cascade.types import FinishReason, OutputChunk, Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterator

    from cascade.api.context import ServingContext
    from cascade.types import Request


class Replay:
    """Repeats the answer to each request, a token a chunk.

    Args:
        service: Whose answers are recorded.
        tokens: Of each answer.
        tokens_per_s: Of each answer; None: as fast as they are read.
    """

    def __init__(
        self, service: ServingContext, *, tokens: int, tokens_per_s: float | None = None
    ) -> None:
        self._service = service
        self._tokens = tokens
        self._rate = tokens_per_s
        self.score = service.generator.score

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        """Yield the chunks, none before the whole answer has been recorded."""
        recorded = [chunk async for chunk in self._service.generator.generate(request)]
        singles = [one for chunk in recorded for one in split(chunk)]
        ends = {*request.policy.stop_ids, *self._service.tokenizer.stop_ids}
        kept = [one for one in singles if not ends.intersection(one.tokens)]
        clock, statistics = asyncio.get_running_loop().time, Statistics()
        began_s = clock()
        for at, one in enumerate(islice(cycle(kept), self._tokens)):
            if self._rate is not None:
                await asyncio.sleep(began_s + at / self._rate - clock())
            statistics.expert_passes += 1
            finish = FinishReason.LENGTH if at + 1 == self._tokens else None
            yield replace(one, finish=finish, statistics=statistics)
            if self._rate is None:
                await asyncio.sleep(0)


def split(chunk: OutputChunk) -> Iterator[OutputChunk]:
    """Yield a chunk for each of the tokens."""
    for at, (token, origin) in enumerate(zip(chunk.tokens, chunk.origins, strict=True)):
        logprobs, drafts = chunk.logprobs[at : at + 1], chunk.drafts[at : at + 1]
        yield OutputChunk(tokens=(token,), origins=(origin,), logprobs=logprobs, drafts=drafts)
