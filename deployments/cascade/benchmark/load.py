"""Sends requests to a system: in a closed loop, as a Poisson process, or at the times of a trace.

A trace file has one JSON object per line:

| field | value |
|---|---|
| `at_s` | seconds from the start of the run |
| `prompt` | text, sent as the user's turn of a chat; or |
| `prompt_tokens` | length of a made-up prompt, sent as a text completion |
| `max_tokens` | limit of the answer |
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cascade.errors import CascadeError, InvalidMeasurement
from cascade.evaluation.client import CompletionResult

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from cascade.evaluation.client import Client

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClosedLoop:
    """A fixed number of clients; each sends its next request when it has its answer."""

    concurrency: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenLoop:
    """Requests start at given times, whether earlier ones are answered or not."""

    starts_s: tuple[float, ...]


Load: TypeAlias = ClosedLoop | OpenLoop


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadResult:
    """The answer or the error of each request, in the order of the requests."""

    results: tuple[CompletionResult | CascadeError, ...]
    wall_s: float

    @property
    def answers(self) -> list[CompletionResult]:
        """Return the answers of the requests that succeeded."""
        return [result for result in self.results if isinstance(result, CompletionResult)]


def poisson(*, rate: float, count: int, seed: int = 0) -> OpenLoop:
    """Return the start times of a Poisson process.

    Args:
        rate: Mean number of requests per second.
        count: Number of requests.
        seed: The same seed gives the same times.

    Raises:
        InvalidMeasurement: The rate is not positive.
    """
    if rate <= 0:
        raise InvalidMeasurement(f"a rate of {rate:g} requests a second never ends; use more")
    rng = Random(seed)  # noqa: S311 - a schedule, no secret
    return OpenLoop(starts_s=tuple(accumulate(rng.expovariate(rate) for _ in range(count))))


def read_trace(
    path: Path, *, filler: Callable[[int], Sequence[int]]
) -> tuple[list[Json], OpenLoop]:
    """Return the request bodies and the start times of a trace file, in order of time.

    Args:
        path: A JSONL file.
        filler: Returns a prompt of the given number of tokens.

    Raises:
        InvalidMeasurement: The file cannot be read, or a line is not a request.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InvalidMeasurement(f"{path} cannot be read ({error.strerror})") from error
    parsed = [
        _parse_line(line, where=f"{path}, line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip()
    ]
    if not parsed:
        raise InvalidMeasurement(f"{path} is empty; it needs a JSON object on each line")
    parsed.sort(key=lambda line: line.at_s)
    starts_s = tuple(line.at_s for line in parsed)
    return [line.body(filler) for line in parsed], OpenLoop(starts_s=starts_s)


async def run_load(client: Client, bodies: Sequence[Mapping[str, Any]], load: Load) -> LoadResult:
    """Send all requests and wait for the last answer. A request that fails is recorded, not raised.

    Args:
        client: Answers a request body.
        bodies: The requests.
        load: When each request starts.

    Raises:
        InvalidMeasurement: A request is refused.
    """
    began_s = time.perf_counter()
    pending = enumerate(bodies)
    results: dict[int, CompletionResult | CascadeError] = {}

    async def send(requests: Iterable[tuple[int, Mapping[str, Any]]]) -> None:
        for number, body in requests:
            try:
                results[number] = await client.complete(body)
            except InvalidMeasurement:
                raise
            except CascadeError as error:
                results[number] = error

    try:
        async with asyncio.TaskGroup() as group:
            if isinstance(load, ClosedLoop):
                for _ in range(load.concurrency):
                    group.create_task(send(pending))
            else:
                for request, start_s in zip(pending, load.starts_s, strict=True):
                    await asyncio.sleep(began_s + start_s - time.perf_counter())
                    group.create_task(send([request]))
    except ExceptionGroup as group_error:
        raise group_error.exceptions[0] from group_error
    wall_s = time.perf_counter() - began_s
    return LoadResult(results=tuple(results[number] for number in sorted(results)), wall_s=wall_s)


class _TraceLine(BaseModel):
    """One line of a trace file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_s: Annotated[float, Field(ge=0)]
    prompt: Annotated[str, Field(min_length=1)] | None = None
    prompt_tokens: Annotated[int, Field(gt=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 96

    @model_validator(mode="after")
    def _one_prompt(self) -> Self:
        if (self.prompt is None) == (self.prompt_tokens is None):
            raise ValueError("give either `prompt` or `prompt_tokens`")
        return self

    def body(self, filler: Callable[[int], Sequence[int]]) -> Json:
        if self.prompt_tokens is not None:
            return {"prompt": list(filler(self.prompt_tokens)), "max_tokens": self.max_tokens}
        messages = [{"role": "user", "content": self.prompt}]
        return {"messages": messages, "max_tokens": self.max_tokens}


def _parse_line(line: str, *, where: str) -> _TraceLine:
    try:
        return _TraceLine.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"`{part}`: " for part in first["loc"])
        raise InvalidMeasurement(
            f"{where}: {field}{first['msg'].removeprefix('Value error, ')}; a line looks like"
            ' {"at_s": 0.5, "prompt": "2 + 2?", "max_tokens": 32}'
        ) from error
