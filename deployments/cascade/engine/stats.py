"""What an engine says of itself."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """What an engine is doing and has done since it began."""

    busy: float  # share of the last ten seconds or so spent in passes
    busy_s: float  # seconds spent in passes since the beginning
    passes: int
    reads: int = 0  # times the head waited for numbers from the device, in all passes
    tokens: int  # run through the model
    turns: int  # sessions in those passes, summed: turns / passes is the mean batch
    budget_tokens: int  # most that a pass runs
    queued_tokens: int  # summed over passes: the tokens that waited when each was planned
    waits: int  # submitted steps that have begun to run
    waited_s: float  # summed over them: seconds from `submit` to the first pass
    waiting: int  # steps not finished
    sessions: int  # open
    branches: int  # of them
    cache_tokens_used: int
    cache_tokens_live: int  # of open sessions among them; the rest waits for like prompts
    cache_tokens_capacity: int
    prefix_hits: int  # sessions that began with cached tokens
    prefix_tokens: int  # tokens so found
    preemptions: int  # caches of open sessions dropped to make room


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """A forward pass: when it began, by the engine's clock, and what it ran."""

    began_s: float = 0.0
    tokens: int = 0
    sessions: int = 0


class BusyMeter:
    """The share of time spent busy; old times count less and less."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.busy_s = 0.0
        self._share = 0.0
        self._at_s = clock()

    def note(self, *, busy: bool) -> None:
        """Say what the time since the last note was spent on."""
        now_s = self._clock()
        self.busy_s += busy * (now_s - self._at_s)
        kept = math.exp((self._at_s - now_s) / _WINDOW_S)
        self._share = self._share * kept + busy * (1 - kept)
        self._at_s = now_s

    def share(self) -> float:
        """Return the share, as if the time since the last note were idle."""
        return self._share * math.exp((self._at_s - self._clock()) / _WINDOW_S)
