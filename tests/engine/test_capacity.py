from __future__ import annotations

import torch

from cascade.engine.capacity import capacity_tokens
from cascade.engine.settings import EngineSettings

CPU = torch.device("cpu")


def capacity(settings: EngineSettings, *, context_length: int | None = 512) -> int:
    return capacity_tokens(
        settings, device=CPU, bytes_per_token=1000, context_length=context_length
    )


def test_tokens_that_are_set_stand() -> None:
    assert capacity(EngineSettings(cache_tokens=900)) == 1024


def test_memory_that_is_set_is_divided_by_what_a_token_takes() -> None:
    assert capacity(EngineSettings(cache_bytes=5_000_000)) == 5120


def test_no_more_is_taken_than_the_sessions_can_use() -> None:
    settings = EngineSettings(cache_bytes=10**12, max_sessions=4)

    assert capacity(settings) == 4 * 512
    assert capacity(settings, context_length=None) == 4 * 8192


def test_by_default_a_part_of_the_free_memory_is_taken() -> None:
    assert 1024 <= capacity(EngineSettings(max_sessions=10**6)) <= 2**30 // 1000 + 1024
