"""The encoder-decoder pair that ships, asked through transformers."""

from __future__ import annotations

import json

import pytest
import torch

from cascade.demo import T5_DRAFTER, T5_EXPERT
from cascade.evaluation.tasks import TaskFamily
from cascade.settings import Application
from cascade.training.examine import Pair, Result, examine, load, prompt_tokens
from cascade.training.recipes import SHARES, Architecture

FOLDERS = (T5_DRAFTER, T5_EXPERT)
FAMILIES = SHARES[Architecture.SEQ2SEQ]

FLOORS = {  # of the quality of drafter and expert
    TaskFamily.TRANSLATION: (0.2, 0.4),
    TaskFamily.REPORTS: (0.75, 0.8),
    TaskFamily.PASSAGES: (0.5, 0.35),
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return load(drafter=T5_DRAFTER, expert=T5_EXPERT)


def test_the_settings_find_it_by_name() -> None:
    settings = Application.model_validate(
        {one: {"model": "demo-t5"} for one in ("drafter", "expert")}
    )
    assert settings.drafter.model_path == str(T5_DRAFTER)
    assert settings.expert.model_path == str(T5_EXPERT)


def test_both_are_encoder_decoders_that_say_how_answers_begin() -> None:
    for folder in FOLDERS:
        config = json.loads((folder / "config.json").read_text())
        generation = json.loads((folder / "generation_config.json").read_text())
        assert config["is_encoder_decoder"]
        assert config["decoder_start_token_id"] == generation["decoder_start_token_id"]


def test_they_share_their_tokenizer() -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (T5_DRAFTER / name).read_text() == (T5_EXPERT / name).read_text()


def test_the_weights_take_under_12_megabytes() -> None:
    assert sum((folder / "model.safetensors").stat().st_size for folder in FOLDERS) < 12_000_000


def test_the_weights_are_finite(pair: Pair) -> None:
    for model in (pair.drafter, pair.expert):
        assert all(bool(torch.isfinite(weight).all()) for weight in model.parameters())


def test_a_question_is_the_same_source_in_a_chat_and_as_text(pair: Pair) -> None:
    question = "Translate to German: zwölf"
    assert prompt_tokens(pair.tokenizer, question) == pair.tokenizer.encode(question)


@pytest.fixture(scope="module")
def results(pair: Pair) -> dict[TaskFamily, Result]:
    return {family: examine(family, pair=pair, count=150) for family in FAMILIES}


def test_both_answer_held_out_items_of_their_families(
    results: dict[TaskFamily, Result],
) -> None:
    for family, (drafter, expert) in FLOORS.items():
        assert results[family].drafter > drafter
        assert results[family].expert > expert
        assert results[family].agreement > 0.5


def test_the_expert_is_better_at_translation_and_reports(
    results: dict[TaskFamily, Result],
) -> None:
    """Not at passages: the drafter's short answers have one fact to get right, the expert's two."""
    for family in (TaskFamily.TRANSLATION, TaskFamily.REPORTS):
        assert results[family].expert > results[family].drafter
