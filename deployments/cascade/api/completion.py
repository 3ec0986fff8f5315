"""The completions of one call: runs them side by side and adds up what they cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING, Any, TypeVar

from cascade.api.output_processor import Delta, OutputProcessor, TokenText
from cascade.api.response_parser import MessageDelta
from cascade.errors import Internal
from cascade.types import Caller, FinishReason, Origin, Statistics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Iterable, Iterator, Mapping, Sequence

    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.api.keys import ApiKey
    from cascade.types import Prices, Request, TokenLogprob

K = TypeVar("K")
T = TypeVar("T")


class Completion:
    """One completion of a call: its request, its output so far, and what it cost."""

    def __init__(
        self, request: Request, service: ServingContext, *, index: int, call: CompletionCall
    ) -> None:
        """Prepare a completion.

        Args:
            request: What to generate.
            service: Generates and detokenizes it.
            index: Its place among the choices of the response.
            call: The call it belongs to.
        """
        self.index = index
        self.request = request
        self.call = call
        self.tokens: list[TokenText] = []  # the prompt's tokens too if the call echoes it
        self.prompt_logprobs: tuple[TokenLogprob, ...] | None = None  # of all tokens but the first
        self.text_length = 0
        self._last = Delta()
        self._reader = call.reading and call.reading.reader()
        self._message = MessageDelta()
        self._service = service
        self._statistics = Statistics()
        self._rounds: list[tuple[int, int]] = []  # tokens, and accepted ones of them
        self.reasoning_tokens = 0  # of thoughts, with what marks them

    @property
    def output(self) -> Delta:
        """Return the output so far as one delta."""
        message = self._message if self._reader else None
        return replace(self._last, tokens=tuple(self.tokens), message=message)

    @property
    def statistics(self) -> Statistics:
        """Return what the completion cost; only tokens of its text count as accepted.

        What a stop string cut off was drafted and judged, but counts as rejected.
        """
        counts, whole = Counter(token.origin for token in self.tokens), self._statistics
        length = sum(counts[origin] for origin in Origin)
        accepted = sum(accepted for _, accepted in _until(length, self._rounds))
        statistics = replace(
            whole,
            accepted=accepted,
            predicted_accepted=min(whole.predicted_accepted, accepted),
            drafter_tokens=counts[Origin.DRAFTER],
            kept_tokens=counts[Origin.KEPT],
            expert_tokens=counts[Origin.EXPERT],
            forced_tokens=counts[Origin.FORCED],
        )
        if length < whole.tokens:
            _cut_rounds(statistics, self._rounds, length=length)
        return statistics

    async def stream(self) -> AsyncGenerator[Delta]:
        """Yield the deltas; the generation is closed as soon as the completion ends.

        Raises:
            Internal: The generation ended without a finish reason.
        """
        top = self.call.prompt_logprobs
        if top is not None and self.index % self.call.n == 0:
            self.prompt_logprobs = await self._score(top)
        if self.call.echo:
            yield self._add(Delta(tokens=await self._prompt_tokens()))
        if not self.request.max_tokens:
            yield self._add(Delta(finish=FinishReason.LENGTH))
            return
        processor = OutputProcessor(
            self._service.tokenizer,
            self.request.prompt,
            stop_ids=self.request.policy.stop_ids,
            options=self.call.text,
        )
        async with aclosing(self._service.generator.generate(self.request)) as chunks:
            async for chunk in chunks:
                self._statistics = chunk.statistics or self._statistics
                drafted = chunk.accepted
                if drafted is None:
                    drafted = len(chunk.tokens) - chunk.origins.count(Origin.EXPERT)
                self._rounds.append((len(chunk.tokens), drafted))
                delta = processor.push(chunk)
                if delta.tokens or delta.finish:
                    yield self._add(delta)
                if delta.finish:
                    return
        raise Internal("The generation ended without a finish reason")

    def _add(self, delta: Delta) -> Delta:
        self.tokens.extend(delta.tokens)
        self.text_length += len(delta.text)
        self._last = delta = self._read(delta)
        return delta

    def _read(self, delta: Delta) -> Delta:
        """Return the delta with what it adds to the message, if that is not just its text."""
        if self._reader is None:
            return delta
        message, finish = MessageDelta(), delta.finish
        for part in delta.tokens if self._reader.can_think else (delta,):
            thinking = self._reader.thinks
            message += self._reader.push(part.text)
            self.reasoning_tokens += thinking or self._reader.thinks
        if finish is not None:
            message += self._reader.finish()
        self._message += message
        if finish is FinishReason.STOP and self._message.calls:
            finish = FinishReason.TOOL_CALLS
        return replace(delta, message=message, finish=finish)

    async def _prompt_tokens(self) -> tuple[TokenText, ...]:
        """Return the prompt's tokens, with log-probabilities if the request wants some."""
        prompt, top = self.request.prompt, self.request.policy.logprobs
        known = () if top is None else await self._score(top)
        texts = list(self.call.echo[self.index // self.call.n])
        if not self.request.max_tokens:  # else a character that the prompt begins ends the answer's
            texts[-1] += self._service.tokenizer.detokenizer(prompt).flush()
        return tuple(
            TokenText(token_id=token_id, text=text, logprob=logprob)
            for token_id, text, logprob in zip_longest(prompt, texts, (None, *known))
        )

    async def _score(self, top: int) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token of the prompt but the first."""
        score = self._service.generator.score
        return await score(self.request.prompt, top=top, caller=self.request.caller)


def _cut_rounds(statistics: Statistics, rounds: Sequence[tuple[int, int]], *, length: int) -> None:
    """Cut the histogram and the trace after so many tokens of the answer.

    Args:
        statistics: What is changed.
        rounds: The tokens and the accepted tokens of the rounds so far.
        length: Tokens of the answer that are left.
    """
    lengths = [0] * len(statistics.accepted_lengths)
    for _, accepted in _until(length, rounds):
        if accepted:
            lengths[accepted] += 1
    if lengths:
        lengths[0] = sum(statistics.accepted_lengths) - sum(lengths)
    traced = [(entry.tokens, entry.accepted) for entry in statistics.trace]
    statistics.accepted_lengths = lengths
    statistics.trace = [
        replace(entry, tokens=tokens, accepted=accepted)
        for entry, (tokens, accepted) in zip(statistics.trace, _until(length, traced), strict=True)
    ]


def _until(length: int, rounds: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """Yield tokens and accepted tokens of each round, as far as the first `length` tokens."""
    for tokens, accepted in rounds:
        left = min(tokens, length)
        length -= left
        yield left, min(accepted, left)


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What the completions of a call cost together; a prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    accepted: int  # of the client's prediction if there is one, else of the drafter's tokens
    rejected: int
    statistics: Statistics
    price: Prices  # of both tiers, where the settings have prices


class Completions:
    """All completions of a call, generated side by side."""

    def __init__(
        self,
        call: CompletionCall,
        service: ServingContext,
        *,
        request_id: str = "",
        caller: Caller | None = None,
        key: ApiKey | None = None,
    ) -> None:
        """Prepare the completions.

        Args:
            call: What to generate.
            service: Generates it.
            request_id: Names the call in logs.
            caller: Whose turn the completions take where they wait.
            key: Of the caller, whose quotas the call takes from.
        """
        self.call = call
        self._service = service
        self._key = key
        self.request_id = request_id
        self.all = tuple(
            Completion(
                replace(request, name=request_id, caller=caller or Caller()),
                service,
                index=index,
                call=call,
            )
            for index, request in enumerate(call.requests)
        )

    async def stream(
        self, *, keep_alive_s: float | None = None
    ) -> AsyncGenerator[tuple[Completion, Delta] | None]:
        """Yield deltas as they arrive, and None after each `keep_alive_s` seconds without one.

        Raises:
            CascadeError: As the generator does, or the caller's quotas do not allow the call.
        """
        longest = max(len(one.client_prompt) + one.max_tokens for one in self.call.requests)
        quotas = self._service.quotas
        with quotas.admit(self._key, answers=len(self.all), context_tokens=longest) as spend:
            spend(sum(map(len, self.call.prompts)))
            deltas = merge({each: each.stream() for each in self.all}, keep_alive_s=keep_alive_s)
            async with aclosing(deltas):
                async for each in deltas:
                    if each is not None:
                        spend(sum(token.origin is not None for token in each[1].tokens))
                    yield each

    async def run(self) -> None:
        """Generate all completions to their end."""
        async with aclosing(self.stream()) as deltas:
            async for _ in deltas:
                pass
        for each in self.all:  # the first choice of a prompt has scored it for all
            each.prompt_logprobs = self.all[each.index - each.index % self.call.n].prompt_logprobs

    @property
    def usage(self) -> Usage:
        """Return the cost so far."""
        n = self.call.n
        total = sum_statistics([each.statistics for each in self.all])
        predicted = any(request.prediction for request in self.call.requests)
        by_prompt = [self.all[at : at + n] for at in range(0, len(self.all), n)]
        return Usage(
            prompt_tokens=sum(len(prompt) for prompt in self.call.prompts),
            completion_tokens=total.tokens,
            cached_tokens=sum(
                max(each.statistics.cached_prompt_tokens for each in same) for same in by_prompt
            ),
            reasoning_tokens=sum(each.reasoning_tokens for each in self.all),
            accepted=total.predicted_accepted if predicted else total.accepted,
            rejected=total.predicted_rejected if predicted else total.drafted - total.accepted,
            statistics=total,
            price=self._service.prices.of(total),
        )


def sum_statistics(parts: Sequence[Statistics]) -> Statistics:
    """Return the sum of statistics; histograms are added per bin, traces concatenated."""
    if len(parts) == 1:
        return parts[0]
    total = Statistics()
    for name in Statistics.__slots__:
        values = [getattr(part, name) for part in parts]
        match getattr(total, name):
            case str():
                setattr(total, name, next((value for value in values if value), ""))
            case list() if name == "trace":
                setattr(total, name, [entry for value in values for entry in value])
            case list():
                setattr(total, name, [sum(bins) for bins in zip_longest(*values, fillvalue=0)])
            case dict():
                setattr(total, name, dict(sum(map(Counter, values), Counter[str]())))
            case _:
                setattr(total, name, sum(values))
    return total


async def merge(
    streams: Mapping[K, AsyncGenerator[T]], *, keep_alive_s: float | None
) -> AsyncGenerator[tuple[K, T] | None]:
    """Yield the items of all streams as they arrive, each with its stream's key.

    The first error ends all streams and is raised; closing this generator closes every stream.

    Args:
        streams: Yield items other than None.
        keep_alive_s: Yield None after so many seconds without an item; None: never.
    """
    pending = {key: asyncio.ensure_future(_next(stream)) for key, stream in streams.items()}
    async with AsyncExitStack() as cleanup:
        for stream in streams.values():
            cleanup.push_async_callback(stream.aclose)
        cleanup.push_async_callback(_cancel, pending)
        while pending:
            done, _ = await asyncio.wait(
                pending.values(), timeout=keep_alive_s, return_when=asyncio.FIRST_COMPLETED
            )
            if not done:
                yield None
            for key in [key for key, task in pending.items() if task in done]:
                item = pending[key].result()
                if item is None:
                    del pending[key]
                    continue
                yield key, item
                pending[key] = asyncio.ensure_future(_next(streams[key]))


async def _next(stream: AsyncGenerator[T]) -> T | None:
    return await anext(stream, None)


async def _cancel(pending: Mapping[Any, asyncio.Task[Any]]) -> None:
    for task in pending.values():
        task.cancel()
    await asyncio.gather(*pending.values(), return_exceptions=True)
