from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from tests.support.toy_tokenizers import (
    KINDS,
    byte_level,
    llama_2,
    llama_3,
    metaspace,
    mistral,
    wrap,
)
from tests.support.vocabulary_pairs import llama_2_like, qwen_like

from cascade.engine.settings import VocabularyWay
from cascade.engine.tokenizer import Tokenizer
from cascade.engine.vocabulary import TokenTable, VocabularyMap, map_vocabularies
from cascade.errors import MismatchedPair

if TYPE_CHECKING:
    from tokenizers import Tokenizer as Backend


TEXT = "hello world the cat sat, na\u00efve caf\u00e9 \u4f60\u597d"


def mapped(
    drafter: Backend, expert: Backend, way: VocabularyWay = VocabularyWay.AUTO
) -> VocabularyMap:
    """Return the map of two models whose embeddings are padded."""
    return map_vocabularies(wrap(drafter), wrap(expert), drafter_size=320, expert_size=400, way=way)


def test_padded_vocabularies_share_their_tokens() -> None:
    assert mapped(byte_level(), byte_level()).identical


def test_a_token_without_logits_is_not_drafted() -> None:
    both = wrap(byte_level())

    found = map_vocabularies(both, both, drafter_size=279, expert_size=320)

    assert found.way is VocabularyWay.SHARED
    assert set(range(280)) - found.pairs.keys() == {279}
    assert "id 279 is no token to the drafter" in found.summary


def test_tokens_of_only_one_model_are_not_drafted_and_named() -> None:
    found = mapped(llama_2(), mistral())

    assert found.way is VocabularyWay.SHARED
    assert found.pairs == {id_: id_ for id_ in range(300)}
    assert "4 token ids are not the same" in found.summary
    assert "id 300 is no token to the drafter and '[INST]' to the expert" in found.summary


def test_at_most_five_different_tokens_are_named() -> None:
    more = byte_level(added=tuple(f"<tool{number}>" for number in range(9)))

    assert mapped(more, byte_level()).summary.endswith("no token to the expert; and 4 more")


def test_a_renamed_token_is_not_drafted() -> None:
    found = mapped(byte_level(added=("<old>",)), byte_level(added=("<new>",)))

    assert 280 not in found.pairs
    assert "id 280 is '<old>' to the drafter and '<new>' to the expert" in found.summary


def test_a_token_special_to_only_one_model_is_not_drafted() -> None:
    plain = byte_level()
    plain.add_tokens(["<tool>"])

    found = mapped(plain, byte_level(added=("<tool>",)))

    assert 280 not in found.pairs
    assert "id 280, '<tool>', is special to the expert only" in found.summary


def test_ends_of_texts_are_the_same_whatever_their_names() -> None:
    drafter, expert = (Tokenizer(one.saved) for one in (qwen_like(), llama_2_like()))

    found = map_vocabularies(drafter, expert, drafter_size=400, expert_size=500)

    assert drafter.tokens[found.pairs[expert.stop_ids[0]]] == "<|im_end|>"


@pytest.mark.parametrize("way", VocabularyWay)
def test_ids_that_mean_other_tokens_are_shared_by_bytes(way: VocabularyWay) -> None:
    if way is VocabularyWay.SHARED:
        with pytest.raises(MismatchedPair, match=r"id 0 is '<unk>' to the drafter and '<s>' to"):
            mapped(llama_2(), llama_3(), way)
        return
    found = mapped(llama_2(), llama_3(), way)

    expected = VocabularyWay.TLI if way is VocabularyWay.AUTO else way
    assert found.way is expected
    for expert_id, drafter_id in found.pairs.items():
        tokens = [found.expert.tokenizer.bytes_of(expert_id)]
        tokens.append(found.drafter.tokenizer.bytes_of(drafter_id))
        assert tokens[0] == tokens[1] or tokens[1] in {b"<s>", b"</s>"}
    assert len(set(found.pairs.values())) == len(found.pairs) > 256


def test_vocabularies_with_little_in_common_exchange_text() -> None:
    found = mapped(KINDS["words"](), KINDS["byte_level"]())

    assert found.way is VocabularyWay.SLEM
    assert found.coverage < 0.5


