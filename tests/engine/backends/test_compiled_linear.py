from __future__ import annotations

import pytest
import torch

from cascade.engine.backends import compiled_linear

pytestmark = pytest.mark.usefixtures("most_rows")


@pytest.mark.parametrize("shape", [(3, 64), (256, 256), (700, 1000), (33, 1025)])
def test_a_compiled_product_is_that_of_float32(most_rows: int, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape).bfloat16()
    for rows in range(1, most_rows + 1):
        inputs = torch.randn(rows, shape[1]).bfloat16()

        result = compiled_linear.multiply(inputs, weight)

        assert result.dtype == torch.float32
        exact = inputs.double() @ weight.double().t()
        torch.testing.assert_close(result.double(), exact, rtol=1e-5, atol=1e-5 * shape[1] ** 0.5)


def test_a_kernel_is_compiled_once_for_all_matrices_and_threads() -> None:
    threads = torch.get_num_threads()
    try:
        # Otherwise torch runs the function as it is written, which is slow.
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
            for count in (1, 2):
                torch.set_num_threads(count)
                for size in range(1, 12):
                    weight = torch.ones(100, 8 * size).bfloat16()
                    product = compiled_linear.multiply(torch.ones(2, 8 * size), weight)
                    assert (product == 8 * size).all()
    finally:
        torch.set_num_threads(threads)


def test_without_a_compiler_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise RuntimeError("No working C++ compiler found\nin a long story")

    monkeypatch.setattr(compiled_linear, "_kernels", lambda: {2: fail})
    assert not compiled_linear.pays(torch.nn.functional.linear)
    assert "no kernel compiles: No working C++ compiler found" in caplog.text
    assert "story" not in caplog.text


def test_a_kernel_that_is_slower_is_not_used() -> None:
    assert not compiled_linear.pays(lambda inputs, _: inputs)
