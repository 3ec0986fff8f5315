"""Tiny configurations of any type that transformers knows: its default one with smaller numbers.

A number is found by the name of its setting. What several settings have to agree on, they agree on:
4 heads of 16 channels are 64, and a RoPE rotates 16 of them in 8 pairs. Windows and chunks are 16
tokens and original RoPE lengths 64, so that short texts pass them.
"""

from __future__ import annotations

import re
from typing import Any, cast

from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, POSITIONS, WINDOW, ROPE_LENGTH = 211, 512, 16, 64
_HIDDEN, _INNER, _LAYERS, _HEADS, _KEY_HEADS, _HEAD_SIZE = 64, 96, 4, 4, 2, 16

_INNER_NAME = r"(\w+_)?(intermediate_size(_\w+)?|ffn_dim|ffn_hidden_size|d_ff|n_inner|mlp_dim)"

# The first pattern that matches the whole name of a setting gives its value.
_VALUES: tuple[tuple[str, Any], ...] = (
    (r"(\w+_)?vocab_size(_\w+)?", VOCABULARY),
    (r"(pad|bos|eos|sep|cls|unk|mask|decoder_start)_token_id", 1),
    (r"(\w+_)?(token_id|token_index)", VOCABULARY - 1),
    (r"(\w+_)?token_ids", None),
    (r"hidden_size_per_layer_input|laurel_rank", 16),
    (r"moe_\w*(intermediate|ffn)\w*|shared_expert_intermediate_size", 48),
    (_INNER_NAME, _INNER),
    (r"(q|o)_lora_rank|index_head_dim", 32),
    (r"kv_lora_rank|qk_rope_head_dim|qk_nope_head_dim|v_head_dim|rotary_dim", 16),
    (r"qk_head_dim", 32),
    (r"(\w+_)?head_dim|kv_channels|(\w+_)?head_size|d_kv|attention_key_length", _HEAD_SIZE),
    (r"(\w+_)?(hidden_size|d_model|n_embd|hidden_dim|embed_dim|embedding_size|dim)", _HIDDEN),
    (r"word_embed_proj_dim|d_embed|model_dim", _HIDDEN),
    (r"num_kv_shared_layers|first_k_dense_replace|num_dense_layers", 1),
    (r"num_nextn_predict_layers|num_mtp_modules|mtp_num_hidden_layers", 0),
    (r"(num_hidden|num|decoder|encoder|n|num_decoder|num_encoder)_layers?|depth", _LAYERS),
    (r"(\w+_)?(num_)?(query_)?(attention_heads|num_heads|n_heads?)|num_q_heads", _HEADS),
    (r"n_shared_experts|num_shared_experts|moe_num_shared_experts|n_group|topk_group", 1),
    (r"(\w+_)?(num|n)_(local_|routed_|null_)?experts|num_experts|moe_num_experts", 4),
    (r"(\w+_)?(experts_per_tok(en)?|moe_topk|moe_top_k|moe_k|experts_top_k|top_k_experts)", 2),
    (r"(\w+_)?(sliding_window|window_size|attention_chunk_size|local_attention)", WINDOW),
    (r"max_(target_|source_)?positions|max_position_embeddings|n_positions|n_ctx", POSITIONS),
    (r"max_(seq_len|seq_length|sequence_length)|seq_length|model_max_length", POSITIONS),
    (r"original_max_position_embeddings", ROPE_LENGTH),
    (r"index_topk|index_top_k", WINDOW),
    (r"index_n_heads", 4),
    (r"image_size|img_size", 28),
    (r"patch_size", 14),
)


