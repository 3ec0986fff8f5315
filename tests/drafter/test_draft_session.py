"""A drafter's session where the expert has other tokens: kept in the expert's, run in its own."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.support.draft_branches import PROMPT, new_session
from tests.support.toy_tokenizers import llama_2, llama_3, wrap

from cascade.engine.vocabulary import VocabularyMap, map_vocabularies

if TYPE_CHECKING:
    from cascade.drafter.draft_tree import DraftSession


@pytest.fixture(scope="module")
def vocabulary() -> VocabularyMap:
    return map_vocabularies(wrap(llama_3()), wrap(llama_2()), drafter_size=320, expert_size=320)


def session(
    vocabulary: VocabularyMap, answer: str, *, source: tuple[int, ...] = ()
) -> DraftSession:
    """Return a session that has committed an answer after a prompt."""
    tokens = vocabulary.expert.encode(answer.encode())
    found = new_session(*tokens)
    found.vocabulary_map = vocabulary
    prompt = PROMPT if source else vocabulary.expert.tokenizer.encode("the cat")
    found.opened = replace(found.opened, prompt=prompt, source=source)
    found.translate_prompt()
    return found


def test_the_model_reads_prompt_and_answer_in_its_own_tokens(vocabulary: VocabularyMap) -> None:
    found = session(vocabulary, " sat, don")

    request = found.prefill()

    own = vocabulary.drafter.tokenizer
    assert own.decode(request.tokens) == "the cat sat, do"
    assert request.tokens[0] == own.encode("")[0]


def test_what_follows_continues_what_the_model_has_read(vocabulary: VocabularyMap) -> None:
    """Tokens that the drafter has not are several of its own, so the two counts differ."""
    foreign = next(id_ for id_ in range(3, 300) if len(vocabulary.to_drafter([id_])) > 1)
    found = session(vocabulary, " sat")
    found.commit([foreign, *found.tokens[-1:]])
    first = found.prefill()

    request = found.forward_request((), num_logits=1, task=None)

    assert request.base == len(first.tokens)
    whole = (*found.engine_prompt, *vocabulary.to_drafter(found.tokens))
    assert (*first.tokens, *request.tokens) == whole
    assert found.engine_length(found.tokens) == len(whole) > found.num_tokens


def test_an_encoder_reads_the_source_in_its_own_tokens(vocabulary: VocabularyMap) -> None:
    source = vocabulary.expert.tokenizer.encode("hello the cat")
    found = session(vocabulary, "", source=source)

    request = found.prefill()

    assert request.source == list(vocabulary.drafter.tokenizer.encode("hello the cat"))
    assert tuple(request.tokens) == PROMPT[:-1]
