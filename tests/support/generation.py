"""What plain `transformers` generation gives, which served text is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence


def greedy_answer(model: Any, prompt: Sequence[int], *, max_tokens: int) -> tuple[int, ...]:
    """Return the tokens of the greedy answer to a prompt."""
    with torch.inference_mode():
        text = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=max_tokens,
            do_sample=False,
        )
    return tuple(text[0, len(prompt) :].tolist())
