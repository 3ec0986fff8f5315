"""When requests start: a closed loop, a Poisson process, or the times of a trace file.

A line of a trace is one JSON object:

| field | value |
|---|---|
| `at_s` | seconds from the start of the run |
| `prompt` | text, asked as a chat's user; or |
| `prompt_tokens` | length of a prompt to be made up, to be continued as text |
| `max_tokens` | of the answer |
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, assert_never

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cascade.errors import CascadeError, InvalidMeasurement

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping, Sequence
    from pathlib import Path

    from cascade.evaluation.client import Answer, Answerer

Json: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Closed:
    """So many clients, each of whom asks again as soon as it has its answer."""

    concurrency: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Requests start at given times, whatever has become of those before."""

    starts_s: tuple[float, ...]


Arrivals: TypeAlias = Closed | Open


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One request and what became of it."""

    start_s: float  # from the start of the run
    answer: Answer | None
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All requests of a run, in the order in which they were given."""

    asked: tuple[Asked, ...]
    wall_s: float

    @property
    def answers(self) -> list[Answer]:
        """Return the answers there are."""
        return [asked.answer for asked in self.asked if asked.answer is not None]


def poisson(*, rate: float, count: int, seed: int = 0) -> Open:
    """Return `count` arrivals, `rate` a second on average, the same ones for the same seed."""
    if rate <= 0:
        raise InvalidMeasurement(f"a rate of {rate:g} requests a second never comes to an end")
    chance = Random(seed)  # noqa: S311 - a schedule, no secret
    at_s, starts_s = 0.0, list[float]()
    for _ in range(count):
        at_s += chance.expovariate(rate)
        starts_s.append(at_s)
    return Open(starts_s=tuple(starts_s))


def read_trace(path: Path, *, filler: Callable[[int], Sequence[int]]) -> tuple[list[Json], Open]:
    """Return the bodies and the times of a trace file, in order of time.

    Args:
        path: A JSONL file.
        filler: Gives a prompt of so many tokens.

    Raises:
        InvalidMeasurement: There is no such file, or a line is no request.
    """
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise InvalidMeasurement(f"{path} cannot be read ({error.strerror})") from error
    told = [
        _parsed(path, number, line) for number, line in enumerate(lines, start=1) if line.strip()
    ]
    if not told:
        raise InvalidMeasurement(f"{path} is empty; it needs a JSON object on each line")
    told.sort(key=lambda line: line.at_s)
    bodies = [line.body(filler) for line in told]
    return bodies, Open(starts_s=tuple(line.at_s for line in told))


async def drive(answerer: Answerer, bodies: Sequence[Mapping[str, Any]], arrivals: Arrivals) -> Run:
    """Ask everything in the given pattern and wait for the last answer.

    A request that fails is counted, not raised; InvalidMeasurement says that one is refused.
    """
    began_s = time.perf_counter()

    async def ask(body: Mapping[str, Any]) -> Asked:
        start_s = time.perf_counter() - began_s
        try:
            return Asked(start_s=start_s, answer=await answerer.answer(body))
        except InvalidMeasurement:
            raise
        except CascadeError as error:
            return Asked(start_s=start_s, answer=None, error=error.message)

    try:
        match arrivals:
            case Closed(concurrency=concurrency):
                asked = await _closed(ask, bodies, concurrency)
            case Open(starts_s=starts_s):
                asked = await _open(ask, bodies, starts_s, began_s)
            case _:
                assert_never(arrivals)
    except ExceptionGroup as group:
        raise group.exceptions[0] from group
    return Run(asked=tuple(asked), wall_s=time.perf_counter() - began_s)


async def _closed(
    ask: Callable[[Mapping[str, Any]], Coroutine[Any, Any, Asked]],
    bodies: Sequence[Mapping[str, Any]],
    concurrency: int,
) -> list[Asked]:
    queue = iter(enumerate(bodies))
    asked: dict[int, Asked] = {}

    async def client() -> None:
        for number, body in queue:
            asked[number] = await ask(body)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(client())
    return [asked[number] for number in range(len(bodies))]


async def _open(
    ask: Callable[[Mapping[str, Any]], Coroutine[Any, Any, Asked]],
    bodies: Sequence[Mapping[str, Any]],
    starts_s: Sequence[float],
    began_s: float,
) -> list[Asked]:
    tasks: list[asyncio.Task[Asked]] = []
    async with asyncio.TaskGroup() as group:
        for body, start_s in zip(bodies, starts_s, strict=True):
            await asyncio.sleep(began_s + start_s - time.perf_counter())
            tasks.append(group.create_task(ask(body)))
    return [task.result() for task in tasks]


class _Line(BaseModel):
    """A line as people type it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    at_s: Annotated[float, Field(ge=0)]
    prompt: Annotated[str, Field(min_length=1)] | None = None
    prompt_tokens: Annotated[int, Field(gt=0)] | None = None
    max_tokens: Annotated[int, Field(gt=0)] = 96

    @model_validator(mode="after")
    def _one_prompt(self) -> _Line:
        if (self.prompt is None) == (self.prompt_tokens is None):
            raise ValueError("wanted `prompt` or `prompt_tokens`, one of them")
        return self

    def body(self, filler: Callable[[int], Sequence[int]]) -> Json:
        asked: Json = {"max_tokens": self.max_tokens}
        if self.prompt is not None:
            return {"messages": [{"role": "user", "content": self.prompt}], **asked}
        assert self.prompt_tokens is not None, "validated above"
        return {"prompt": list(filler(self.prompt_tokens)), **asked}


def _parsed(path: Path, number: int, line: str) -> _Line:
    try:
        return _Line.model_validate_json(line)
    except ValidationError as error:
        found = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in found["loc"])
        named = f"`{place}`: " if place else ""
        raise InvalidMeasurement(
            f"{path}, line {number}: {named}{found['msg'].removeprefix('Value error, ')}; a line"
            ' looks like {"at_s": 0.5, "prompt": "2 + 2?", "max_tokens": 32}'
        ) from error
