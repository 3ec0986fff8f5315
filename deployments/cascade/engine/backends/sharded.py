"""A runner of a model that is sharded over several processes (ranks), whose passes need them all.

Rank 0 announces what it does to its runner and its KV pool, and the others repeat it with theirs.
An announcement is one tensor of integers, broadcast on the CPU; only long ones, such as prefills,
take a second.
"""

from __future__ import annotations

from datetime import timedelta
from enum import IntEnum, auto
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist

from cascade.engine.backends.base import Runner
from cascade.engine.batch import Segment
from cascade.engine.kv_pool import KVPool

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from torch import Tensor

    from cascade.errors import CascadeError

_FIRST = 1024  # integers of the first tensor: steps of 128 sessions with a token each fit
_FOREVER = timedelta(days=3650)  # an engine may have nothing to do for long


class _Action(IntEnum):
    FORWARD = auto()
    COPY = auto()
    CLEAR = auto()


class Failure(Protocol):
    """Ends all ranks after an error of this one."""

    def __call__(self, reason: str) -> CascadeError:
        """Return the error that those who wait get."""
        ...


class ShardedRunner(Runner[KVPool]):
    """Rank 0's runner, whose passes the other ranks repeat.

    Args:
        runner: Of this rank, with its pool; the other ranks `follow` with theirs.
        fail: Called if a pass fails: the ranks may not be in step any more.
    """

    def __init__(self, runner: Runner[Any], *, fail: Failure) -> None:
        super().__init__(runner.model)
        self.runner = runner
        self._fail = fail
        self.pool = _ShardedPool(runner.pool)

    def make_pool(self, *, num_slots: int) -> KVPool:
        """Return an empty pool of this rank."""
        return self.runner.make_pool(num_slots=num_slots)

    def split(self, segments: Sequence[Segment]) -> list[list[int]]:
        """Return the indices of segments that run together, pass by pass."""
        return self.runner.split(segments)

    def forward(self, segments: Sequence[Segment]) -> Tensor:
        """Run a pass on all ranks; return the requested logits `[N, V]`, in segment order."""
        try:
            _announce(_Action.FORWARD, pack(segments))
            return self.runner.forward(segments)
        # A rank that has died may show as any error of the device or of a collective.
        except Exception as error:
            raise self._fail(f"a forward pass failed: {error}") from error


class _ShardedPool(KVPool):
    """Rank 0's pool, whose changes the other ranks repeat in theirs."""

    def __init__(self, pool: KVPool) -> None:
        super().__init__(num_slots=pool.num_slots)
        self._pool = pool

    def tensors(self) -> Iterable[Tensor]:
        return self._pool.tensors()

    def copy(self, *, source: int, target: int, count: int) -> None:
        _announce(_Action.COPY, [source, target, count])
        self._pool.copy(source=source, target=target, count=count)

    def clear(self, *, start: int, count: int) -> None:
        _announce(_Action.CLEAR, [start, count])
        self._pool.clear(start=start, count=count)


def follow(runner: Runner[Any]) -> None:
    """Repeat what rank 0 announces; ends only by an error, such as that of rank 0's end."""
    with torch.inference_mode():
        while True:
            action, *numbers = _listen()
            match action:
                case _Action.FORWARD:
                    runner.forward(list(unpack(numbers)))
                case _Action.COPY:
                    source, target, count = numbers
                    runner.pool.copy(source=source, target=target, count=count)
                case _Action.CLEAR:
                    start, count = numbers
                    runner.pool.clear(start=start, count=count)
                case _:
                    raise AssertionError(f"rank 0 announced action {action}")


def pack(segments: Sequence[Segment]) -> list[int]:
    """Return segments as integers, which `unpack` undoes."""
    numbers: list[int] = []
    for one in segments:
        first = -1 if one.first_position is None else one.first_position
        numbers += (one.start, one.past, one.num_logits, one.rope_length, first, one.count)
        numbers += one.tokens
    return numbers


def unpack(numbers: Sequence[int]) -> Iterator[Segment]:
    """Yield the segments that `pack` was given."""
    index = 0
    while index < len(numbers):
        start, past, num_logits, rope_length, first, count = numbers[index : index + 6]
        index += 6 + count
        yield Segment(
            start=start,
            past=past,
            tokens=numbers[index - count : index],
            num_logits=num_logits,
            rope_length=rope_length,
            first_position=None if first < 0 else first,
        )


def _announce(action: _Action, numbers: Sequence[int]) -> None:
    sent = torch.tensor([len(numbers), action, *numbers])
    first = torch.zeros(_FIRST, dtype=torch.int64)
    first[: len(sent)] = sent[:_FIRST]
    _broadcast(first)
    if len(sent) > _FIRST:
        _broadcast(sent[_FIRST:])


def _listen() -> list[int]:
    first = torch.zeros(_FIRST, dtype=torch.int64)
    _broadcast(first)
    length = 2 + int(first[0])
    heard: list[int] = first[1:length].tolist()
    if length > _FIRST:
        rest = torch.zeros(length - _FIRST, dtype=torch.int64)
        _broadcast(rest)
        heard += rest.tolist()
    return heard


def _broadcast(numbers: Tensor) -> None:
    group = dist.group.WORLD
    assert group is not None, "the ranks have met"
    options = dist.BroadcastOptions()
    options.timeout = _FOREVER
    group.broadcast([numbers], options).wait()
