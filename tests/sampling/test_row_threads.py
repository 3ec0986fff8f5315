"""Rows that are shared among threads."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cascade.sampling.row_threads import map_rows
from cascade.sampling.tensor_ops import CHUNK_SIZE

if TYPE_CHECKING:
    from collections.abc import Generator

SHAPE, CPU = (7, CHUNK_SIZE), torch.device("cpu")


@pytest.fixture(params=[1, 2, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Generator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_results_are_in_the_order_of_the_rows() -> None:
    rows_NV = torch.arange(7)[:, None].expand(7, CHUNK_SIZE)

    parts = map_rows(lambda rows: rows_NV[rows, 0], SHAPE, CPU)

    assert torch.cat(parts).tolist() == list(range(7))


def test_operators_of_large_rows_run_on_one_core_each_and_others_as_before(threads: int) -> None:
    assert set(map_rows(lambda _: torch.get_num_threads(), SHAPE, CPU)) == {1}

    found: list[int] = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert [torch.get_num_threads(), *found] == [threads, threads]


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_each_thread_is_in_inference_mode_if_the_caller_is(mode: Any) -> None:
    with mode():
        wanted = torch.is_inference_mode_enabled()
        modes = map_rows(lambda _: torch.is_inference_mode_enabled(), SHAPE, CPU)

    assert set(modes) == {wanted}


def test_what_a_thread_raises_reaches_the_caller() -> None:
    def fail(rows: slice) -> None:
        raise ValueError(rows.start)

    with pytest.raises(ValueError, match="0"):
        map_rows(fail, SHAPE, CPU)
