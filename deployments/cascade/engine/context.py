"""How long a text a model was made for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def context_length(config: PreTrainedConfig) -> int | None:
    """Return the tokens a model was made for, or None where its configuration names no bound."""
    text: Any = config.get_text_config(decoder=True)
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    found = next((v for v in (getattr(text, n, None) for n in names) if isinstance(v, int)), None)
    if not found or found <= 0:
        return None
    rope: Any = getattr(text, "rope_parameters", None) or {}
    if rope.get("rope_type") == "dynamic":
        return int(found * rope.get("factor", 1.0))
    return found
