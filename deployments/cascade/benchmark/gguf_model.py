"""GGUF files for llama.cpp, made of the weights that our engine runs: the same numbers and type.

Prompts and answers are token ids, so the vocabulary of the file has made-up names. Only Llamas are
converted, which synthetic models are too:

* llama.cpp rotates neighbouring dimensions of a head and transformers those half a head apart, so
  the rows of `q_proj` and `k_proj` are permuted;
* scaled rotary frequencies are written as factors; llama.cpp has none that depend on the length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from cascade.errors import UnsupportedModel
from cascade.evaluation.scoring import import_extra

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor
    from transformers import PreTrainedModel

_TYPES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
_FILE_TYPES = {"F32": "ALL_F32", "BF16": "MOSTLY_BF16", "F16": "MOSTLY_F16"}
_STOPS = ("eos", "eot", "eom")  # the ends of an answer that a file can name

_ENDS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
_OF_A_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_ROTATED = ("self_attn.q_proj", "self_attn.k_proj")


def write(model: PreTrainedModel, path: Path, *, stop_ids: Sequence[int]) -> None:
    """Write a Llama as a GGUF file of the type that it has in memory.

    Args:
        model: The model.
        path: The file.
        stop_ids: Tokens that end an answer.

    Raises:
        UnsupportedModel: It is no Llama that llama.cpp computes as transformers does.
        InvalidMeasurement: The package gguf is not installed.
    """
    gguf = import_extra("gguf", extra="peers")
    config, weight_type = _checked(model, stop_ids)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[weight_type]])
    _add_vocabulary(writer, config.vocab_size, stop_ids)
    for name, tensor in _tensors(model):
        kind = gguf.GGMLQuantizationType[weight_type if tensor.ndim > 1 else "F32"]
        nbytes = tensor.numel() * (tensor.element_size() if tensor.ndim > 1 else 4)
        writer.add_tensor_info(name, tensor.shape, None, nbytes, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, tensor in _tensors(model):
        # llama.cpp has norms in float32, whatever the type of the rest; numpy has no bfloat16.
        stored = tensor if tensor.ndim > 1 else tensor.float()
        writer.write_tensor_data(stored.cpu().contiguous().view(torch.uint8).numpy())
    writer.close()


def _checked(model: PreTrainedModel, stop_ids: Sequence[int]) -> tuple[Any, str]:
    """Return the configuration and the name of the type of the weights."""
    config: Any = model.config
    types = {parameter.dtype for parameter in model.parameters()}
    rope: Any = config.rope_parameters if config.model_type == "llama" else {}
    reasons = {
        f"is a {config.model_type}": config.model_type != "llama",
        "has biases": any(name.endswith(".bias") for name in model.state_dict()),
        f"has weights of {len(types)} types, or quantised ones": not (
            len(types) == 1 and types <= _TYPES.keys()
        ),
        f"has the rotary embedding {rope.get('rope_type')}": rope.get("rope_type")
        not in {"default", "linear", "llama3"},
        f"ends at any of {len(stop_ids)} tokens": len(stop_ids) > len(_STOPS),
    }
    if reason := next((reason for reason, true in reasons.items() if true), None):
        raise UnsupportedModel(
            f"No GGUF file can be made of this model, because it {reason}; only Llamas without"
            f" biases, with full weights and up to {len(_STOPS)} stop tokens are converted"
        )
    return config, _TYPES[types.pop()]


def _add_vocabulary(writer: Any, size: int, stop_ids: Sequence[int]) -> None:
    """Add names of tokens; llama.cpp serves no model without a vocabulary and merges."""
    names = [f"<{token}>" for token in range(size)]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(names)
    writer.add_token_merges([" ".join(names[:2])])
    for kind, token in zip(_STOPS, stop_ids, strict=False):
        getattr(writer, f"add_{kind}_token_id")(token)


def _tensors(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a file and their names."""
    whole: Any = model
    config = whole.config
    width = config.head_dim
    for key, tensor in model.state_dict().items():
        name = key.removesuffix(".weight")
        if name in _ENDS:
            if name != "lm_head" or not config.tie_word_embeddings:
                yield f"{_ENDS[name]}.weight", tensor
            continue
        _, _, layer, part = name.split(".", 3)
        if part in _ROTATED:
            halves = tensor.unflatten(0, (-1, 2, width // 2))
            tensor = halves.transpose(1, 2).reshape(tensor.shape)  # noqa: PLW2901 - its new form
        yield f"blk.{layer}.{_OF_A_LAYER[part]}.weight", tensor
    if config.rope_parameters["rope_type"] != "default":
        exponents = torch.arange(0, width, 2, dtype=torch.float32) / width
        plain = config.rope_parameters["rope_theta"] ** -exponents
        yield "rope_freqs.weight", plain / whole.model.rotary_emb.inv_freq.cpu().float()
