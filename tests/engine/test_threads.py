from __future__ import annotations

import platform
import resource
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from cascade.engine import threads

if TYPE_CHECKING:
    from collections.abc import Iterator


def test_a_replica_waits_passively_and_has_its_own_number_of_threads() -> None:
    assert threads.environment(threads=1) == {
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    assert "OMP_NUM_THREADS" not in threads.environment()


@pytest.fixture
def usual() -> Iterator[None]:
    count, interval_s = torch.get_num_threads(), sys.getswitchinterval()
    yield
    torch.set_num_threads(count)
    sys.setswitchinterval(interval_s)


@pytest.mark.usefixtures("usual")
def test_a_running_process_takes_what_it_still_can() -> None:
    threads.apply(threads=1)

    assert torch.get_num_threads() == 1
    assert sys.getswitchinterval() == pytest.approx(0.0005)


@pytest.mark.usefixtures("usual")
def test_no_number_stands_for_torchs_own_whatever_others_have_set() -> None:
    threads.apply()
    default = torch.get_num_threads()
    threads.apply(threads=default + 1)

    threads.apply()

    assert torch.get_num_threads() == default


@pytest.mark.usefixtures("usual")
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_what_a_pass_frees_is_not_given_back_to_the_system() -> None:
    """Blocks of megabytes, taken again and again, fault once."""
    threads.apply()
    faults = list[int]()
    for _ in range(6):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        blocks = [torch.ones(3_000_000 + number) for number in range(4)]
        del blocks
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert faults[-1] < 100, faults
