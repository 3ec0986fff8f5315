"""How many tokens the KV cache of an engine holds."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from cascade.engine.extents import size_class

if TYPE_CHECKING:
    from cascade.engine.settings import EngineSettings

_CPU_BYTES = 2**30
_CPU_SHARE = 0.25  # of the memory that is free
_ACCELERATOR_SHARE = 0.8
_UNBOUNDED_CONTEXT = 8192


def capacity_tokens(
    settings: EngineSettings,
    *,
    device: torch.device,
    bytes_per_token: int,
    context_length: int | None,
) -> int:
    """Return the cache's size: as set, else what memory allows and the sessions can use."""
    if settings.cache_tokens:
        return size_class(settings.cache_tokens)
    budget = settings.cache_bytes or _free_bytes(device)
    useful = settings.max_sessions * size_class(context_length or _UNBOUNDED_CONTEXT)
    return size_class(max(1, min(budget // max(bytes_per_token, 1), useful)))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * _ACCELERATOR_SHARE)
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return min(_CPU_BYTES, int(free * _CPU_SHARE))
