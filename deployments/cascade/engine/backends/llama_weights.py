"""The weights of a Llama-like model for the `lean` path: fewer and larger matrices.

Shapes: `T` tokens, `C` hidden size, `D` head size, `O` outputs, `P` positions, `V` vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from cascade.engine import threads
from cascade.engine.backends.base import PathUnsupported, RopeLengths, find_rope_lengths
from cascade.engine.backends.prepacked_linear import free, is_dense
from cascade.engine.progress import counted

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from transformers import PreTrainedModel

LinearT = TypeVar("LinearT")

MakeLinear: TypeAlias = "Callable[[Tensor, Tensor | None], LinearT]"

_MODELS = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}


class Norm:
    """RMS norm with a weight per column.

    In float32 the weight may be left to the matrix that reads the result: see `fold_into`.
    """

    def __init__(self, module: Any, *, weight_C: Tensor | None = None) -> None:
        size = module.weight.numel()
        # x / sqrt(|x|^2 / n + eps) = sqrt(n) x / hypot(|x|, sqrt(n eps)).
        own_C = module.weight if weight_C is None else weight_C
        self.weight_C = own_C.detach().float() * math.sqrt(size)
        self.floor = math.sqrt(size * module.variance_epsilon)
        self._floor = torch.tensor(self.floor)
        self.has_weight = True

    def fold_into(self, weight: Tensor) -> Tensor:
        """Move the norm's weight into a matrix `[out, C]` if that is float32; return the matrix."""
        if weight.dtype != torch.float32:
            return weight
        self.has_weight = False
        return weight * self.weight_C

    def __call__(self, hidden_TC: Tensor) -> Tensor:
        """Return the normalised vectors."""
        length_T1 = torch.linalg.vector_norm(hidden_TC, dim=-1, keepdim=True, dtype=torch.float32)
        scaled_TC = hidden_TC / torch.hypot(length_T1, self._floor)
        return scaled_TC.mul_(self.weight_C).to(hidden_TC.dtype) if self.has_weight else scaled_TC


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer(Generic[LinearT]):
    """Attention and gated MLP, each after its norm."""

    attention_norm: Norm
    qkv: LinearT  # to queries, keys and values
    query_norm: Norm | None
    key_norm: Norm | None
    output: LinearT
    mlp_norm: Norm
    gate_up: LinearT
    activation: Callable[[Tensor], Tensor]
    down: LinearT


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights(Generic[LinearT]):
    """A model."""

    embedding_VC: Tensor
    layers: Sequence[Layer[LinearT]]
    final_norm: Norm
    lm_head: LinearT
    rotary: Any  # the model's own module, which knows its RoPE scaling
    query_heads: int
    key_heads: int
    head_size: int
    scale: float  # of the scores

    def reader(self, index: int) -> tuple[Norm, LinearT]:
        """Return what reads the hidden states of a layer: the next one's attention, or the head."""
        if index + 1 == len(self.layers):
            return self.final_norm, self.lm_head
        return self.layers[index + 1].attention_norm, self.layers[index + 1].qkv


def read(
    model: PreTrainedModel, make: MakeLinear[LinearT], *, consume: bool = False
) -> Weights[LinearT]:
    """Return the weights of `model`, with a linear layer that `make` builds of each matrix.

    Args:
        model: The model.
        make: Builds a linear layer of a weight `[out, in]` and a bias.
        consume: Free the matrices of each layer once they are read, except the embedding.

    Raises:
        PathUnsupported: It is not a Llama-like model on a CPU.
    """
    if type(model).__name__ not in _MODELS:
        raise PathUnsupported("it is not a Llama-like model")
    if model.device.type != "cpu" or model.dtype not in {torch.float32, torch.bfloat16}:
        raise PathUnsupported("it is for float32 and bfloat16 on a CPU")
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    coded = not all(type(one) is nn.Linear and is_dense(one) for one in linears)
    if coded or getattr(model, "hf_quantizer", None) is not None:
        raise PathUnsupported("its weights are quantised")
    if find_rope_lengths(model) != RopeLengths():
        raise PathUnsupported("its rotations depend on the length of a pass")
    body: Any = model.model
    attention = body.layers[0].self_attn
    size = int(attention.head_dim)
    norm = Norm(body.norm)
    weights = Weights(
        embedding_VC=body.embed_tokens.weight.detach(),
        layers=[
            _layer(layer, make, consume=consume)
            for layer in counted(body.layers, "Layers converted")
        ],
        final_norm=norm,
        lm_head=_join(make, norm, model.get_output_embeddings()),
        rotary=body.rotary_emb,
        query_heads=attention.q_proj.weight.shape[0] // size,
        key_heads=attention.k_proj.weight.shape[0] // size,
        head_size=size,
        scale=float(attention.scaling),
    )
    if consume:
        _free(model)
    return weights


def _free(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            free(layer)
    threads.trim_memory()


def rotations(weights: Weights[Any], *, positions: int) -> Tensor:
    """Return each position's rotation, complex `[P, 1, D / 2]`, for `_interleave`d heads."""
    positions_1P = torch.arange(positions)[None]
    cos_1PD, sin_1PD = weights.rotary(torch.empty(0), positions_1P)
    half = weights.head_size // 2
    return torch.complex(cos_1PD[0, :, None, :half], sin_1PD[0, :, None, :half])


def _join(
    make: MakeLinear[LinearT], norm: Norm | None, *modules: Any, rotated: int = 0, size: int = 2
) -> LinearT:
    """Return one linear layer for several that read the same input, the output of `norm`.

    The heads of the first `rotated` modules, of `size` each, are interleaved.
    """
    states = [[module.weight.detach(), module.bias] for module in modules]
    for state in states[:rotated]:
        state[:] = [None if one is None else _interleave(one.detach(), size) for one in state]
    weight = torch.cat([weight for weight, _ in states])
    bias = None if states[0][1] is None else torch.cat([bias.detach() for _, bias in states])
    return make(weight if norm is None else norm.fold_into(weight), bias)


def _interleave(states: Tensor, size: int) -> Tensor:
    """Return the columns of heads, or their weights, with those that rotate together adjacent.

    RoPE rotates a head's first half against its second; scores do not depend on the order as long
    as queries and keys share it.
    """
    halves = states.unflatten(0, (-1, 2, size // 2))
    return halves.transpose(1, 2).flatten(0, 2).contiguous()


def _layer(layer: Any, make: MakeLinear[LinearT], *, consume: bool) -> Layer[LinearT]:
    attention, mlp = layer.self_attn, layer.mlp
    attention_norm, mlp_norm = Norm(layer.input_layernorm), Norm(layer.post_attention_layernorm)
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    size = int(attention.head_dim)
    result = Layer(
        attention_norm=attention_norm,
        qkv=_join(make, attention_norm, *projections, rotated=2, size=size),
        query_norm=_head_norm(attention, "q_norm"),
        key_norm=_head_norm(attention, "k_norm"),
        output=_join(make, None, attention.o_proj),
        mlp_norm=mlp_norm,
        gate_up=_join(make, mlp_norm, mlp.gate_proj, mlp.up_proj),
        activation=silu if type(mlp.act_fn).__name__ in {"SiLU", "SiLUActivation"} else mlp.act_fn,
        down=_join(make, None, mlp.down_proj),
    )
    if consume:
        _free(layer)
    return result


def _head_norm(attention: Any, name: str) -> Norm | None:
    module = getattr(attention, name, None)
    if module is None:
        return None
    return Norm(module, weight_C=_interleave(module.weight, int(attention.head_dim)))
