"""The engine gives an encoder-decoder's own logits, and encodes a source once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.engine.architectures import build as build_decoder
from tests.engine.architectures import with_slow
from tests.engine.encoder_decoders import MODELS, build
from tests.engine.harness import EngineHarness, ragged_scenario
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from cascade.engine.backends.encoder_decoder import EncoderDecoderRunner
from cascade.engine.encoder_decoder import Lengths, lengths, start_ids
from cascade.engine.model_loader import read_config
from cascade.engine.settings import EngineSettings, Path
from cascade.errors import ContextTooLong, InvalidRequest, UnsupportedModel
from cascade.types import SessionId

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path as Folder

TOLERANCE = 1e-4

LONG = [3 + 7 * i % 200 for i in range(41)]
SHORT = [5 + 11 * i % 200 for i in range(9)]
LONGEST = [4 + 3 * i % 200 for i in range(140)]

# Sessions of the ragged scenario: e and f continue texts of a.
SOURCES = {"a": LONG, "b": SHORT, "c": LONGEST, "d": SHORT, "e": LONG, "f": LONG}


def engine(name: str, **settings: Any) -> EngineHarness:
    chosen: dict[str, Any] = {"cache_tokens": 1024, "source_cache_tokens": 1024} | settings
    return EngineHarness(build(name), EngineSettings(**chosen), sources=SOURCES)


@pytest.mark.parametrize("name", with_slow(MODELS, fast=("t5", "longt5", "bart", "m2m100", "led")))
def test_logits_are_those_of_the_plain_forward_pass(name: str) -> None:
    harness = engine(name)

    ragged_scenario(harness)

    assert harness.largest > 0.5, "the logits differ enough for an error to show"
    assert isinstance(harness.engine.runner, EncoderDecoderRunner)
    assert harness.worst < TOLERANCE * harness.largest


@pytest.mark.parametrize("name", ["bart", "marian", "m2m100"])
def test_blocks_of_other_lengths_after_as_many_tokens_have_their_own_positions(name: str) -> None:
    harness = engine(name)
    for session in ("a", "b"):
        harness.run(session, [2, 5, 6])

    blocks = {"a": [7, 8, 9, 10], "b": [7]}
    received = [harness.submit(one, block, num_logits=1) for one, block in blocks.items()]
    harness.run_until_done(*received)

    assert harness.worst < TOLERANCE * harness.largest


def encoded(harness: EngineHarness) -> list[int]:
    """Return a list that gets the length of each source as it is encoded."""
    runner, lengths = harness.engine.runner, list[int]()
    assert isinstance(runner, EncoderDecoderRunner)
    encode = runner.encode

    def counted(tokens: Sequence[int], *, slots: range) -> None:
        lengths.append(len(tokens))
        encode(tokens, slots=slots)

    runner.encode = counted
    return lengths


def test_a_source_is_encoded_once_for_all_sessions_and_branches_that_read_it() -> None:
    harness = engine("t5")
    lengths = encoded(harness)

    both = [harness.submit(name, [0, 5, 6], num_logits=1) for name in ("b", "d")]
    harness.run_until_done(*both)
    branch = harness.branch("b1", [9], parent="b", base=2)
    harness.run_until_done(branch, harness.submit("d", [7, 8], drop=1, num_logits=2))
    harness.release("b")
    harness.run("b2", [0, 4])

    assert lengths == [len(SHORT)]
    assert harness.engine.cached_tokens(SessionId("d")) == 0
    assert harness.engine.cached_tokens(SessionId("b2")) == len(SHORT)
    assert harness.worst < TOLERANCE * harness.largest


def test_texts_of_other_sources_are_no_prefix() -> None:
    harness = engine("t5")
    text = [0, *range(10, 40)]

    for name in ("a", "b", "e"):
        harness.run(name, text)

    assert harness.engine.cached_tokens(SessionId("b")) == 0
    assert harness.engine.cached_tokens(SessionId("e")) == len(text) - 1 + len(LONG)
    assert harness.worst < TOLERANCE * harness.largest


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_a_source_that_lost_its_slots_is_encoded_again(name: str) -> None:
    """The cache holds one source of `c`, or two of the others."""
    harness = engine(name, source_tokens=200, source_cache_tokens=256)
    lengths = encoded(harness)

    for session in ("a", "b", "c", "a", "c"):
        harness.run(session, [3, 4, 5] if session in harness.tokens else [0, 5])
    together = [harness.submit(session, [6], num_logits=1) for session in ("a", "b", "c")]
    harness.run_until_done(*together)

    assert lengths[:5] == [len(LONG), len(SHORT), len(LONGEST), len(LONG), len(LONGEST)]
    assert harness.worst < TOLERANCE * harness.largest


def test_a_cycle_encodes_no_more_sources_than_the_budget_of_a_pass() -> None:
    harness = engine("t5", max_step_tokens=64)
    lengths = encoded(harness)
    harness.run("b", [0, 5])
    del lengths[:]

    received = [harness.submit(name, [0, 5], num_logits=1) for name in ("c", "a")]
    block = harness.submit("b", [6], num_logits=1)
    harness.engine.step()

    assert len(lengths) == 1, "one long source, or short ones up to the budget"
    assert block.ended, "what others wait for goes on meanwhile"
    harness.run_until_done(*received)
    assert sorted(lengths) == [len(LONG), len(LONGEST)]


def test_a_source_that_cannot_be_encoded_fails_its_sessions_only() -> None:
    harness = engine("t5")
    runner = harness.engine.runner
    assert isinstance(runner, EncoderDecoderRunner)
    encode = runner.encode

    def failing(tokens: Sequence[int], *, slots: range) -> None:
        if len(tokens) == len(LONGEST):
            raise MemoryError("no memory")
        encode(tokens, slots=slots)

    runner.encode = failing
    bad, good = (harness.submit(name, [0, 5], num_logits=1) for name in ("c", "a"))
    for _ in range(5):
        harness.engine.step()
        if bad.ended and good.ended:
            break

    assert isinstance(bad.error, MemoryError)
    harness.check(good)


def test_a_session_without_a_source_and_one_that_is_too_long_are_refused() -> None:
    harness = engine("t5", source_tokens=100)

    for name, error in (("z", InvalidRequest), ("c", ContextTooLong)):
        received = harness.submit(name, [0], num_logits=1)
        harness.engine.step()
        assert isinstance(received.error, error)

    decoder_only = EngineHarness(build_decoder("llama"), EngineSettings(), sources=SOURCES)
    received = decoder_only.submit("a", [5], num_logits=1)
    decoder_only.engine.step()
    assert isinstance(received.error, InvalidRequest)
    assert "no encoder" in str(received.error)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"path": Path.FLAT}, "engine.path is flat"),
        ({"deterministic": True}, "engine.deterministic"),
        ({"source_tokens": 300}, "engine.source_tokens is 300, but this bart has 256 positions"),
        ({"answer_tokens": 257}, "engine.answer_tokens is 257, but this bart has 256 positions"),
    ],
)
def test_settings_that_do_not_suit_an_encoder_decoder_are_named(
    settings: dict[str, Any], named: str
) -> None:
    with pytest.raises(UnsupportedModel, match=named):
        engine("bart", **settings)


def test_lengths_are_those_of_settings_then_of_the_configuration_then_a_default() -> None:
    config = build("t5").config
    assert lengths(config, EngineSettings()) == Lengths(source=1024, answer=1024)
    config.n_positions = 512
    assert lengths(config, EngineSettings()) == Lengths(source=512, answer=512)
    assert lengths(config, EngineSettings(source_tokens=2000)) == Lengths(source=2000, answer=512)
    led = build("led").config
    found = lengths(led, EngineSettings(answer_tokens=100))
    assert found == Lengths(source=led.max_encoder_position_embeddings, answer=100)


def test_answers_begin_with_the_start_token_and_what_is_forced_after_it() -> None:
    config = {"bos_token_id": 7, "decoder_start_token_id": 2}
    assert start_ids("m", [config]) == (2,)
    assert start_ids("m", [{"bos_token_id": 7}]) == (7,)
    generation = {"decoder_start_token_id": 3, "forced_bos_token_id": 0}
    assert start_ids("m", [config, generation]) == (3, 0)
    with pytest.raises(UnsupportedModel, match="no decoder_start_token_id"):
        start_ids("m", [{}])
    with pytest.raises(UnsupportedModel, match="decoder_start_token_id of 'm' is"):
        start_ids("m", [{"decoder_start_token_id": [1, 2]}])


def saved(folder: Folder, kind: str, config: dict[str, Any], *, architecture: str | None) -> str:
    """Return a checkpoint that has only a configuration."""
    architectures = None if architecture is None else [architecture]
    CONFIG_MAPPING[kind](**config, architectures=architectures).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("architecture", ["T5ForConditionalGeneration", "T5Model", None])
def test_checkpoints_of_whole_models_are_read(tmp_path: Folder, architecture: str | None) -> None:
    name = saved(tmp_path, "t5", MODELS["t5"][1], architecture=architecture)
    assert read_config(name).is_encoder_decoder


@pytest.mark.parametrize(
    ("kind", "architecture", "reason"),
    [
        ("t5", "T5EncoderModel", "no language model head .it is a T5EncoderModel"),
        ("bart", "BartForSequenceClassification", "a checkpoint of BartForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration", "whose encoder reads images, sound"),
        ("pix2struct", "Pix2StructForConditionalGeneration", "whose encoder reads images, sound"),
    ],
)
def test_a_refusal_says_why(tmp_path: Folder, kind: str, architecture: str, reason: str) -> None:
    config = MODELS[kind][1] if kind in MODELS else {"is_encoder_decoder": True}
    name = saved(tmp_path, kind, config, architecture=architecture)
    with pytest.raises(UnsupportedModel, match=reason):
        read_config(name)
