from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from tests.support.draft_branches import PROMPT, new_session, propose
from tests.support.toy_tokenizers import llama_2, llama_3, wrap

from cascade.drafter.text_draft import TextDraft
from cascade.engine.settings import VocabularyWay
from cascade.engine.vocabulary import VocabularyMap, map_vocabularies
from cascade.errors import InvalidRequest
from cascade.rules import Chow, TokenV3
from cascade.sampling.rng import Purpose
from cascade.types import DecodingParams, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.engine.request import ForwardRequest


@pytest.fixture(scope="module")
def vocabulary() -> VocabularyMap:
    drafter, expert = wrap(llama_3()), wrap(llama_2())
    way = VocabularyWay.SLEM
    return map_vocabularies(drafter, expert, drafter_size=320, expert_size=320, way=way)


def text_draft(
    vocabulary: VocabularyMap, *answer: int, policy: DecodingParams | None = None, **more: Any
) -> TextDraft:
    session = new_session(*answer, policy=policy or DecodingParams())
    session.vocabulary_map = vocabulary
    session.translate_prompt()
    limit = more.pop("limit", 64)
    message = propose(*answer, **more)
    return TextDraft(session=session, message=message, vocabulary=vocabulary, limit=limit)


def write(draft: TextDraft, tokens: Sequence[int]) -> list[ForwardRequest]:
    """Add the drafter's tokens until the block is complete."""
    requests: list[ForwardRequest] = []
    for token in tokens:
        request = draft.add(token)
        if request is None:
            break
        requests.append(request)
    return requests


def test_text_is_drafted_in_the_experts_tokens(vocabulary: VocabularyMap) -> None:
    text = " the cat sat"
    own = vocabulary.drafter.encode(text.encode())
    theirs = vocabulary.expert.encode(text.encode())
    assert len(theirs) > 2
    draft = text_draft(vocabulary, count=2)

    requests = write(draft, own)

    block = draft.proposal().block
    assert list(block.tokens) == theirs[:2]
    assert block.likelihoods == (1.0, 1.0)
    base = draft.session.engine_length(())
    assert [request.base for request in requests] == list(range(base, base + len(requests)))
    assert [list(request.tokens) for request in requests] == [[one] for one in own[: len(requests)]]
    assert draft.proposal().passes == len(requests) + 1


def test_a_character_is_drafted_when_all_its_bytes_are(vocabulary: VocabularyMap) -> None:
    own = vocabulary.drafter.encode("\u4f60".encode())
    assert len(own) == 3
    draft = text_draft(vocabulary, count=4)

    write(draft, own[:2])
    assert draft.proposal().block.tokens == ()
    draft.add(own[2])
    found = vocabulary.expert.bytes_of(draft.proposal().block.tokens)
    assert found == "\u4f60".encode()


def test_the_end_of_the_text_is_the_experts(vocabulary: VocabularyMap) -> None:
    draft = text_draft(vocabulary, count=4)
    end = vocabulary.drafter.tokenizer.stop_ids[0]

    draft.add(vocabulary.drafter.encode(b" cat")[0])
    assert draft.add(end) is None
    assert draft.proposal().block.tokens[-1] == vocabulary.expert.tokenizer.stop_ids[0]


def test_a_special_token_that_the_expert_has_not_ends_the_block(vocabulary: VocabularyMap) -> None:
    draft = text_draft(vocabulary, count=4)

    assert draft.add(vocabulary.drafter.special["<|eot|>"]) is None
    assert draft.proposal().block.tokens == ()


def test_a_block_ends_with_the_context(vocabulary: VocabularyMap) -> None:
    base = text_draft(vocabulary).session.engine_length(())
    draft = text_draft(vocabulary, count=9, limit=base + 2)

    assert len(write(draft, vocabulary.drafter.encode(b" the cat sat"))) == 1


def test_no_random_number_is_used_twice(vocabulary: VocabularyMap) -> None:
    policy = DecodingParams(rule=TokenV3(alpha=0.5), seed=4)
    own = vocabulary.drafter.encode(b" the cat sat on the mat")
    used = list[int]()
    for answer in ((), (5,), (5, 6)):
        draft = text_draft(vocabulary, *answer, policy=policy, count=6)
        for token in own:
            assert draft.task().purpose is Purpose.DRAFT
            used.append(draft.task().position)
            draft.add(token)

    assert len(set(used)) == len(used)


def test_lossless_drafts_the_likeliest_text_and_token_v3_samples(
    vocabulary: VocabularyMap,
) -> None:
    asked = SamplingParams(temperature=0.7, top_p=0.9, logit_bias=((3, 5.0),))
    policy = DecodingParams(sampling=asked)
    keeps = replace(policy, rule=TokenV3(alpha=0.5))

    assert text_draft(vocabulary, policy=policy).task().policy.sampling.greedy
    sampling = text_draft(vocabulary, policy=keeps).task().policy.sampling
    assert sampling == SamplingParams(temperature=0.7, top_p=0.9)


@pytest.mark.parametrize("more", [{"until_deferral": True}, {"policy": Chow(alpha=0.5)}], ids=str)
def test_rules_that_read_probabilities_are_refused(
    vocabulary: VocabularyMap, more: dict[str, Any]
) -> None:
    if "policy" in more:
        more = {"policy": DecodingParams(rule=more["policy"])}
    with pytest.raises(InvalidRequest, match="use lossless or token_v3"):
        text_draft(vocabulary, **more)


def test_a_prompt_is_in_the_drafters_tokens(vocabulary: VocabularyMap) -> None:
    draft = text_draft(vocabulary)

    assert draft.session.engine_prompt == vocabulary.prompt_to_drafter(PROMPT)
