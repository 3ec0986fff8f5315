"""One model over several processes (*ranks*), each with a part of every layer.

transformers shards the weights by the model's own plan and adds what the ranks exchange. All ranks
load and check the model in step, since each forward pass needs all of them. Then the engine runs on
rank 0, and the others repeat its passes (`backends.sharded`). A rank that ends ends the others.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from importlib.util import find_spec
from multiprocessing import connection, get_context
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import PrefixStore, TCPStore  # pyright: ignore[reportPrivateImportUsage] - both are documented
from transformers.utils.logging import disable_progress_bar

from cascade.engine import model_loader, threads, tp_plan
from cascade.engine.backends import select
from cascade.engine.backends.sharded import follow
from cascade.engine.ranks import Ranks, Worker, error_key
from cascade.errors import StartupError, UnsupportedModel

if TYPE_CHECKING:
    from cascade.engine.model_loader import LoadedModel
    from cascade.engine.settings import EngineSettings

log = logging.getLogger(__name__)

_HOST = "127.0.0.1"  # the ranks share a machine, and the store asks nobody for a password
_COLLECTIVE = timedelta(minutes=10)  # of one exchange of the ranks within a pass
_FOREVER = timedelta(days=3650)
_STOP_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTask:
    """What a rank other than 0 needs to know."""

    rank: int
    port: int  # where rank 0 meets the others
    name: str  # of the model
    source: dict[str, Any]  # its revision and so on, for `model_loader.load`
    settings: EngineSettings

    def run(self) -> None:
        """Run this rank, until rank 0 ends."""
        threads.apply(threads=self.settings.threads)
        disable_progress_bar()  # rank 0 shows its own
        store = TCPStore(_HOST, self.port, is_master=False)
        threading.Thread(target=_end_with_rank_0, args=(self.port,), daemon=True).start()
        ranks = Ranks(store, rank=self.rank, size=self.settings.tensor_parallel)
        try:
            model = _load_part(ranks, store, self.name, settings=self.settings, source=self.source)
            runner, _ = select.prepare(model, settings=self.settings)
        except StartupError:
            log.info("rank %d ends: rank 0 cannot start either", self.rank, exc_info=True)
            return
        except Exception as error:
            store.set(error_key(self.rank), model_loader.first_line(error))
            raise
        follow(runner)


Launch: TypeAlias = Callable[[RankTask], Worker]


def load(
    name: str, *, settings: EngineSettings, launch: Launch | None = None, **source: Any
) -> LoadedModel:
    """Return a model on its device, or rank 0's part of it after the other ranks have started.

    Args:
        name: Directory or repository id.
        settings: Of the engine; the number of ranks is `tensor_parallel`.
        launch: Starts the process of a rank; None for a child of this one.
        source: Other arguments of `model_loader.load`.

    Raises:
        StartupError: The model cannot be sharded or loaded, or a rank cannot run.
    """
    size = settings.tensor_parallel
    if size == 1:
        return model_loader.load(name, device=settings.device, dtype=settings.dtype, **source)
    if dist.is_initialized():
        raise StartupError(
            "This process already runs a sharded model; give each tier with engine.tensor_parallel "
            "a process of its own, as Ray Serve and `cascade tier` do"
        )
    if find_spec("accelerate") is None:
        raise StartupError(
            "engine.tensor_parallel needs accelerate; pip install "
            "'speculative-cascades[tensor-parallel]'"
        )
    tp_plan.check(name, model_loader.read_config(name, **source), size=size)
    _check_device(settings)
    listener = socket.create_server((_HOST, 0))
    port: int = listener.getsockname()[1]
    store = TCPStore(
        _HOST, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    tasks = [
        RankTask(rank=rank, port=port, name=name, source=source, settings=settings)
        for rank in range(1, size)
    ]
    workers = [(launch or Child)(task) for task in tasks]
    ranks = Ranks(store, rank=0, size=size, workers=workers)
    try:
        return _load_part(ranks, store, name, settings=settings, source=source)
    except BaseException:
        ranks.stop()
        raise


def _check_device(settings: EngineSettings) -> None:
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device not in {"auto", kind}:
        raise UnsupportedModel(
            f"engine.device is {settings.device!r}, but with engine.tensor_parallel "
            f"{settings.tensor_parallel} each process takes a {kind} device of this machine; leave "
            "engine.device out"
        )


def _load_part(
    ranks: Ranks, store: TCPStore, name: str, *, settings: EngineSettings, source: dict[str, Any]
) -> LoadedModel:
    """Return this rank's part of a model. All ranks call it.

    Args:
        ranks: All of them, as this one sees them.
        store: What they share.
        name: Directory or repository id.
        settings: Of the engine.
        source: Other arguments of `model_loader.load`.

    Raises:
        StartupError: The model cannot be loaded, or a rank has ended.
    """
    ranks.exchange("")  # nobody joins a group that is not complete
    devices = torch.cuda.device_count()
    os.environ["LOCAL_RANK"] = str(ranks.rank % devices if devices else 0)  # transformers' device
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if devices else "gloo",
        store=PrefixStore("group", store),
        rank=ranks.rank,
        world_size=ranks.size,
        timeout=_COLLECTIVE,
    )
    model, reason = None, ""
    try:
        model = model_loader.load(name, dtype=settings.dtype, tensor_parallel=ranks.size, **source)
    except UnsupportedModel as error:
        reason = error.message
    reason = ranks.agree(reason)
    if model is None or reason:
        raise UnsupportedModel(reason)
    return replace(model, ranks=ranks)


class Child:
    """A rank in a child process."""

    def __init__(self, task: RankTask) -> None:
        count, size = torch.cuda.device_count(), task.settings.tensor_parallel
        if 0 < count < size:
            raise StartupError(
                f"engine.tensor_parallel is {size}, but this process sees {count} GPUs"
            )
        self._process = get_context("spawn").Process(target=_run_child, args=(task,), daemon=True)
        self._process.start()

    def wait(self) -> None:
        """Return once it has ended."""
        connection.wait([self._process.sentinel])

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.join(_STOP_S)


def _run_child(task: RankTask) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 gets it too, and ends this process
    task.run()


def _end_with_rank_0(port: int) -> None:
    """End this process when rank 0 does, whatever it waits for."""
    store = TCPStore(_HOST, port, is_master=False)
    try:
        store.wait(["never"], _FOREVER)
    finally:
        os._exit(1)  # the main thread may be in a call that does not return
