"""Pairs of Gemma 2, 3 and 4 with their real number of tokens: tiny layers, 262,144 tokens."""

from __future__ import annotations

from itertools import product
from string import ascii_letters, digits
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.support.generation import greedy_answer
from tests.sweep.tiny_configs import tiny_config
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from cascade.local import local_server
from cascade.settings import Application
from cascade.types import Coupling, DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY = {"gemma2": 256_000, "gemma3_text": 262_144, "gemma4_text": 262_144}
GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))
# Shared noise makes the text of a seed that of the expert alone.
SAMPLED = DecodingParams(
    sampling=SamplingParams(temperature=0.8, top_p=0.9), coupling=Coupling.GUMBEL, seed=7
)
PROMPT = tuple(3 + 7919 * i % 250_000 for i in range(70))  # beyond the windows of 16 tokens


def tokenizer(count: int) -> PreTrainedTokenizerFast:
    """Return BPE with byte fallback whose tokens are those of Gemma's kind, up to three letters."""
    letters = f"▁{ascii_letters}{digits}."
    pairs = [first + second for first, second in product(letters, repeat=2)]
    triples = [first + last for first, last in product(pairs, letters)]
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    tokens = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), *letters, *pairs, *triples]
    assert len(tokens) > count
    known = {token: number for number, token in enumerate(tokens[:count])}
    merges = [(one[:-1], one[-1]) for one in [*pairs, *triples] if one in known]
    backend = Tokenizer(models.BPE(known, merges, unk_token="<unk>", byte_fallback=True))  # noqa: S106 - a token
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")  # noqa: S106 - tokens


def written(folder: Path, kind: str, *, noise: float) -> Any:
    """Write a random model; the same one but for some noise in its weights."""
    torch.manual_seed(0)
    config = tiny_config(kind, vocab_size=VOCABULARY[kind], hidden_size=32)
    if hasattr(config, "vocab_size_per_layer_input"):
        config.vocab_size_per_layer_input = VOCABULARY[kind]
    model: Any = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(4.0).add_(noise * weight.std() * torch.randn_like(weight))
    model.generation_config.eos_token_id = None
    model.save_pretrained(folder)
    return model.eval()


def save_pair(root: Path, kind: str) -> tuple[dict[str, dict[str, Any]], Any]:
    """Write a pair; return settings of its tiers, and the expert."""
    written(root / "drafter", kind, noise=0.02)
    expert = written(root / "expert", kind, noise=0)
    for tier in ("drafter", "expert"):
        tokenizer(VOCABULARY[kind]).save_pretrained(root / tier)
    engine = {"threads": 1, "cache_tokens": 1024}
    tiers = {tier: {"model": str(root / tier), "engine": engine} for tier in ("drafter", "expert")}
    return tiers, expert


@pytest.fixture(scope="module", params=VOCABULARY)
def pair(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Application, Any]:
    """Settings that serve a pair, and the expert."""
    tiers, expert = save_pair(tmp_path_factory.mktemp(request.param), request.param)
    return Application.model_validate(tiers | {"router": {"draft_deadline_s": 120}}), expert


@pytest.mark.slow
async def test_a_pair_with_all_tokens_of_gemma_is_lossless(pair: tuple[Application, Any]) -> None:
    settings, expert = pair
    wanted = greedy_answer(expert, PROMPT, max_tokens=24)

    async with local_server(settings) as server:

        async def answer(policy: DecodingParams, mode: Mode) -> tuple[int, ...]:
            request = Request(
                prompt=PROMPT, policy=policy, mode=mode, max_tokens=24, draft_tokens=5
            )
            chunks = [chunk async for chunk in server.router.generate(request)]
            return tuple(token for chunk in chunks for token in chunk.tokens)

        assert await answer(GREEDY, Mode.SPECULATIVE) == wanted
        alone = await answer(SAMPLED, Mode.EXPERT_ONLY)
        assert await answer(SAMPLED, Mode.SPECULATIVE) == alone
        assert len(set(alone)) > 3
