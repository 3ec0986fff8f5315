"""Greedy text beyond the lengths at which a model changes is its own, however it is drafted.

The reference runs a plain forward pass of `transformers` over the whole text for every token.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tests.conftest import words
from tests.engine.architectures import build, with_slow

from cascade.local import local_server
from cascade.settings import Application
from cascade.types import DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

VOCABULARY = 26
PROMPT = tuple((5 * index + index // 7) % VOCABULARY for index in range(55))
TOKENS = 30  # so the text has 85: the boundary is at 64
GREEDY = DecodingParams(sampling=SamplingParams(temperature=0))


def plain_greedy(model: Any) -> tuple[int, ...]:
    tokens = list(PROMPT)
    with torch.inference_mode():
        while len(tokens) < len(PROMPT) + TOKENS:
            logits_LV = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
            tokens.append(int(logits_LV[-1].argmax()))
    return tuple(tokens[len(PROMPT) :])


def request(*, draft_tokens: int) -> Request:
    mode = Mode.SPECULATIVE if draft_tokens else Mode.EXPERT_ONLY
    return Request(
        prompt=PROMPT,
        policy=GREEDY,
        mode=mode,
        max_tokens=TOKENS,
        draft_tokens=draft_tokens or None,
    )


async def texts(folders: Sequence[Path], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the answers of a server with a drafter and an expert, by numbers of drafts."""
    engine = {"threads": 1, "max_step_tokens": 32}
    drafter, expert = ({"model": str(folder), "engine": engine} for folder in folders)
    settings = Application.model_validate(
        {"drafter": drafter, "expert": expert, "router": {"draft_deadline_s": 120}}
    )
    found: list[tuple[int, ...]] = []
    async with local_server(settings, direct=True) as server:
        for length in lengths:
            chunks = [c async for c in server.router.generate(request(draft_tokens=length))]
            found.append(tuple(token for chunk in chunks for token in chunk.tokens))
    return found


@pytest.mark.parametrize(
    "name",
    with_slow(
        ("longrope", "longrope llama", "dynamic", "two original lengths"),
        fast=("longrope", "dynamic"),
    ),
)
async def test_greedy_text_does_not_depend_on_the_drafts(name: str, tmp_path: Path) -> None:
    expert: Any = build(name, vocab_size=VOCABULARY)
    drafter: Any = copy.deepcopy(expert)
    with torch.no_grad():
        drafter.get_output_embeddings().weight.mul_(1 + 0.3 * torch.rand(VOCABULARY, 1))
    folders = [tmp_path / "drafter", tmp_path / "expert"]
    for model, folder in zip((drafter, expert), folders, strict=True):
        model.save_pretrained(folder)
        words(VOCABULARY).save_pretrained(folder)

    found = await texts(folders, (0, 1, 7))

    assert set(found) == {plain_greedy(expert)}
