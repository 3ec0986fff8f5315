"""An event loop in virtual time: it jumps to the next timer, and every run is the same."""

from __future__ import annotations

import asyncio
import itertools
import selectors
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Mapping

TICK_S = 1e-6  # from `call_soon_threadsafe` to the call


class Deadlock(Exception):
    """Every task waits for another, and no timer is set."""


class _Timers(selectors.BaseSelector):
    """Watches no file: where the loop would sleep, virtual time advances at once."""

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
            raise Deadlock
        self.now_s += timeout
        return []


class _Task(asyncio.Task[Any]):
    """A task whose hash, and so its order in a set, is the same in every run."""

    loops = itertools.count()
    numbers = itertools.count()

    def __init__(self, *args: Any, **more: Any) -> None:
        self._number = next(_Task.numbers)
        super().__init__(*args, **more)

    def __hash__(self) -> int:
        return self._number

    def __eq__(self, other: object) -> bool:
        return self is other


class VirtualLoop(asyncio.SelectorEventLoop):
    """Runs callbacks in the order of their times, and those of equal time as they came."""

    def __init__(self) -> None:
        self._timers = _Timers()
        super().__init__(self._timers)
        # Within a loop hashes do not depend on the run, and no two loops share one.
        _Task.numbers = itertools.count(next(_Task.loops) << 20)
        self.set_task_factory(_make_task)

    def time(self) -> float:
        return self._timers.now_s

    def call_soon_threadsafe(
        self, callback: Callable[..., object], *args: Any, context: Any = None
    ) -> asyncio.TimerHandle:
        """Call a moment later, so that the loop runs on before it sees the other thread's call."""
        return self.call_later(TICK_S, callback, *args, context=context)


def _make_task(loop: asyncio.AbstractEventLoop, work: Any, **more: Any) -> asyncio.Task[Any]:
    return _Task(work, loop=loop, **more)


def run(work: Coroutine[Any, Any, Any]) -> Any:
    """Run a coroutine to its end on a virtual loop."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(work)
