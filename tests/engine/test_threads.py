from __future__ import annotations

import os
import platform
import resource
import subprocess
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
import torch
from tests.engine.architectures import build
from tests.engine.harness import GreedyHandler

from cascade.engine import threads
from cascade.engine.engine import Engine
from cascade.engine.model_loader import adopt
from cascade.engine.settings import EngineSettings
from cascade.engine.stats import IdleCores

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def shares(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Loads of the CPU in percent; the last one is the present load."""
    found: list[float] = [0.0]
    monkeypatch.setattr(psutil, "cpu_percent", lambda: found[-1])
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    return found


def test_idle_cores_are_sampled_periodically(shares: list[float]) -> None:
    now_s = 0.0
    idle = IdleCores(clock=lambda: now_s)
    shares.append(25.0)
    assert idle() == 3
    shares.append(100.0)
    assert idle() == 3
    now_s = 1.0
    assert idle() == 0


@pytest.mark.parametrize(("busy", "spare"), [(0.0, 1.0), (75.0, 1.0), (80.0, 0.0), (100.0, 0.0)])
def test_spare_is_zero_if_no_core_is_idle(shares: list[float], busy: float, spare: float) -> None:
    settings = EngineSettings(cache_tokens=64)
    engine = Engine(adopt(build("llama")), handler=GreedyHandler(length=1), settings=settings)
    shares.append(busy)
    assert engine.spare == spare


def test_the_environment_of_a_replica() -> None:
    assert threads.environment(threads=1) == {
        "OMP_WAIT_POLICY": "PASSIVE",
        "GOMP_SPINCOUNT": "10000",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "512",
        "LRU_CACHE_CAPACITY": "512",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    }
    assert "OMP_NUM_THREADS" not in threads.environment()


@pytest.fixture
def usual() -> Iterator[None]:
    count, interval_s = torch.get_num_threads(), sys.getswitchinterval()
    yield
    torch.set_num_threads(count)
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("usual")
def test_apply_sets_threads_and_switch_interval() -> None:
    threads.apply(threads=1)

    assert torch.get_num_threads() == 1
    assert sys.getswitchinterval() == pytest.approx(0.0005)


@pytest.mark.usefixtures("usual")
def test_zero_threads_restores_the_default() -> None:
    threads.apply()
    default = torch.get_num_threads()
    threads.apply(threads=default + 1)

    threads.apply()

    assert torch.get_num_threads() == default


def test_an_own_thread_takes_its_openmp_pool_along() -> None:
    """Whatever a thread leaves behind keeps the engine's from waiting actively."""
    script = """
import psutil, torch
from cascade.engine import threads
torch.set_num_threads(2)
ones = torch.ones(10_000_000)
before = psutil.Process().num_threads()
assert threads.run_in_own_thread(torch.sum, ones) == 10_000_000
while psutil.Process().num_threads() > before:  # those of a pool end soon after its owner
    pass
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)  # noqa: S603 - our own


@pytest.mark.usefixtures("usual")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_stays_in_the_process() -> None:
    """Blocks of megabytes that are allocated again and again fault once."""
    threads.apply()
    faults = list[int]()
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(3_000_000 + number) for number in range(4)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < 100, faults
