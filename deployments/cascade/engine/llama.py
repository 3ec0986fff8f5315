"""The weights of a Llama-like model as the lean path takes them: fewer and larger matrices.

Shapes: `T` tokens, `C` hidden size, `D` head size, `P` positions, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear as plain_linear
from torch.nn.functional import silu

from cascade.engine import packing, rope
from cascade.engine.probe import Unsuited

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

    from cascade.engine.packing import Linear

_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class Norm:
    """Division of each row by its root mean square, and a weight per column."""

    def __init__(self, module: Any) -> None:
        size = module.weight.numel()
        # x / sqrt(|x|^2 / n + eps) = sqrt(n) x / hypot(|x|, sqrt(n eps)).
        self._weight_C = module.weight.detach().float() * math.sqrt(size)
        self._floor = torch.tensor(math.sqrt(size * module.variance_epsilon))

    def __call__(self, hidden_TC: Tensor) -> Tensor:
        """Return the normalised rows."""
        length_T1 = torch.linalg.vector_norm(hidden_TC, dim=-1, keepdim=True, dtype=torch.float32)
        scaled_TC = hidden_TC / torch.hypot(length_T1, self._floor)
        return scaled_TC.mul_(self._weight_C).to(hidden_TC.dtype)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Attention and then the gated network, each after its norm."""

    before: Norm
    heads: Linear  # to queries, keys and values
    query_norm: Norm | None
    key_norm: Norm | None
    out: Linear
    between: Norm
    gates: Linear  # to gate and up
    activation: Callable[[Tensor], Tensor]
    down: Linear


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """A model."""

    embedding_VC: Tensor
    layers: Sequence[Layer]
    norm: Norm
    head: Linear
    rotary: Any  # the model's own module: it knows every way of scaling positions
    query_heads: int
    key_heads: int
    size: int  # of a head
    scale: float  # of the scores


def read(model: PreTrainedModel, *, packed: bool, deterministic: bool) -> Weights:
    """Return the weights of `model`, which keeps its own.

    Raises:
        Unsuited: if it is not a Llama-like model on a CPU.
    """
    _check(model)
    body: Any = model.model
    attention = body.layers[0].self_attn
    join = _Joiner(packed=packed, deterministic=deterministic)
    size = int(attention.head_dim)
    return Weights(
        embedding_VC=body.embed_tokens.weight.detach(),
        layers=[_layer(layer, join) for layer in body.layers],
        norm=Norm(body.norm),
        head=join(model.get_output_embeddings()),
        rotary=body.rotary_emb,
        query_heads=attention.q_proj.weight.shape[0] // size,
        key_heads=attention.k_proj.weight.shape[0] // size,
        size=size,
        scale=float(attention.scaling),
    )


def drop(model: PreTrainedModel) -> None:
    """Free the matrices of a model whose weights were read, but for the embedding."""
    kept = model.get_input_embeddings().weight
    for module in model.modules():
        if isinstance(module, nn.Linear) and module.weight is not kept:
            module.weight = nn.Parameter(module.weight.to("meta"), requires_grad=False)


def rotations(weights: Weights, *, positions: int) -> tuple[Tensor, Tensor]:
    """Return cosines and signed sines `[P, 1, D]`: turned = x cos + swapped halves of x sin."""
    places_1P = torch.arange(positions)[None]
    cos_1PD, sin_1PD = weights.rotary(torch.empty(0), places_1P)
    sign_D = torch.ones(weights.size)
    sign_D[: weights.size // 2] = -1
    return cos_1PD[0, :, None].contiguous(), (sin_1PD[0, :, None] * sign_D).contiguous()


def _check(model: PreTrainedModel) -> None:
    if type(model).__name__ not in _MODELS:
        raise Unsuited("it is no Llama-like model")
    if model.device.type != "cpu" or model.dtype not in {torch.float32, torch.bfloat16}:
        raise Unsuited("it is for float32 and bfloat16 on a CPU")
    found = rope.find(model)
    if found.original or found.dynamic:
        raise Unsuited("its rotations depend on the length of a pass")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Joiner:
    """Makes one linear map of several modules that read the same rows."""

    packed: bool
    deterministic: bool

    def __call__(self, *modules: Any) -> Linear:
        biases = [module.bias for module in modules]
        weight = torch.cat([module.weight.detach() for module in modules])
        bias = None if biases[0] is None else torch.cat([b.detach() for b in biases])
        if self.packed and packing.supported(weight):
            return packing.packed(weight, bias, deterministic=self.deterministic)
        return lambda rows: plain_linear(rows, weight, bias)


def _layer(layer: Any, join: _Joiner) -> Layer:
    attention, network = layer.self_attn, layer.mlp
    return Layer(
        before=Norm(layer.input_layernorm),
        heads=join(attention.q_proj, attention.k_proj, attention.v_proj),
        query_norm=_norm(attention, "q_norm"),
        key_norm=_norm(attention, "k_norm"),
        out=join(attention.o_proj),
        between=Norm(layer.post_attention_layernorm),
        gates=join(network.gate_proj, network.up_proj),
        activation=_activation(network.act_fn),
        down=join(network.down_proj),
    )


def _norm(attention: Any, name: str) -> Norm | None:
    module = getattr(attention, name, None)
    return None if module is None else Norm(module)


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the activation as a function where it is the usual one."""
    return silu if type(module).__name__ in {"SiLU", "SiLUActivation"} else module
