"""The weights of a Llama-like model as the lean path takes them: fewer and larger matrices.

Shapes: `T` tokens, `C` hidden size, `D` head size, `O` outputs, `P` positions, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from cascade.engine import rope
from cascade.engine.backends.mask_probe import Unsuited

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

Map = TypeVar("Map")

_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class Norm:
    """Division of each row by its root mean square, and a weight per column.

    In float32 the weight is left to the matrix that reads the rows: `folded` multiplies it in.
    """

    def __init__(self, module: Any, *, weight_C: Tensor | None = None) -> None:
        size = module.weight.numel()
        # x / sqrt(|x|^2 / n + eps) = sqrt(n) x / hypot(|x|, sqrt(n eps)).
        own_C = module.weight if weight_C is None else weight_C
        self.weight_C = own_C.detach().float() * math.sqrt(size)
        self.floor = math.sqrt(size * module.variance_epsilon)
        self._floor = torch.tensor(self.floor)
        self.weighs = True

    def folded(self, weight: Tensor) -> Tensor:
        """Return a matrix `[out, C]` that takes the rows without their weight, which it has."""
        if weight.dtype != torch.float32:
            return weight
        self.weighs = False
        return weight * self.weight_C

    def __call__(self, hidden_TC: Tensor) -> Tensor:
        """Return the normalised rows."""
        length_T1 = torch.linalg.vector_norm(hidden_TC, dim=-1, keepdim=True, dtype=torch.float32)
        scaled_TC = hidden_TC / torch.hypot(length_T1, self._floor)
        return scaled_TC.mul_(self.weight_C).to(hidden_TC.dtype) if self.weighs else scaled_TC


@dataclass(frozen=True, slots=True, kw_only=True)
class Matrix:
    """A linear map of rows."""

    weight_OC: Tensor
    bias_O: Tensor | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer(Generic[Map]):
    """Attention and then the gated network, each after its norm."""

    before: Norm
    heads: Map  # to queries, keys and values
    query_norm: Norm | None
    key_norm: Norm | None
    out: Map
    between: Norm
    gates: Map  # to gate and up
    activation: Callable[[Tensor], Tensor]
    down: Map


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Generic[Map]):
    """A model."""

    embedding_VC: Tensor
    layers: Sequence[Layer[Map]]
    norm: Norm
    head: Map
    rotary: Any  # the model's own module: it knows every way of scaling positions
    query_heads: int
    key_heads: int
    size: int  # of a head
    scale: float  # of the scores


def read(model: PreTrainedModel, make: Callable[[Matrix], Map]) -> Weights[Map]:
    """Return the weights of `model`, which keeps its own.

    Args:
        model: any.
        make: puts a matrix into the form that is wanted; one at a time, since each is a copy.

    Raises:
        Unsuited: if it is not a Llama-like model on a CPU.
    """
    _check(model)
    body: Any = model.model
    attention = body.layers[0].self_attn
    size = int(attention.head_dim)
    norm = Norm(body.norm)
    return Weights(
        embedding_VC=body.embed_tokens.weight.detach(),
        layers=[_layer(layer, make) for layer in body.layers],
        norm=norm,
        head=make(_join(norm, model.get_output_embeddings())),
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


def rotations(weights: Weights[Any], *, positions: int) -> Tensor:
    """Return the turn of each position, complex `[P, 1, D / 2]`, for heads that `_paired` made."""
    places_1P = torch.arange(positions)[None]
    cos_1PD, sin_1PD = weights.rotary(torch.empty(0), places_1P)
    half = weights.size // 2
    return torch.complex(cos_1PD[0, :, None, :half], sin_1PD[0, :, None, :half])


def _check(model: PreTrainedModel) -> None:
    if type(model).__name__ not in _MODELS:
        raise Unsuited("it is no Llama-like model")
    if model.device.type != "cpu" or model.dtype not in {torch.float32, torch.bfloat16}:
        raise Unsuited("it is for float32 and bfloat16 on a CPU")
    found = rope.find(model)
    if found.original or found.dynamic:
        raise Unsuited("its rotations depend on the length of a pass")


def _join(norm: Norm | None, *modules: Any, paired: int = 0, size: int = 2) -> Matrix:
    """Return the map of rows that `norm` gives by several modules that read the same rows.

    Heads of the first `paired` modules turn.
    """
    states = [[module.weight.detach(), module.bias] for module in modules]
    for state in states[:paired]:
        state[:] = [None if one is None else _paired(one.detach(), size) for one in state]
    weight = torch.cat([weight for weight, _ in states])
    bias = None if states[0][1] is None else torch.cat([bias.detach() for _, bias in states])
    return Matrix(weight_OC=weight if norm is None else norm.folded(weight), bias_O=bias)


def _paired(states: Tensor, size: int) -> Tensor:
    """Return rows of heads, or their weights, with those that turn together side by side.

    A head's first half is turned against its second; scores do not depend on the order, as long as
    queries and keys share it.
    """
    halves = states.unflatten(0, (-1, 2, size // 2))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _layer(layer: Any, make: Callable[[Matrix], Map]) -> Layer[Map]:
    attention, network = layer.self_attn, layer.mlp
    before, between = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    return Layer(
        before=before,
        heads=make(_join(before, *projections, paired=2, size=int(attention.head_dim))),
        query_norm=_head_norm(attention, "q_norm"),
        key_norm=_head_norm(attention, "k_norm"),
        out=make(_join(None, attention.o_proj)),
        between=between,
        gates=make(_join(between, network.gate_proj, network.up_proj)),
        activation=_activation(network.act_fn),
        down=make(_join(None, network.down_proj)),
    )


def _head_norm(attention: Any, name: str) -> Norm | None:
    module = getattr(attention, name, None)
    if module is None:
        return None
    return Norm(module, weight_C=_paired(module.weight, int(attention.head_dim)))


def _activation(module: Any) -> Callable[[Tensor], Tensor]:
    """Return the activation as a function where it is the usual one."""
    return silu if type(module).__name__ in {"SiLU", "SiLUActivation"} else module
