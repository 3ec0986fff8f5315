from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cascade.engine.kv_pool import (
    MIN_RANGE,
    KVRange,
    KVRangeAllocator,
    accelerator_budget,
    capacity_tokens,
    size_class,
)
from cascade.engine.settings import EngineSettings
from cascade.settings import Application

TOKENS = st.integers(1, 3000)


@settings(deadline=None)
@given(TOKENS)
def test_a_size_class_holds_its_tokens_and_wastes_little(tokens: int) -> None:
    size = size_class(tokens)

    assert size >= tokens
    assert size_class(size) == size
    assert size < max(2 * tokens, MIN_RANGE + 1) or size - tokens < 1024


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(["take", "give", "grow"]), TOKENS), max_size=60))
def test_ranges_never_overlap_and_nothing_leaks(actions: list[tuple[str, int]]) -> None:
    allocator = KVRangeAllocator(capacity=8192)
    held: list[KVRange] = []
    for action, number in actions:
        if action == "take":
            got = allocator.allocate(number)
            held += [got] if got else []
        elif held and action == "give":
            allocator.release(held.pop(number % len(held)))
        elif held:
            index = number % len(held)
            grown = allocator.extend(held[index], held[index].size + number)
            held[index] = grown or held[index]

        slots = [slot for kv_range in held for slot in range(kv_range.start, kv_range.end)]
        assert len(slots) == len(set(slots)) == allocator.used
        assert all(0 <= slot < 8192 for slot in slots)

    for kv_range in held:
        allocator.release(kv_range)
    assert allocator.allocate(8192) == KVRange(start=0, size=8192)


def test_a_range_grows_only_into_free_slots() -> None:
    allocator = KVRangeAllocator(capacity=1024)
    first, second = allocator.allocate(100), allocator.allocate(100)
    assert first
    assert second

    assert allocator.extend(first, 200) is None
    assert allocator.extend(second, 200) == KVRange(start=128, size=256)


def test_no_range_if_no_free_range_is_long_enough() -> None:
    allocator = KVRangeAllocator(capacity=512)
    held = [allocator.allocate(128) for _ in range(4)]
    for kv_range in held[::2]:
        assert kv_range
        allocator.release(kv_range)

    assert allocator.allocate(200) is None
    assert allocator.used == 256


CPU = torch.device("cpu")


def capacity(settings: EngineSettings, *, context_length: int | None = 512) -> int:
    return capacity_tokens(
        settings, device=CPU, bytes_per_token=1000, context_length=context_length
    )


def test_cache_tokens_are_rounded_up_to_a_size_class() -> None:
    assert capacity(EngineSettings(cache_tokens=900)) == 1024


def test_cache_bytes_are_divided_by_the_bytes_of_a_token() -> None:
    assert capacity(EngineSettings(cache_bytes=5_000_000)) == 5120


def test_the_cache_is_no_larger_than_sessions_can_use() -> None:
    settings = EngineSettings(cache_bytes=10**12, max_sessions=4)

    assert capacity(settings) == 4 * 512
    assert capacity(settings, context_length=None) == 4 * 8192


def test_by_default_the_cache_takes_a_share_of_free_memory() -> None:
    assert 1024 <= capacity(EngineSettings(max_sessions=10**6)) <= 2**30 // 1000 + 1024


def test_a_replica_with_a_part_of_a_gpu_takes_that_part_of_its_memory() -> None:
    def utilization(**options: float) -> float:
        deployment = {"ray_actor_options": options}
        tier = {"engine": {"gpu_memory_utilization": 0.8}, "deployment": deployment}
        application = Application.model_validate({"expert": tier})
        return application.expert.options().engine.gpu_memory_utilization

    assert utilization(num_gpus=0.25) == pytest.approx(0.2)
    assert utilization(num_gpus=1) == utilization(num_gpus=2) == utilization(num_cpus=1) == 0.8


def test_the_weights_are_taken_off_a_gpus_share() -> None:
    assert accelerator_budget(total=1000, used=300, utilization=0.9) == 600
    assert accelerator_budget(total=1000, used=300, utilization=0.25) == 0
