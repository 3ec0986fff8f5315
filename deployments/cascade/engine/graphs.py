"""CUDA graphs: a function is run once under capture, and what it launched is launched at once.

Elsewhere than on a GPU the function itself takes the graph's place.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor

# Runs on the inputs that lie where they were captured; may return the same memory each time.
Replay: TypeAlias = Callable[[], Tensor]
# Makes one of a function that has static shapes and reads no number of a device.
Recorder: TypeAlias = Callable[[Replay], Replay]

_WARM_UPS = 3  # libraries choose kernels and take workspaces in the first runs
_capturing = threading.Lock()  # a process can capture one graph at a time


def recorder(device: torch.device) -> Recorder:
    """Return what makes recordings on `device`."""
    return _Graphs(device) if device.type == "cuda" else _again


class _Graphs:
    """Makes graphs that share the memory of what they compute on the way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        usual = torch.cuda.current_stream(self._device)
        graph = torch.cuda.CUDAGraph()
        # The outer context gives the stream back also where a capture cannot be ended.
        with _capturing, torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            self._stream.wait_stream(usual)
            for _ in range(_WARM_UPS):
                run()
            with torch.cuda.graph(
                graph,
                pool=self._memory,
                stream=self._stream,
                capture_error_mode="thread_local",  # other engines of the process go on
            ):
                found = run()
        usual.wait_stream(self._stream)

        def replay() -> Tensor:
            graph.replay()
            return found

        return replay


def _again(run: Replay) -> Replay:
    """Return the function itself."""
    return run