def _mrope(*section: int) -> dict[str, Any]:
    """Return the part of a configuration whose RoPE has parts for time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(section)}
    return {"text_config": {"rope_parameters": rope}}


_DERIVED = {"transformers_version", "architectures", "dtype", "torch_dtype", "attention_layers"}

# What the default configuration does not say, or says of a model that is no real one.
_OVERRIDES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker"), _mrope(2, 3, 3)),
    **dict.fromkeys(("glm4v", "glm46v", "paddleocr_vl"), _mrope(2, 3, 3)),
    **dict.fromkeys(("glm4v_moe", "glmga", "glm_ocr"), _mrope(2, 1, 1)),
    "hunyuan_v1_dense": {"head_dim": _HEAD_SIZE},
    "hunyuan_v1_moe": {"head_dim": _HEAD_SIZE},
    "hunyuan_vl": {"text_config": {"head_dim": _HEAD_SIZE}},
    "ministral": {"head_dim": _HEAD_SIZE},
    "nemotron": {"num_key_value_heads": _KEY_HEADS},
    "blenderbot": {"max_position_embeddings": POSITIONS},
    "dots1": {"n_routed_experts": 4},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"] * 2}},
    "reformer": {"is_decoder": True},
    "mamba2": {"num_heads": 8},
    "xlnet": {"d_head": _HEAD_SIZE},
    "gemma4_assistant": {"text_config": {"hidden_size_per_layer_input": 0}},
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "falcon_h1": {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_ssm": 128},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "step3p7": {"text_config": {"sliding_window": WINDOW}},
}


def tiny_config(kind: str, **settings: Any) -> Any:
    """Return a small configuration of a model type.

    Args:
        kind: As in `config.json`.
        settings: Replace those found by name.
    """
    config_class = CONFIG_MAPPING[kind]
    smaller = _smaller(config_class().to_dict())
    return config_class(**_merged(smaller, _OVERRIDES.get(kind, {}) | settings))


def _merged(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Return settings with others in their place, also inside of parts."""
    merged = dict(settings)
    for name, value in others.items():
        inside = merged.get(name)
        both = isinstance(inside, dict) and isinstance(value, dict) and name != "rope_parameters"
        merged[name] = _merged(cast("dict[str, Any]", inside), value) if both else value
    return merged


def _smaller(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a configuration or of a part of it, with smaller numbers."""
    heads = next((settings[n] for n in ("num_attention_heads", "n_heads") if settings.get(n)), None)
    layers = settings.get("num_hidden_layers")
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if name in _DERIVED:
            continue
        if isinstance(value, dict):
            found[name] = _part(name, cast("dict[str, Any]", value))
        elif isinstance(value, list | tuple):
            found[name] = _list(name, list(cast("list[Any]", value)), layers=layers)
        elif not isinstance(value, int) or isinstance(value, bool):
            found[name] = value
        elif re.fullmatch(r"(num_|n_)?(\w+_)?(key_value|kv)_heads?", name):
            found[name] = _HEADS if value == heads else min(value, _KEY_HEADS)
        else:
            found[name] = _value(name, value)
    return found


def _part(name: str, settings: dict[str, Any]) -> dict[str, Any]:
    if name == "per_layer_config":  # of one layer that differs from the others
        first = next(iter(settings.values()), None)
        return {} if first is None else {_LAYERS - 1: _smaller(first)}  # pyright: ignore[reportReturnType] - transformers counts them
    return _rope(settings) if "rope" in name else _smaller(settings)


def _value(name: str, value: int) -> Any:
    smaller = next((v for pattern, v in _VALUES if re.fullmatch(pattern, name)), value)
    return smaller if smaller is None or smaller < value or value < 0 else value


def _list(name: str, values: list[Any], *, layers: int | None) -> list[Any]:
    """Return a setting of each layer for the few layers, with every kind that it has."""
    if name == "mrope_section":
        return [2, 3, 3]
    if len(values) == layers and isinstance(values[0], int):
        values = [_value(name, one) for one in values]
    if not name.endswith(("layer_types", "layers_block_type", "mlp_layer_types")):
        return values[:_LAYERS] if len(values) == layers else values
    kinds = list(dict.fromkeys(values))
    return (kinds * _LAYERS)[:_LAYERS]


def _rope(parameters: dict[str, Any]) -> dict[str, Any]:
    found = dict(parameters)
    for name, value in parameters.items():
        match value:
            case dict():
                found[name] = _rope(cast("dict[str, Any]", value))
            case list() if name.endswith("_factor"):
                found[name] = [value[0]] * (_HEAD_SIZE // 2)
            case list() if name == "mrope_section":
                found[name] = [2, 3, 3]
            case int() if name == "original_max_position_embeddings":
                found[name] = ROPE_LENGTH
            case _:
                pass
    return found
