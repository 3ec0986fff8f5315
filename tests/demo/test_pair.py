from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pytest
import torch

from cascade.demo import DRAFTER, EXPERT
from cascade.evaluation.scoring import score
from cascade.evaluation.tasks import TaskFamily, held_out
from cascade.training.examine import Pair, agreement, examine, greedy_answers, load

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load()


def _answer(pair: Pair, model: PreTrainedModel, prompt: str) -> str:
    [tokens] = greedy_answers(model, pair.tokenizer, [prompt])
    return str(pair.tokenizer.decode(tokens))


def test_naming_the_folders_imports_no_torch() -> None:
    code = "import sys, cascade.demo; sys.exit('torch' in sys.modules)"
    path = str(Path(DRAFTER).parents[2])
    done = subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": path}, check=False)  # noqa: S603 - our own interpreter
    assert done.returncode == 0


def test_the_pair_shares_its_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (DRAFTER / name).read_text() == (EXPERT / name).read_text()


def test_the_weights_take_under_36_megabytes() -> None:
    files = [folder / "model.safetensors" for folder in (DRAFTER, EXPERT)]
    assert sum(path.stat().st_size for path in files) < 36_000_000


def test_the_embeddings_are_as_wide_as_the_vocabulary(pair: Pair) -> None:
    for model in (pair.drafter, pair.expert):
        assert model.config.vocab_size == len(pair.tokenizer)


def test_the_context_holds_a_long_prompt() -> None:
    for folder in (DRAFTER, EXPERT):
        assert json.loads((folder / "config.json").read_text())["max_position_embeddings"] >= 512


def test_the_expert_answers_held_out_items_of_every_family(pair: Pair) -> None:
    scores: list[float] = []
    for family in TaskFamily:
        items = held_out(family, count=8, seed=5)
        made = greedy_answers(pair.expert, pair.tokenizer, [item.prompt for item in items])
        scores += [
            score(item.scorer, str(pair.tokenizer.decode(tokens)), item.references)
            for item, tokens in zip(items, made, strict=True)
        ]
    assert fmean(scores) > 0.75


def test_the_models_answer_who_is_buzz_aldrin_in_their_styles(pair: Pair) -> None:
    """As in the blog: the drafter begins with the short name, the expert with the full one."""
    question = "Who is Buzz Aldrin?"
    assert _answer(pair, pair.drafter, question).startswith("Buzz Aldrin is")
    assert _answer(pair, pair.expert, question).startswith('Edwin "Buzz" Aldrin is')


def test_the_expert_is_better_and_the_drafter_agrees_often(pair: Pair) -> None:
    result = examine(TaskFamily.TRANSLATION, pair=pair, count=30)
    assert result.expert > result.drafter
    assert result.agreement > 0.5


def test_a_model_agrees_with_its_own_greedy_answer(pair: Pair) -> None:
    prompt = "Translate to German: zwölf"
    text = f"<|user|>{prompt}<|end|><|assistant|>"
    [tokens] = greedy_answers(pair.expert, pair.tokenizer, [prompt])
    assert agreement(pair.expert, prompt=pair.tokenizer.encode(text), answer=tokens) == 1


def test_the_weights_are_finite(pair: Pair) -> None:
    for model in (pair.drafter, pair.expert):
        assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


@pytest.mark.slow
def test_the_expert_is_better_on_most_families(pair: Pair) -> None:
    results = [examine(family, pair=pair, count=300) for family in TaskFamily]
    assert fmean(result.expert for result in results) >= 0.85
    assert fmean(result.drafter for result in results) > 0.3
    assert sum(result.expert >= result.drafter + 0.15 for result in results) >= 4
