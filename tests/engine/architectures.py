"""Tiny models with random weights, one per kind of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cascade.engine.model_loader import required_attention

if TYPE_CHECKING:
    from collections.abc import Iterable

VOCABULARY = 211
_WINDOW = 16
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GPT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "n_embd": 64,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
}
_ALTERNATING = ["sliding_attention", "full_attention"] * 2
_ROPE_HALF = 8  # frequencies of a head of 16

# Each architecture by a name of ours: model type, and settings that differ from the common ones.
VARLEN: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 sliding": (
        "qwen2",
        {"use_sliding_window": True, "sliding_window": _WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "gemma": ("gemma", {"head_dim": 32}),
    "gemma2": (
        "gemma2",
        {"head_dim": 32, "sliding_window": _WINDOW, "query_pre_attn_scalar": 32},
    ),
    "gemma3": (
        "gemma3_text",
        {
            "head_dim": 32,
            "sliding_window": _WINDOW,
            "query_pre_attn_scalar": 32,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
        },
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral sliding": ("mistral", {"sliding_window": _WINDOW}),
    "gpt2": ("gpt2", _GPT),
    "gpt-neox": ("gpt_neox", {"num_key_value_heads": None}),
    "phi3": ("phi3", {}),
    "olmo2": ("olmo2", {}),
    "mixtral": ("mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2-moe": ("qwen2_moe", {**_EXPERTS, "shared_expert_intermediate_size": 48}),
    "qwen2-moe sliding": (
        "qwen2_moe",
        {
            **_EXPERTS,
            "shared_expert_intermediate_size": 48,
            "use_sliding_window": True,
            "sliding_window": _WINDOW,
            "max_window_layers": 2,
        },
    ),
    "qwen3-moe": ("qwen3_moe", {**_EXPERTS, "head_dim": 32}),
    "gpt-oss": (
        "gpt_oss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 32,
            "sliding_window": _WINDOW,
        },
    ),
    "deepseek-v3": (
        "deepseek_v3",
        {
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 16,
            "qk_nope_head_dim": 16,
            "v_head_dim": 24,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 48,
            "first_k_dense_replace": 1,
            "num_key_value_heads": 4,
        },
    ),
}
PADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": ("falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}),
    "falcon alibi": ("falcon", {"alibi": True, "multi_query": False}),
    "bloom": (
        "bloom",
        {"vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 4, "n_head": 4},
    ),
    "gpt-j": ("gptj", {**_GPT, "rotary_dim": 8}),
    "diffllama": ("diffllama", {}),
    "llama4": (
        "llama4_text",
        {
            "num_local_experts": 2,
            "intermediate_size_mlp": 96,
            "attention_chunk_size": _WINDOW,
            "head_dim": 16,
        },
    ),
}
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "cohere": ("cohere", {}),
    "cohere2": ("cohere2", {"sliding_window": _WINDOW}),
    "phi": ("phi", {}),
    "starcoder2": ("starcoder2", {"sliding_window": None}),
    "starcoder2 sliding": ("starcoder2", {"sliding_window": _WINDOW}),
    "stablelm": ("stablelm", {}),
    "opt": ("opt", {"ffn_dim": 96, "word_embed_proj_dim": 64}),
    "gemma3n": (
        "gemma3n_text",
        {
            "head_dim": 32,
            "sliding_window": _WINDOW,
            "num_kv_shared_layers": 2,
            "layer_types": _ALTERNATING,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
            "altup_num_inputs": 2,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "head_dim": 32,
            "global_head_dim": 32,
            "sliding_window": _WINDOW,
            "layer_types": _ALTERNATING,
            "num_kv_shared_layers": 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 16,
        },
    ),
    "granite": ("granite", {}),
    "granite-moe": ("granitemoe", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "olmo": ("olmo", {}),
    "olmo3": ("olmo3", {"sliding_window": _WINDOW}),
    "olmoe": ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "glm": ("glm", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "glm4": ("glm4", {"head_dim": 16, "partial_rotary_factor": 0.5}),
    "exaone4": ("exaone4", {"sliding_window": _WINDOW, "sliding_window_pattern": 4}),
    "smollm3": ("smollm3", {}),
    "gpt-bigcode": ("gpt_bigcode", _GPT),
    "nemotron": ("nemotron", {}),
    "apertus": ("apertus", {}),
    "ernie4.5": ("ernie4_5", {}),
    "helium": ("helium", {"head_dim": 16}),
    "persimmon": ("persimmon", {"num_key_value_heads": None}),
    "biogpt": ("biogpt", {}),
    "hunyuan": ("hunyuan_v1_dense", {"head_dim": 16}),
    "seed-oss": ("seed_oss", {"head_dim": 16}),
    "arcee": ("arcee", {}),
    "doge": ("doge", {}),
    "codegen": ("codegen", {**_GPT, "rotary_dim": 8}),
    "gpt-neo": (
        "gpt_neo",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 64,
            "num_layers": 4,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 2]],
            "window_size": _WINDOW,
            "max_position_embeddings": 512,
        },
    ),
    "mpt": (
        "mpt",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 4,
            "max_seq_len": 512,
        },
    ),
    "xglm": (
        "xglm",
        {
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "ffn_dim": 96,
            "num_layers": 4,
            "attention_heads": 4,
            "max_position_embeddings": 512,
        },
    ),
    "yarn": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
    ),
    "llama3 rope": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
    ),
}
_LONGROPE: dict[str, Any] = {
    "rope_type": "longrope",
    "short_factor": [1.0] * _ROPE_HALF,
    "long_factor": [4.0] * _ROPE_HALF,
    "original_max_position_embeddings": 64,
    "rope_theta": 10000.0,
}
_DYNAMIC: dict[str, Any] = {"rope_type": "dynamic", "factor": 8.0, "rope_theta": 10000.0}
ROPE: dict[str, tuple[str, dict[str, Any]]] = {
    "longrope": (
        "phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": _LONGROPE},
    ),
    "longrope llama": ("llama", {"rope_parameters": _LONGROPE}),
    "longrope moe": (
        "phimoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
            "original_max_position_embeddings": 64,
            "rope_parameters": {**_LONGROPE, "short_mscale": 1.1, "long_mscale": 1.4},
        },
    ),
    "dynamic": ("llama", {"max_position_embeddings": 64, "rope_parameters": _DYNAMIC}),
    # What transformers reads is the largest position, whatever else is named.
    "dynamic of another original length": (
        "qwen2",
        {
            "max_position_embeddings": 64,
            "rope_parameters": {**_DYNAMIC, "original_max_position_embeddings": 32},
        },
    ),
    "two kinds of layers": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": _WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "sliding_attention": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                    "rope_theta": 10000.0,
                },
                "full_attention": _LONGROPE,
            },
        },
    ),
    "two original lengths": (
        "gemma3_text",
        {
            "head_dim": 16,
            "sliding_window": _WINDOW,
            "query_pre_attn_scalar": 16,
            "layer_types": _ALTERNATING,
            "rope_parameters": {
                "sliding_attention": {**_LONGROPE, "original_max_position_embeddings": 40},
                "full_attention": _LONGROPE,
            },
        },
    ),
}
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "mamba": ("mamba", {"vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2}),
    "jamba": (
        "jamba",
        {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4},
    ),
    "minimax": ("minimax", {"num_local_experts": 4}),
    "bert": ("bert", {}),
}
LLAMA_LIKE = [
    *("llama", "qwen2", "qwen2 sliding", "qwen3", "mistral", "mistral sliding"),
    *("yarn", "llama3 rope"),
]
ALL = VARLEN | PADDED | MORE | ROPE | REFUSED
_OWN_KEYS = {
    "gpt2",
    "gptj",
    "codegen",
    "gpt_bigcode",
    "bloom",
    "gpt_neo",
    "mpt",
    "xglm",
    "mamba",
}


def with_slow(names: Iterable[str], *, fast: Iterable[str]) -> list[Any]:
    """Return names as parameters of a test, of which all but the fast run in the slow suite."""
    fast = set(fast)
    return [name if name in fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def build(name: str, **settings: Any) -> PreTrainedModel:
    """Return the model, with weights large enough for its logits to differ.

    Args:
        name: One of `ALL`.
        settings: Replace those of its configuration.
    """
    kind, overrides = ALL[name]
    common = {} if kind in _OWN_KEYS else _COMMON
    torch.manual_seed(0)
    config = CONFIG_MAPPING[kind](**(common | overrides | settings))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=required_attention(config))
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.dim() > 1:
                weight.mul_(4.0)
            elif "bias" in weight_name:
                weight.normal_(0, 0.1)
    return model.eval()
