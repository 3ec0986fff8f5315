"""The answers of one call while they are written, and what they cost together."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from cascade.api.output_processor import Delta, OutputProcessor, TokenText
from cascade.errors import Internal
from cascade.types import FinishReason, Origin, Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Sequence

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.types import OutputChunk, Request

T = TypeVar("T")


class Completion:
    """One answer of a call: its request, what was said so far, and what it cost."""

    def __init__(
        self, request: Request, service: ServingContext, *, index: int, call: CompletionCall
    ) -> None:
        self.index = index
        self.request = request
        self.call = call
        self.tokens: list[TokenText] = []  # the prompt's tokens too if the call echoes it
        self.text_length = 0
        self.end = Delta()
        self._service = service
        self._statistics = Statistics()

    @property
    def output(self) -> Delta:
        """Return everything said so far as one delta."""
        return replace(self.end, entries=tuple(self.tokens))

    @property
    def statistics(self) -> Statistics:
        """Return what the answer cost; tokens that a stop string cut off are not counted."""
        counts = Counter(entry.origin for entry in self.tokens)
        was = self._statistics
        drafted = counts[Origin.DRAFTER] + counts[Origin.KEPT]
        cut = max(was.drafter_tokens + was.kept_tokens - drafted, 0)
        return replace(
            was,
            accepted=max(was.accepted - cut, 0),
            drafter_tokens=counts[Origin.DRAFTER],
            kept_tokens=counts[Origin.KEPT],
            expert_tokens=counts[Origin.EXPERT],
        )

    async def stream(self) -> AsyncGenerator[Delta]:
        """Yield the deltas; the generation is closed as soon as the answer ends.

        Raises:
            Internal: The generation ended without a finish reason.
        """
        if self.call.echo:
            yield self._said(Delta(tokens=await self._prompt()))
        if not self.request.max_tokens:
            yield self._said(Delta(finish=FinishReason.LENGTH))
            return
        scribe = OutputProcessor(
            self._service.tokenizer,
            stops=self.call.stop_strings,
            stop_ids=self.request.policy.stop_ids,
        )
        async with aclosing(self._service.generator.generate(self.request)) as pieces:
            async for piece in pieces:
                delta = self._hear(piece, scribe)
                if delta.tokens or delta.finish:
                    yield self._said(delta)
                if delta.finish:
                    return
        raise Internal("An answer ended without a reason")

    def _hear(self, piece: OutputChunk, scribe: OutputProcessor) -> Delta:
        self._statistics = piece.statistics or self._statistics
        return scribe.push(piece)

    def _said(self, delta: Delta) -> Delta:
        self.tokens.extend(delta.tokens)
        self.text_length += len(delta.text)
        self.end = replace(delta, entries=())
        return delta

    async def _prompt(self) -> tuple[TokenText, ...]:
        """Return the prompt as entries, with its log-probabilities if the request asks for some."""
        prompt, top = self.request.prompt, self.request.policy.logprobs
        known = () if top is None else await self._service.generator.score(prompt, top=top)
        words = self._service.tokenizer.detokenizer()
        texts = [words.push([token]) for token in prompt]
        texts[-1] += words.flush()
        return tuple(
            TokenText(token_id=token, text=text, logprob=logprob)
            for token, text, logprob in zip_longest(prompt, texts, (None, *known))
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the answers of a call cost together; a prompt counts once for all its answers."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    accepted: int  # of a draft: the client's prediction if it sent one, else the drafter's
    rejected: int
    statistics: Statistics


class Completions:
    """All answers of a call, written side by side."""

    def __init__(self, call: CompletionCall, service: ServingContext, *, name: str = "") -> None:
        self.call = call
        self.all = tuple(
            Completion(replace(request, name=name), service, index=index, call=call)
            for index, request in enumerate(call.requests)
        )

    def stream(
        self, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[tuple[Completion, Delta] | None]:
        """Yield deltas as they come, and `None` after each `tick_s` seconds of silence."""
        return self._write(
            merge([answer.stream() for answer in self.all], keep_alive_s=keep_alive_s)
        )

    async def _write(
        self, merged: AsyncGenerator[tuple[int, Delta] | None]
    ) -> AsyncGenerator[tuple[Completion, Delta] | None]:
        async with aclosing(merged):
            async for item in merged:
                yield None if item is None else (self.all[item[0]], item[1])

    async def run(self) -> None:
        """Write all answers to their end."""
        async with aclosing(self.stream()) as deltas:
            async for _ in deltas:
                pass

    @property
    def usage(self) -> Usage:
        """Return the cost so far."""
        n = self.call.n
        total = sum_statistics([answer.statistics for answer in self.all])
        predicted = any(request.prediction for request in self.call.requests)
        firsts = [self.all[at : at + n] for at in range(0, len(self.all), n)]
        return Usage(
            prompt_tokens=sum(len(prompt) for prompt in self.call.prompts),
            completion_tokens=total.drafter_tokens + total.kept_tokens + total.expert_tokens,
            cached_tokens=sum(
                max(answer.statistics.cached_prompt_tokens for answer in same) for same in firsts
            ),
            accepted=total.predicted_accepted if predicted else total.accepted,
            rejected=total.predicted_rejected if predicted else total.drafted - total.accepted,
            statistics=total,
        )


def sum_statistics(parts: Sequence[Statistics]) -> Statistics:
    """Return the sum of statistics; histograms add place by place, traces follow one another."""
    if len(parts) == 1:
        return parts[0]
    total = Statistics()
    for name in Statistics.__slots__:
        values = [getattr(part, name) for part in parts]
        match getattr(total, name):
            case str():
                setattr(total, name, next((value for value in values if value), ""))
            case list() if name == "trace":
                setattr(total, name, [row for value in values for row in value])
            case list():
                setattr(total, name, [sum(row) for row in zip_longest(*values, fillvalue=0)])
            case dict():
                setattr(total, name, dict(sum(map(Counter, values), Counter[str]())))
            case _:
                setattr(total, name, sum(values))
    return total


async def merge(
    streams: Sequence[AsyncGenerator[T]], *, keep_alive_s: float | None
) -> AsyncGenerator[tuple[int, T] | None]:
    """Yield the items of all streams as they come, each with its stream's number.

    `None` comes after each `tick_s` seconds of silence. The first error ends all and is raised;
    closing this closes every stream at once.
    """
    nexts = {asyncio.ensure_future(_next(stream)): at for at, stream in enumerate(streams)}
    async with AsyncExitStack() as cleanup:
        for stream in streams:
            cleanup.push_async_callback(stream.aclose)
        cleanup.push_async_callback(_cancel, nexts)
        while nexts:
            done, _ = await asyncio.wait(
                nexts, timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield None
            for task in sorted(done, key=nexts.__getitem__):
                at = nexts[task]
                for item in task.result():
                    yield at, item
                    nexts[asyncio.ensure_future(_next(streams[at]))] = at
                del nexts[task]


async def _cancel(tasks: Iterable[asyncio.Task[Any]]) -> None:
    tasks = tuple(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def _next(stream: AsyncGenerator[T]) -> tuple[T, ...]:
    """Return the next item alone, or nothing at the end."""
    async for item in stream:
        return (item,)
    return ()
