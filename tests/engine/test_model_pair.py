from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
from tests.support.toy_tokenizers import byte_level, llama_3
from tokenizers import normalizers
from transformers import Gemma3Config, GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

from cascade.engine import tokenizer
from cascade.engine.model_pair import (
    GenerationDefaults,
    ModelSource,
    generation_defaults,
    load_pair,
)
from cascade.engine.settings import VocabularyWay
from cascade.errors import UnsupportedModel


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint without weights, whose tokenizer ends a text with token 1."""
    LlamaConfig(vocab_size=280, hidden_size=16, num_attention_heads=2).save_pretrained(tmp_path)
    PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>").save_pretrained(  # noqa: S106 - a token of text
        tmp_path
    )
    return tmp_path


def copied(folder: Path, backend: Any) -> ModelSource:
    """Return a checkpoint like one in a folder with another tokenizer."""
    other = folder / "other"
    shutil.copytree(folder, other)
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(other)  # noqa: S106 - a token of text
    return ModelSource(name=str(other))


def test_what_the_vocabularies_do_not_share_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expert = copied(folder, llama_3())
    says(Path(expert.name), "config.json", vocab_size=300)

    pair = load_pair(ModelSource(name=str(folder)), expert)

    assert pair.vocabulary.way is VocabularyWay.TLI
    assert [record.message for record in caplog.records] == [pair.vocabulary.summary]


def test_a_tokenizer_that_reads_texts_otherwise_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lower = byte_level()
    lower.normalizer = normalizers.Lowercase()

    pair = load_pair(copied(folder, lower), ModelSource(name=str(folder)))

    assert pair.vocabulary.identical
    assert "reads texts as other tokens" in caplog.text


def test_models_with_one_vocabulary_need_no_word(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = ModelSource(name=str(folder))

    with caplog.at_level(logging.INFO):
        assert load_pair(source, source).vocabulary.identical

    assert not caplog.records


def says(folder: Path, file: str, **settings: Any) -> None:
    path = folder / file
    stated = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(stated | settings))


def test_a_tokenizer_whose_files_are_the_same_is_read_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, load = list[str](), tokenizer.load

    def counted(name: str, **how: Any) -> tokenizer.Tokenizer:
        read.append(name)
        return load(name, **how)

    monkeypatch.setattr(tokenizer, "load", counted)
    drafter, expert = copied(folder, byte_level()), ModelSource(name=str(folder))

    assert load_pair(drafter, expert).vocabulary.identical
    assert read == [expert.name]

    says(Path(drafter.name), "tokenizer_config.json", chat_template="another")
    assert load_pair(drafter, expert).vocabulary.identical
    assert read == [expert.name, expert.name, drafter.name]


@pytest.mark.parametrize(
    ("config", "generation", "ids"),
    [
        ({"eos_token_id": None}, None, (1,)),
        ({"eos_token_id": 5}, None, (1, 5)),
        ({"eos_token_id": [5, 6]}, {}, (1, 5, 6)),
        ({"eos_token_id": 5}, {"eos_token_id": 7}, (1, 5, 7)),
        ({"eos_token_id": 5}, {"eos_token_id": [7, 5, 1]}, (1, 5, 7)),
        ({"eos_token_id": -1}, {"eos_token_id": [-1]}, (1,)),
    ],
)
def test_every_file_may_name_end_tokens(
    folder: Path,
    config: dict[str, Any],
    generation: dict[str, Any] | None,
    ids: tuple[int, ...],
) -> None:
    says(folder, "config.json", **config)
    if generation is not None:
        says(folder, "generation_config.json", **generation)
    source = ModelSource(name=str(folder))

    assert load_pair(source, source).stop_ids == ids
    assert load_pair(source, source, generation_config=False).stop_ids == ids


def test_the_part_of_a_configuration_about_text_may_name_end_tokens(folder: Path) -> None:
    text = {"vocab_size": 280, "eos_token_id": 9}
    Gemma3Config(text_config=text).save_pretrained(folder)

    assert 9 in load_pair(ModelSource(name=str(folder)), ModelSource(name=str(folder))).stop_ids


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
def test_an_end_token_that_is_no_id_is_refused(folder: Path, file: str) -> None:
    says(folder, file, eos_token_id=2.5)

    with pytest.raises(UnsupportedModel, match=r"eos_token_id|not one transformers can read"):
        load_pair(ModelSource(name=str(folder)), ModelSource(name=str(folder)))


def test_the_experts_sampling_defaults_are_read() -> None:
    stated = {
        "temperature": 0.6,
        "top_k": 20,
        "top_p": 0.95,
        "min_p": 0.05,
        "do_sample": True,
        "repetition_penalty": 1.05,
        "max_new_tokens": 2048,
        "bos_token_id": 1,
        "suppress_tokens": [3, 4],
        "bad_words_ids": [[4], [8], [5, 6]],
        "max_length": 4096,
    }

    found = generation_defaults("it", stated)

    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens")
    assert found.sampling == {name: stated[name] for name in names}
    assert found.bad_words == ((3,), (4,), (8,), (5, 6))


@pytest.mark.parametrize(
    "setting",
    [
        *({"begin_suppress_tokens": [220]}, {"forced_bos_token_id": 2}, {"min_length": 3}),
        *({"forced_eos_token_id": [2]}, {"min_new_tokens": 1}, {"no_repeat_ngram_size": 3}),
        *({"bad_words_ids": [[4], []]}, {"suppress_tokens": [-1]}, {"num_beams": 4}),
        *({"typical_p": 0.9}, {"penalty_alpha": 0.6}, {"sequence_bias": [[[4], -1.0]]}),
        *({"guidance_scale": 1.5}, {"stop_strings": ["\n"]}, {"eta_cutoff": 3e-4}),
    ],
    ids=str,
)
def test_what_no_request_can_ask_for_is_refused(folder: Path, setting: dict[str, Any]) -> None:
    says(folder, "generation_config.json", **setting)
    source = ModelSource(name=str(folder))

    with pytest.raises(UnsupportedModel, match=r"generation_config: off"):
        load_pair(source, source)
    assert load_pair(source, source, generation_config=False).generation == GenerationDefaults()


def test_what_transformers_writes_by_itself_asks_for_nothing() -> None:
    full = GenerationConfig().to_dict() | {
        "min_length": 0,
        "num_beams": 1,
        "typical_p": 1.0,
        "no_repeat_ngram_size": 0,
        "guidance_scale": 1.0,
        "epsilon_cutoff": 0.0,
        "suppress_tokens": [],
        "top_h": None,
    }

    assert generation_defaults("it", full) == GenerationDefaults()
