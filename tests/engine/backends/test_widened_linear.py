from __future__ import annotations

import pytest
import torch

from cascade.engine.backends import widened_linear
from cascade.engine.backends.widened_linear import WidenedLinear

pytestmark = pytest.mark.usefixtures("most_rows")


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 9, 40, 64, 65])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(3, 8), (700, 1000), (33, 2**19 + 3)])
def test_a_widened_layer_is_as_exact_as_bfloat16(
    rows: int, shape: tuple[int, int], *, bias: bool
) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    offset = torch.randn(shape[0]).bfloat16() if bias else None
    inputs = torch.randn(rows, shape[1]).bfloat16()

    result = WidenedLinear(weight, offset)(inputs)

    exact = inputs.double() @ weight.double().t() + (0 if offset is None else offset.double())
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.double(), exact, rtol=2**-8, atol=2**-7 * shape[1] ** 0.5)


def test_a_widened_layer_keeps_the_weight_itself() -> None:
    weight = torch.ones(4, 4).bfloat16()
    apply = WidenedLinear(weight)
    weight.zero_()
    assert not apply(torch.ones(3, 4).bfloat16()).any()


def test_float32_is_not_widened() -> None:
    assert not widened_linear.helps(torch.ones(4, 4))