def test_no_common_token_leaves_no_intersection() -> None:
    words = KINDS["words"]()
    with pytest.raises(MismatchedPair, match="no token in common"):
        map_vocabularies(
            wrap(words), wrap(byte_level()), drafter_size=1, expert_size=1, way=VocabularyWay.TLI
        )


@pytest.mark.parametrize(
    ("drafter", "expert"), list(itertools.permutations(("llama_3", "metaspace", "mistral"), 2))
)
def test_a_prompt_is_read_as_the_drafter_reads_its_text(drafter: str, expert: str) -> None:
    found = mapped(KINDS[drafter](), KINDS[expert](), VocabularyWay.TLI)
    ours, theirs = found.drafter.tokenizer, found.expert.tokenizer

    assert tuple(found.prompt_to_drafter(theirs.encode(TEXT))) == ours.encode(TEXT)


@pytest.mark.parametrize("expert", KINDS)
@pytest.mark.parametrize("drafter", ["byte_level", "llama_3", "metaspace", "llama_2", "mistral"])
def test_the_drafter_reads_what_the_expert_has_written(drafter: str, expert: str) -> None:
    """Token by token, each of which adds its own bytes."""
    found = mapped(KINDS[drafter](), KINDS[expert](), VocabularyWay.TLI)
    ours, theirs = found.drafter.tokenizer, found.expert.tokenizer
    answer = theirs.encode(TEXT, add_special=False)

    fed = found.to_drafter(answer)

    unknown = theirs.unknown_id in answer
    assert unknown or b"".join(map(ours.bytes_of, fed)) == b"".join(map(theirs.bytes_of, answer))
    each = [found.to_drafter([token]) for token in answer]
    assert list(itertools.chain.from_iterable(each)) == fed
    assert all(each)


def test_special_tokens_of_a_prompt_keep_their_place() -> None:
    found = mapped(byte_level(), llama_3())
    theirs = found.expert.tokenizer
    prompt = theirs.encode("<|header|>the cat<|eot|>sat")

    assert found.way is VocabularyWay.SHARED or found.way is VocabularyWay.TLI
    text = found.drafter.tokenizer.decode(found.prompt_to_drafter(prompt))
    assert text == "<|header|>the cat<|eot|>sat"


def test_text_that_continues_another_gets_no_space() -> None:
    table = TokenTable(wrap(llama_2()), 320)

    for text in ("cat", " cat", "at sat", "\u4f60", " "):
        assert table.bytes_of(table.encode(text.encode())) == text.encode()


def test_bytes_that_are_no_text_are_spelled() -> None:
    for kind in ("byte_level", "llama_2"):
        table = TokenTable(wrap(KINDS[kind]()), 400)
        data = b"\xb4 cat \xe4\xbd"
        assert table.bytes_of(table.encode(data)) == data


def test_only_shared_tokens_have_probability() -> None:
    found = mapped(llama_2(), llama_3())
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(1))

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        restricted, lost = found.restrict(logits.to(dtype))
        q = restricted.float().softmax(dim=1)
        assert restricted.shape == (2, 295)
        assert set(q[0].nonzero().flatten().tolist()) == found.pairs.keys()
        assert ((lost > 0) & (lost < 1)).all()


def test_where_no_shared_token_is_allowed_all_that_are_have_the_same_probability() -> None:
    """A mask may allow none that the drafter has; there must be a distribution all the same."""
    found = mapped(llama_2(), llama_3())
    foreign = sorted(set(range(found.size)) - found.pairs.keys())[:3]
    restricted, _ = found.restrict(torch.zeros(1, 300))

    masked = torch.full_like(restricted, -torch.inf)
    masked[:, foreign] = restricted[:, foreign]

    assert masked.softmax(dim=1)[0, foreign].tolist() == pytest.approx([1 / 3] * 3)


def test_ids_are_mapped_on_the_device() -> None:
    found = mapped(llama_2(), llama_3())
    ids = torch.tensor(list(found.pairs))

    assert found.drafter_ids(ids).tolist() == list(found.pairs.values())


def test_a_unigram_without_bytes_fills_what_it_cannot_spell() -> None:
    found = mapped(KINDS["unigram"](), metaspace())
    answer = found.expert.tokenizer.encode("\u4f60", add_special=False)

    assert all(found.to_drafter([token]) for token in answer)
