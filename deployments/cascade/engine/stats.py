"""Counters of an engine, and meters of its load and the machine's."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import psutil

if TYPE_CHECKING:
    from collections.abc import Callable

_WINDOW_S = 10.0
_SAMPLE_PERIOD_S = 0.5  # a shorter one would measure single passes
_WHOLE_CORE = 0.9


@dataclass(slots=True, kw_only=True)
class EngineCounters:
    """Totals since the engine started."""

    passes: int = 0
    tokens: int = 0  # run through the model
    turns: int = 0  # sessions per pass, summed: turns / passes is the mean batch size
    queued_tokens: int = 0  # tokens that waited when a pass was planned, summed over passes
    waits: int = 0  # requests that have begun to run
    waited_s: float = 0.0  # seconds from `submit` to the first pass, summed over them


@dataclass(slots=True, kw_only=True)
class EngineStats(EngineCounters):
    """A snapshot of an engine's load and counters."""

    busy: float  # share of about the last ten seconds spent in passes
    busy_s: float  # seconds spent in passes in total
    budget_tokens: int  # token budget of a pass
    waiting: int  # requests not finished
    sessions: int  # open
    branches: int
    cache_tokens_used: int
    cache_tokens_live: int  # of those, held by open sessions; the rest is kept for prefix reuse
    cache_tokens_capacity: int
    prefix_hits: int  # sessions that began with cached tokens
    prefix_tokens: int  # tokens of those hits
    preemptions: int  # open sessions that lost their cache to others


@dataclass(slots=True, eq=False)
class PassShare:
    """What a session and its branches have taken of forward passes.

    Of each pass they take the part of its duration that their tokens are of all tokens in it.
    """

    seconds: float = 0.0
    tokens: int = 0  # in the current pass


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardPass:
    """A forward pass: its start by the engine's clock, and its size."""

    began_s: float = 0.0
    tokens: int = 0
    sessions: int = 0


class BusyMeter:
    """Share of time spent busy, as an exponential moving average."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.busy_s = 0.0
        self._share = 0.0
        self._at_s = clock()

    def record(self, *, busy: bool) -> None:
        """Count the time since the last record as busy or idle."""
        now_s = self._clock()
        self.busy_s += busy * (now_s - self._at_s)
        weight = math.exp((self._at_s - now_s) / _WINDOW_S)
        self._share = self._share * weight + busy * (1 - weight)
        self._at_s = now_s

    def share(self) -> float:
        """Return the share, counting the time since the last record as idle."""
        return self._share * math.exp((self._at_s - self._clock()) / _WINDOW_S)


class IdleCores:
    """How many cores no process has used recently, by a clock in seconds."""

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._sampled_s = -math.inf
        self._idle = 0.0
        psutil.cpu_percent()  # it measures the time since the call before

    def leave_one(self, *, busy: float) -> bool:
        """Return whether a core is left for a thread that was busy for the share `busy`."""
        return self() + busy >= _WHOLE_CORE

    def __call__(self) -> float:
        """Return the number; samples the system at most twice a second."""
        now_s = self._clock()
        if now_s - self._sampled_s >= _SAMPLE_PERIOD_S:
            self._sampled_s = now_s
            self._idle = (os.cpu_count() or 1) * (1 - psutil.cpu_percent() / 100)
        return self._idle
