"""Checkpoints that read images or sound besides text are served with text alone, losslessly."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.conftest import words
from tests.support.generation import greedy_answer
from tests.sweep.tiny_configs import VOCABULARY, tiny_config
from transformers import AutoModelForMultimodalLM

from cascade.engine.backends.padded import PaddedRunner
from cascade.engine.backends.varlen import VarlenRunner
from cascade.local import local_server
from cascade.settings import Application
from cascade.types import DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))
WRAPPERS = {
    "mistral3": VarlenRunner,
    "llama4": PaddedRunner,
    "qwen2_5_vl": VarlenRunner,
    "qwen3_vl": VarlenRunner,
    "internvl": VarlenRunner,
    "gemma3": VarlenRunner,
    "gemma4": VarlenRunner,
}
# Beyond the windows of 16 tokens, the chunks and the RoPE lengths of 64.
PROMPT = tuple(3 + 11 * i % 190 for i in range(70))


def written(folder: Path, kind: str, *, noise: float) -> Any:
    """Write a random model; the same one but for some noise in its weights."""
    torch.manual_seed(0)
    model: Any = AutoModelForMultimodalLM.from_config(tiny_config(kind))
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0).add_(noise * weight.std() * torch.randn_like(weight))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    words(VOCABULARY).save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize(
    "kind",
    [
        "qwen2_5_vl",
        *(pytest.param(k, marks=pytest.mark.slow) for k in WRAPPERS if k != "qwen2_5_vl"),
    ],
)
async def test_a_wrapper_writes_what_transformers_generates(tmp_path: Path, kind: str) -> None:
    written(tmp_path / "drafter", kind, noise=0.05)
    expert = written(tmp_path / "expert", kind, noise=0)
    wanted = greedy_answer(expert, PROMPT, max_tokens=40)
    tiers = {
        tier: {"model": str(tmp_path / tier), "engine": {"threads": 1, "cache_tokens": 1024}}
        for tier in ("drafter", "expert")
    }
    settings = Application.model_validate(tiers | {"router": {"draft_deadline_s": 120}})
    async with local_server(settings) as server:
        assert isinstance(server.expert.engine.runner, WRAPPERS[kind])
        for draft_tokens in (1, 4, 7):
            request = Request(
                prompt=PROMPT,
                policy=GREEDY,
                mode=Mode.SPECULATIVE,
                max_tokens=40,
                draft_tokens=draft_tokens,
            )
            chunks = [chunk async for chunk in server.router.generate(request)]
            assert tuple(token for chunk in chunks for token in chunk.tokens) == wanted
