"""Fixtures of the runners' parts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascade.engine.backends import compiled_linear, widened_linear

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(
    scope="module", params=[4, pytest.param(compiled_linear.MAX_ROWS, marks=pytest.mark.slow)]
)
def most_rows(request: pytest.FixtureRequest) -> Iterator[int]:
    """The most vectors that a kernel is compiled for; each of the six kernels takes seconds."""
    kernels = compiled_linear._kernels  # pyright: ignore[reportPrivateUsage] - its cache
    pays = widened_linear._compiled_pays  # pyright: ignore[reportPrivateUsage] - likewise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_linear, "MAX_ROWS", request.param)
        for one in (kernels, pays):
            one.cache_clear()
        yield request.param
    for one in (kernels, pays):
        one.cache_clear()
