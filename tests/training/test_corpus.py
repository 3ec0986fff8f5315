from __future__ import annotations

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from cascade.training.corpus import ASSISTANT, END, PAD, SYSTEM, USER, token_id, train_tokenizer
from cascade.training.recipes import Architecture

TEXTS = ["Anna has 18 apples and buys 3 more.", "def f(x):\n    return x ** 2", "la maison"]

TOKENIZER = train_tokenizer(TEXTS * 20, size=320, context=64)

SEQ2SEQ = train_tokenizer(TEXTS * 20, size=320, context=64, architecture=Architecture.SEQ2SEQ)


def _chat(*turns: tuple[str, str], tokenizer: PreTrainedTokenizerFast = TOKENIZER) -> str:
    messages = [{"role": role, "content": content} for role, content in turns]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert isinstance(text, str)
    return text


@given(st.text())
def test_any_text_decodes_to_itself(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text


def test_every_digit_is_one_token() -> None:
    assert len(TOKENIZER.encode("1998")) == 4


def test_special_tokens_are_one_token_each() -> None:
    for token in (PAD, END, SYSTEM, USER, ASSISTANT):
        assert TOKENIZER.encode(token) == [token_id(TOKENIZER, token)]


def test_the_chat_template_formats_messages_and_opens_the_answer() -> None:
    assert _chat(("user", "Hi")) == f"{USER}Hi{END}{ASSISTANT}"


def test_developer_and_tool_messages_become_system_and_user() -> None:
    text = _chat(("developer", "Be brief."), ("assistant", "Yes."), ("tool", "3"))
    assert text == f"{SYSTEM}Be brief.{END}{ASSISTANT}Yes.{END}{USER}3{END}{ASSISTANT}"


def test_the_source_of_an_encoder_ends_with_the_end_token_in_chats_and_texts() -> None:
    text = _chat(("system", "Be brief."), ("user", "Hi"), tokenizer=SEQ2SEQ)
    assert text == f"Be brief.\nHi{END}"
    assert SEQ2SEQ.encode("Be brief.\nHi") == SEQ2SEQ.encode(text, add_special_tokens=False)


def test_an_unknown_role_is_refused_by_name() -> None:
    with pytest.raises(jinja2.TemplateError, match="the role poet is not one of"):
        _chat(("poet", "Hi"))


def test_a_loaded_tokenizer_equals_the_saved_one(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    loaded = PreTrainedTokenizerFast.from_pretrained(folder)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert loaded.chat_template == TOKENIZER.chat_template
