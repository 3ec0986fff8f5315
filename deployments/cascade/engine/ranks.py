"""The processes (*ranks*) of a sharded model, as one of them sees them.

They meet at a store that rank 0 keeps, in which they tell each other how far they are. Rank 0
watches the processes of the others; if one ends, none goes on.
"""

from __future__ import annotations

import logging
import threading
from typing import TYPE_CHECKING, Any, Protocol

import torch.distributed as dist

from cascade.engine.backends.sharded import ShardedRunner
from cascade.errors import StartupError, Unavailable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage] - it is documented

    from cascade.engine.backends.base import Runner

log = logging.getLogger(__name__)

_POLL_S = 0.02


class Worker(Protocol):
    """The process of a rank other than 0."""

    def wait(self) -> None:
        """Return once it has ended."""
        ...

    def kill(self) -> None:
        """End it at once."""
        ...


class Ranks:
    """All ranks of a sharded model, as one of them sees them; rank 0 watches the others.

    Args:
        store: What the ranks share.
        rank: The number of this one.
        size: How many there are.
        workers: The processes of the others, on rank 0.
    """

    def __init__(
        self, store: TCPStore, *, rank: int, size: int, workers: Sequence[Worker] = ()
    ) -> None:
        self.rank = rank
        self.size = size
        self.lost: str | None = None  # why, once a rank has ended
        self._store = store
        self._workers = workers
        self._rounds = 0
        self._ended = threading.Event()
        self._stopped = False
        self._lock = threading.Lock()
        self._on_loss: Callable[[], None] | None = None
        for number, worker in enumerate(workers, start=1):
            threading.Thread(target=self._watch, args=(number, worker), daemon=True).start()

    def lead(self, runner: Runner[Any], *, on_loss: Callable[[], None]) -> ShardedRunner:
        """Return a runner whose passes the other ranks repeat with theirs.

        Args:
            runner: Of rank 0.
            on_loss: Called once, on any thread, if a rank ends.
        """
        with self._lock:
            self._on_loss = on_loss
            lost = self.lost
        if lost:
            on_loss()
        return ShardedRunner(runner, fail=self.fail)

    def exchange(self, text: str) -> list[str]:
        """Return what every rank says, once all have; all ranks call it.

        Raises:
            StartupError: A rank has ended.
        """
        self._rounds += 1
        keys = [f"round {self._rounds} of rank {rank}" for rank in range(self.size)]
        self._store.set(keys[self.rank], text)
        while not self._store.check(keys):
            if self._ended.wait(_POLL_S) and not self._store.check(keys):
                raise StartupError(f"The model cannot be served over several devices: {self.lost}")
        return [self._store.get(key).decode() for key in keys]

    def agree(self, reason: str) -> str:
        """Return why a step failed on any rank, given why on this one; nothing if it did not."""
        return next(filter(None, self.exchange(reason)), "")

    def fail(self, reason: str) -> Unavailable:
        """End the service of all ranks; return the error that callers get."""
        with self._lock:
            first = not (self._stopped or self.lost)
            if first:
                self.lost = reason
                self._ended.set()
            on_loss = self._on_loss
        if first:
            log.error("The ranks of this replica end: %s", reason)
            if on_loss is not None:
                on_loss()
        return Unavailable(f"The ranks of this replica have ended: {self.lost or 'it stops'}")

    def stop(self) -> None:
        """End the other ranks."""
        with self._lock:
            self._stopped = True
            self._ended.set()
        for worker in self._workers:
            worker.kill()
        # Only NCCL waits for what is under way, which may never end; its process ends after this.
        if dist.is_initialized() and dist.get_backend() == "gloo":
            dist.destroy_process_group()

    def _watch(self, rank: int, worker: Worker) -> None:
        worker.wait()
        if self._stopped:
            return
        key = error_key(rank)
        why = f": {self._store.get(key).decode()}" if self._store.check([key]) else ""
        self.fail(f"rank {rank} of {self.size} has ended{why}")


def error_key(rank: int) -> str:
    """Return where the store has why a rank ended."""
    return f"error of rank {rank}"
