"""An event loop whose time jumps to the next timer: hours pass in milliseconds, always alike."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

TICK_S = 1e-6  # from a thread to the loop


class Stuck(Exception):
    """Everybody waits for somebody, and no timer runs."""


class _Timers(selectors.BaseSelector):
    """Watches no file: where the loop would sleep, time passes at once."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._files: dict[Any, selectors.SelectorKey] = {}

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        key = selectors.SelectorKey(fileobj, fileobj, events, data)
        self._files[fileobj] = key
        return key

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._files.pop(fileobj)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._files

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None:
            raise Stuck
        self.now_s += timeout
        return []


class _Task(asyncio.Task[Any]):
    """A task whose place in a set is the same in every run."""

    worlds = itertools.count()
    numbers = itertools.count()

    def __init__(self, *args: Any, **more: Any) -> None:
        self._number = next(_Task.numbers)
        super().__init__(*args, **more)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in the order of their times, and those of one time as they came."""

    def __init__(self) -> None:
        self._timers = _Timers()
        super().__init__(self._timers)
        # Those of one loop lie in a set alike in every run; those of two do not collide there.
        _Task.numbers = itertools.count(next(_Task.worlds) << 20)
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._timers.now_s

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call a moment later: what the loop does meanwhile, the other thread does not see."""
        return self.call_later(TICK_S, callback, *args, context=context)


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> asyncio.Task[Any]:
    return _Task(work, loop=loop, **more)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run to the end on a loop of its own."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
