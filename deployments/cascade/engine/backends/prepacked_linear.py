"""Linear layers whose weights are laid out once for the CPU's kernels.

A block of a few tokens then costs little more than one token, which verification needs: with
float32 weights of 6144 x 768 on a core with AVX-512, six tokens take 0.6 ms instead of 2.6 ms. The
operators are those that torch's own compiler emits; they are private, so they may be missing.

oneDNN builds a kernel for each number of vectors that a matrix is multiplied with, in half a
millisecond, and keeps half a MiB for it. Passes may have any number of tokens, so their number is
rounded up to one of few.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from transformers.pytorch_utils import Conv1D

from cascade.engine import threads
from cascade.engine.backends import widened_linear
from cascade.engine.progress import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Linear: TypeAlias = Callable[[Tensor], Tensor]

log = logging.getLogger(__name__)

# In batches of 2 to 32 vectors the kernels give each the same result whatever the others are; a
# single vector may be summed in another order.
_MAX_BATCH = 32
FIXED_ROWS = 128  # few enough that a GPU still waits for the weights
_MIN_WEIGHTS = 2**14  # below, a call costs more than the layout saves
_VECTOR_WEIGHTS = 2**20  # of a float32 matrix below which numpy is faster for one vector


def pack(model: nn.Module, *, deterministic: bool = False, consume: bool = False) -> int:
    """Pack the linear layers of a model if its CPU has the kernels; return their number.

    Results stay the same, within rounding.

    Args:
        model: The model.
        deterministic: Results do not depend on the batch.
        consume: Free each matrix once it is copied, unless the model reads them itself.
    """
    if not supported(next(model.parameters()), deterministic=deterministic):
        log.warning("Linear layers are not packed: that needs a CPU that has the kernels")
        return 0
    layers = _layers(model, least=0 if deterministic else _MIN_WEIGHTS)
    consume = consume and not _reads_matrices(model, layers)
    for layer in counted(layers, "Linear layers packed"):
        apply = packed(_matrix(layer), layer.bias, deterministic=deterministic)
        layer.forward = partial(_forward, apply)
        if consume:
            free(layer)
            threads.trim_memory()
    return len(layers)


def free(layer: Any) -> None:
    """Free the matrix of a linear layer; its shape and type stay."""
    layer.weight = nn.Parameter(layer.weight.to("meta"), requires_grad=False)


def _reads_matrices(model: nn.Module, layers: Sequence[Any]) -> bool:
    """Return whether a model needs matrices of linear layers for more than calls of the layers."""
    weights = [layer.weight for layer in layers]
    for layer in layers:
        layer.forward = partial(_zeros, len(_matrix(layer)))
        free(layer)
    ids_1T = torch.zeros((1, 2), dtype=torch.int64)
    given: dict[str, Any] = {"input_ids": ids_1T}
    if getattr(model.config, "is_encoder_decoder", False):
        given["decoder_input_ids"] = ids_1T
    try:
        with torch.inference_mode():
            logits = model(**given, use_cache=False).logits
    # Any model's code may fail where a matrix is gone.
    except Exception:  # noqa: BLE001 - as above
        return True
    else:
        return logits.is_meta or next(model.parameters()).is_meta
    finally:
        for layer, weight in zip(layers, weights, strict=True):
            layer.weight = weight
            del layer.forward


def _zeros(size: int, inputs: Tensor) -> Tensor:
    return inputs.new_zeros((*inputs.shape[:-1], size))


def fix_batches(model: nn.Module) -> None:
    """Let linear layers multiply `FIXED_ROWS` vectors at a time, so that one kernel runs them all.

    A GPU's kernels are chosen by the number of vectors, and may sum in other orders.
    """
    for layer in _layers(model, least=0):
        plain = partial(linear, weight=_matrix(layer), bias=layer.bias)
        layer.forward = partial(_forward, partial(_in_fixed_batches, plain))


def _in_fixed_batches(apply: Linear, inputs: Tensor) -> Tensor:
    padded = pad(inputs, (0, 0, 0, -len(inputs) % FIXED_ROWS))
    return torch.cat([apply(part) for part in padded.split(FIXED_ROWS)])[: len(inputs)]


def _layers(model: nn.Module, *, least: int) -> list[Any]:
    """Return the linear layers of a model with so many weights."""
    layers: list[Any] = [layer for layer in model.modules() if type(layer) in {nn.Linear, Conv1D}]
    return [layer for layer in layers if is_dense(layer) and layer.weight.numel() >= least]


def is_dense(layer: Any) -> bool:
    """Return whether a linear layer computes what its weights say, with numbers that are not coded.

    Libraries of quantised weights replace the layer, its weights or its forward pass.
    """
    forward = vars(layer).get("forward")
    original = forward is None or getattr(forward, "func", None) is _forward
    return type(layer.weight) is nn.Parameter and layer.weight.is_floating_point() and original


def _matrix(layer: Any) -> Tensor:
    return layer.weight.detach().t() if isinstance(layer, Conv1D) else layer.weight.detach()


def _forward(apply: Linear, inputs: Tensor) -> Tensor:
    return apply(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])


def supported(weight: Tensor, *, deterministic: bool = False) -> bool:
    """Return whether there are kernels for matrices like this one."""
    if weight.device.type != "cpu":
        return False
    if widened_linear.helps(weight) and not deterministic:
        return True
    try:
        if weight.dtype == torch.bfloat16:
            return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001 - there is no public one
        return weight.dtype == torch.float32 and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    except (AttributeError, RuntimeError):
        return False


def packed(weight: Tensor, bias: Tensor | None = None, *, deterministic: bool = False) -> Linear:
    """Return the linear layer of a `[out, in]` weight, for inputs `[N, in]`.

    Args:
        weight: A matrix that is `supported`; a copy is kept, or itself if it is widened.
        bias: `[out]`.
        deterministic: Results do not depend on the batch.
    """
    if widened_linear.helps(weight) and not deterministic:
        return widened_linear.WidenedLinear(weight, bias)
    layout = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), None)  # noqa: SLF001 - as above
    kernel: Any = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - as above

    def apply(inputs: Tensor) -> Tensor:
        count = len(inputs)
        more = kernel_rows(count) - count
        if not more:
            return kernel(inputs, layout, bias, "none", [], "")
        return kernel(pad(inputs, (0, 0, 0, more)), layout, bias, "none", [], "")[:count]

    if deterministic:
        return _batch_invariant(apply)
    if weight.dtype == torch.float32 and weight.numel() < _VECTOR_WEIGHTS:
        vector = _numpy_vector(weight, bias)
        return lambda inputs: vector(inputs) if inputs.shape[0] == 1 else apply(inputs)
    return apply


def kernel_rows(count: int) -> int:
    """Return for how many vectors the kernel is that multiplies `count`: at most an eighth more."""
    step = 1 << max(0, (count - 1).bit_length() - 4)
    return -(-count // step) * step


def _numpy_vector(weight: Tensor, bias: Tensor | None) -> Linear:
    """Return the layer for one vector; numpy takes half the time of torch for that."""
    matrix = weight.detach().numpy().T
    offset = None if bias is None else bias.detach().numpy()

    def multiply(vector: Tensor) -> Tensor:
        product = vector.numpy() @ matrix
        return torch.from_numpy(product if offset is None else product + offset)

    return multiply


def _batch_invariant(apply: Linear) -> Linear:
    """Return the layer with results that do not depend on the batch."""

    def multiply(inputs: Tensor) -> Tensor:
        if inputs.shape[0] == 1:
            return apply(inputs.expand(2, -1))[:1]
        if inputs.shape[0] <= _MAX_BATCH:
            return apply(inputs)
        return torch.cat([multiply(part) for part in inputs.split(_MAX_BATCH)])

    return multiply
