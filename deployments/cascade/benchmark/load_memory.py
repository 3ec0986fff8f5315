"""The memory that a model takes while an engine loads it, on a CPU."""

from __future__ import annotations

import threading
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import TYPE_CHECKING, Self

import psutil

if TYPE_CHECKING:
    from cascade.engine.settings import EngineSettings

_PERIOD_S = 0.002
_CACHE_TOKENS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadMemory:
    """Bytes of one load in a process of its own; mapped files are not counted."""

    runner: str  # of the path that was chosen
    weights: int  # of the model, in the type that it is served in
    peak: int  # more than before the load
    after: int  # as above, with the weights, a small cache, and what the passes allocated


def measure(model: str, *, settings: EngineSettings) -> LoadMemory:
    """Load a model in a fresh process and return its memory.

    Args:
        model: Directory or repository id.
        settings: Of the engine; the cache is small whatever they say.

    Raises:
        UnsupportedModel: It cannot be served.
    """
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(_load, model, settings).result()


def _load(model: str, settings: EngineSettings) -> LoadMemory:
    from cascade.engine.backends import select  # noqa: PLC0415 - before the first reading of memory
    from cascade.engine.memory_plan import plan_memory  # noqa: PLC0415 - as above
    from cascade.engine.model_loader import load  # noqa: PLC0415 - as above

    settings = replace(settings, device="cpu", cache_tokens=_CACHE_TOKENS)
    with _Peak() as peak:
        loaded = load(model, device="cpu", dtype=settings.dtype)
        weights = plan_memory(model, dtype=loaded.model.dtype).weights_bytes
        runner, _ = select.prepare(loaded, settings=settings)
    return LoadMemory(
        runner=type(runner).__name__, weights=weights, peak=peak.most, after=peak.after
    )


class _Peak:
    """Samples the process's own memory, in bytes more than at the beginning."""

    most = after = 0

    def __enter__(self) -> Self:
        self._before = _own_bytes()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self.after = _own_bytes() - self._before

    def _sample(self) -> None:
        while not self._ended.wait(_PERIOD_S):
            self.most = max(self.most, _own_bytes() - self._before)


def _own_bytes() -> int:
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared
