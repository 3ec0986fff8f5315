"""What the expert's generation_config.json says is what requests get that say nothing."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from cascade.evaluation.client import start_in_process

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from tests.conftest import Folder, Pair

STATED: dict[str, Any] = {
    "temperature": 0.0,
    "repetition_penalty": 1.4,
    "suppress_tokens": [2, 5],
    "max_new_tokens": 11,
    "eos_token_id": [6],
}
END = "G"  # token 6


@pytest.fixture
def pair(toy: Pair, tmp_path: Path) -> Pair:
    """The toy pair, whose expert has settings of `generate`."""
    folder = shutil.copytree(toy.expert.path, tmp_path / "expert")
    (folder / "generation_config.json").write_text(json.dumps(STATED))
    return replace(toy, expert=replace(toy.expert, path=folder))


def generated(expert: Folder, prompt: str, **settings: Any) -> str:
    """Return the text that transformers generates greedily."""
    model: Any = expert.model
    ids = torch.tensor([[ord(letter) - 0x41 for letter in prompt]])
    settings |= {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    found = model.generate(ids, do_sample=False, **settings)[0].tolist()
    return "".join(chr(0x41 + token) for token in found[len(prompt) :]).removesuffix(END)


def without(stated: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in stated.items() if name not in names}


@pytest.mark.parametrize("prompt", ["ABC", "HGDA", "BBBB", "DH", "AHBGCF"])
async def test_answers_are_those_of_generate(pair: Pair, prompt: str) -> None:
    stated = without(STATED, "temperature")
    body = {"prompt": prompt}
    async with start_in_process(pair.settings()) as client:
        plain = await client.complete(body)
        asked = await client.complete(body | {"max_tokens": 14, "repetition_penalty": 1.0})

    assert plain.text == generated(pair.expert, prompt, **stated)
    own = stated | {"max_new_tokens": 14, "repetition_penalty": 1.0}
    assert asked.text == generated(pair.expert, prompt, **own)


async def test_it_can_be_switched_off(pair: Pair) -> None:
    body = {"prompt": "ABC", "temperature": 0, "max_tokens": 20}
    settings = pair.settings(defaults={"generation_config": "off"})
    async with start_in_process(settings) as client:
        found = await client.complete(body)

    assert found.text == generated(
        pair.expert, "ABC", max_new_tokens=20, eos_token_id=STATED["eos_token_id"]
    )
