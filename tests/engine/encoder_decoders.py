"""Tiny encoder-decoders with random weights, one per family."""

from __future__ import annotations

from typing import Any

import torch
from tests.engine.architectures import VOCABULARY
from transformers import AutoModelForSeq2SeqLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

_T5: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_layers": 2,
    "num_decoder_layers": 3,
    "num_heads": 4,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "decoder_start_token_id": 0,
}
_BART: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 3,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 256,
    "pad_token_id": 1,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "forced_eos_token_id": None,
}
_GATED = {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False}

# Each family by a name of ours: model type, and its configuration.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": ("t5", _T5),
    "flan-t5": ("t5", _T5 | _GATED),
    "mt5": ("mt5", _T5 | _GATED),
    "umt5": ("umt5", _T5 | _GATED),
    "longt5": ("longt5", _T5 | {"local_radius": 7}),
    "bart": ("bart", _BART),
    "mbart": ("mbart", _BART),
    "pegasus": ("pegasus", _BART),
    "marian": ("marian", _BART),
    "m2m100": ("m2m_100", _BART),
    "blenderbot": ("blenderbot", _BART),
    "plbart": ("plbart", _BART),
    "led": ("led", _BART | {"attention_window": 8}),
}


def build(name: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Return the model, with weights large enough for its logits to differ.

    Args:
        name: One of `MODELS`.
        seed: Of the weights.
        settings: Replace those of its configuration.
    """
    kind, own = MODELS[name]
    torch.manual_seed(seed)
    model = AutoModelForSeq2SeqLM.from_config(CONFIG_MAPPING[kind](**(own | settings)))
    relative = "d_kv" in own  # those start with large embeddings
    with torch.no_grad():
        for weight_name, weight in model.named_parameters():
            if weight.dim() > 1 and not (relative and "shared" in weight_name):
                weight.mul_(2.0 if relative else 6.0)
    return model.eval()
