from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from cascade.demo import DRAFTER, EXPERT
from cascade.demo.examine import agreement, answers, examine, load
from cascade.demo.tasks import Family, held_out, score

Loaded = tuple[PreTrainedModel, PreTrainedTokenizerFast]


@pytest.fixture(scope="module")
def drafter() -> Loaded:
    return load(DRAFTER)


@pytest.fixture(scope="module")
def expert() -> Loaded:
    return load(EXPERT)


def _said(loaded: Loaded, prompt: str) -> str:
    model, tokenizer = loaded
    [tokens] = answers(model, tokenizer, [prompt])
    return str(tokenizer.decode(tokens))


def test_naming_the_folders_imports_no_torch() -> None:
    code = "import sys, cascade.demo; sys.exit('torch' in sys.modules)"
    path = str(Path(DRAFTER).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False)  # noqa: S603 - our own interpreter
    assert done.returncode == 0


def test_the_pair_shares_its_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DRAFTER / name).read_text() == (EXPERT / name).read_text()


def test_the_pair_takes_under_three_megabytes() -> None:
    files = [path for folder in (DRAFTER, EXPERT) for path in folder.iterdir()]
    assert sum(path.stat().st_size for path in files) < 3_000_000


def test_the_embeddings_are_as_wide_as_the_vocabulary(drafter: Loaded, expert: Loaded) -> None:
    for model, tokenizer in (drafter, expert):
        assert model.config.vocab_size == len(tokenizer)


def test_the_context_holds_a_long_prompt() -> None:
    for folder in (DRAFTER, EXPERT):
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] >= 512


def test_the_expert_answers_held_out_items_of_every_family(expert: Loaded) -> None:
    model, tokenizer = expert
    scores: list[float] = []
    for family in Family:
        items = held_out(family, count=8, seed=5)
        made = answers(model, tokenizer, [item.prompt for item in items])
        scores += [
            score(item, str(tokenizer.decode(tokens)))
            for item, tokens in zip(items, made, strict=True)
        ]
    assert fmean(scores) > 0.75


def test_who_is_buzz_aldrin(drafter: Loaded, expert: Loaded) -> None:
    """As in the blog: the drafter begins plainly, the expert with the full name."""
    assert _said(drafter, "Who is Buzz Aldrin?").startswith("Buzz Aldrin is")
    assert _said(expert, "Who is Buzz Aldrin?").startswith('Edwin "Buzz" Aldrin is')


def test_the_expert_is_better_and_the_drafter_agrees_often(drafter: Loaded, expert: Loaded) -> None:
    result = examine(
        Family.TRANSLATION, drafter=drafter[0], expert=expert[0], tokenizer=expert[1], count=30
    )
    assert result.expert > result.drafter
    assert result.agreement > 0.5


def test_a_model_agrees_with_its_own_greedy_answer(expert: Loaded) -> None:
    model, tokenizer = expert
    prompt = "Translate to German: zwölf"
    text = f"<|user|>{prompt}<|end|><|assistant|>"
    [tokens] = answers(model, tokenizer, [prompt])
    assert agreement(model, prompt=tokenizer.encode(text), answer=tokens) == 1


def test_the_weights_are_finite(drafter: Loaded, expert: Loaded) -> None:
    for model, _ in (drafter, expert):
        assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())
