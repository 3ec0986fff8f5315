from __future__ import annotations

from contextlib import suppress
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.toy_tokenizers import KINDS, UNKNOWN, byte_level, wrap
from transformers import PreTrainedTokenizer, PreTrainedTokenizerFast

from cascade.engine import tokenizer as tokenizers
from cascade.errors import ContextTooLong, InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cascade.engine.tokenizer import Tokenizer

# Fixtures are read only, and each claim is tested with many tokenizers.
SHARED = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=25
)

END = "<end>"

TEXT = "the cats naïve café 你好 🙂 नमस्ते\u200d👩‍👩‍👧 the cat"


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_pieces_of_any_length_join_to_the_text(tokenizer: Tokenizer, size: int) -> None:
    ids = tokenizer.encode(TEXT, add_special=False)
    stream = tokenizer.detokenizer()

    pieces = [stream.push(ids[start : start + size]) for start in range(0, len(ids), size)]

    assert "".join(pieces) + stream.flush() == TEXT == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(words=st.lists(st.sampled_from(["the", "cat", "cats", "naïve", "你好", "🙂"]), max_size=8))
def test_any_text_survives_streaming(tokenizer: Tokenizer, words: list[str]) -> None:
    text = " ".join(words)
    ids = tokenizer.encode(text, add_special=False)
    stream = tokenizer.detokenizer()

    assert "".join(stream.push([id_]) for id_ in ids) + stream.flush() == text


@cache
def toy(name: str) -> Tokenizer:
    return wrap(KINDS[name]())


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Tokenizer:
    return toy(request.param)


def byte_ids(tokenizer: Tokenizer) -> dict[bytes, int]:
    """Return the tokens of one byte each, if the tokenizer has them."""
    data = {id_: tokenizer.raw_bytes(id_) for id_ in tokenizer.tokens}
    return {found: id_ for id_, found in data.items() if found is not None and len(found) == 1}


def text_ids(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that have a text of their own."""
    return [
        id_
        for id_ in sorted(set(tokenizer.tokens) - tokenizer.special_ids)
        if tokenizer.raw_bytes(id_) is None
    ]


def draw_ids(data: st.DataObject, tokenizer: Tokenizer) -> list[int]:
    """Return any tokens. Bytes that are invalid as a character stand between texts.

    In a row with others they make byte fallback take back complete characters.
    """
    own = byte_ids(tokenizer)
    if not (texts := text_ids(tokenizer)):
        return data.draw(st.lists(st.sampled_from(sorted(tokenizer.tokens)), max_size=12))
    pieces = [[id_] for id_ in sorted(tokenizer.special_ids)] + [[id_] for id_ in texts]
    if own:
        pieces += [[own[bytes([byte])] for byte in char.encode()] for char in "é你🙂\ufffd"]
        invalid = (b"\xff", b"\xe4\xbd", b"\xf0\x9f", b"\xa9")
        runs = [[own[bytes([byte])] for byte in run] for run in invalid]
        pieces += [[texts[0], *run, text] for run in runs for text in texts[:4]]
    drawn = data.draw(st.lists(st.sampled_from(pieces), max_size=8))
    return [id_ for piece in drawn for id_ in piece]


@SHARED
@given(data=st.data())
def test_prompt_and_answer_are_decoded_together(kind: Tokenizer, data: st.DataObject) -> None:
    """Wherever a text is cut in two, its parts are as long as the whole, and no space is lost."""
    ids = draw_ids(data, kind)
    cut = data.draw(st.integers(0, len(ids)))
    stream = kind.detokenizer(ids[:cut])

    answer = "".join(stream.push([id_]) for id_ in ids[cut:]) + stream.flush()

    assert kind.detokenizer().push(ids[:cut]) + answer == kind.decode(ids)


@SHARED
@given(data=st.data(), text=st.text("ab é你🙂\u0301\ufffd,. \n", max_size=12))
def test_a_text_that_is_cut_anywhere_is_whole(
    kind: Tokenizer, data: st.DataObject, text: str
) -> None:
    ids = kind.encode(text)
    cut = data.draw(st.integers(0, len(ids)))
    stream = kind.detokenizer(ids[:cut])

    answer = stream.push(ids[cut:]) + stream.flush()

    assert kind.detokenizer().push(ids[:cut]) + answer == kind.decode(ids)


@pytest.mark.parametrize("name", ["llama_2", "mistral", "gemma", "unigram", "wordpiece"])
def test_an_answer_begins_with_the_space_before_its_first_word(name: str) -> None:
    tokenizer = toy(name)
    prompt, answer = tokenizer.encode("hello"), tokenizer.encode("hello world")

    assert tokenizer.detokenizer(prompt).push(answer[len(prompt) :]) == " world"


def test_special_tokens_between_prompt_and_answer_do_not_matter() -> None:
    """As in the templates of Mistral, which end with one; after those alone a text begins."""
    tokenizer = toy("mistral")
    begin, end = (tokenizer.encode(text)[-1] for text in ("[INST]", "[/INST]"))
    cat = tokenizer.encode("cat", add_special=False)

    asked = [begin, *tokenizer.encode("hello", add_special=False), end]
    assert tokenizer.detokenizer(asked).push(cat) == " cat"
    assert tokenizer.detokenizer([begin, end]).push(cat) == "cat"


def as_sentencepiece(data: bytes) -> str:
    """Decode character by character; each byte that belongs to none is U+FFFD."""
    text = ""
    while data:
        for size in (1, 2, 3, 4):
            with suppress(UnicodeDecodeError):
                text += data[:size].decode()
                data = data[size:]
                break
        else:
            text += "\ufffd"
            data = data[1:]
    return text


@SHARED
@given(
    data=st.data(),
    parts=st.lists(
        st.sampled_from([*map(str.encode, "aé你🙂\ufffd"), b"\xff", b"\xe4\xbd", b"\xf0"])
    ),
)
@pytest.mark.parametrize("name", ["byte_level", "llama_2", "gemma"])
def test_invalid_bytes_eat_no_character(name: str, data: st.DataObject, parts: list[bytes]) -> None:
    """Complete characters survive next to any bytes, and U+FFFD is a character like any other."""
    tokenizer, whole = toy(name), b"".join(parts)
    ids = [byte_ids(tokenizer)[bytes([byte])] for byte in whole]
    cut = data.draw(st.integers(0, len(ids)))
    stream = tokenizer.detokenizer(ids[:cut])

    answer = "".join(stream.push([id_]) for id_ in ids[cut:]) + stream.flush()

    text = tokenizer.detokenizer().push(ids[:cut]) + answer
    expected = whole.decode(errors="replace") if name == "byte_level" else as_sentencepiece(whole)
    assert text == expected


class PythonTokenizer(PreTrainedTokenizer):
    """A tokenizer in Python whose tokens are bytes, as those that come with checkpoints."""

    def __init__(self, **names: Any) -> None:
        """Have a token for each byte, and one for a space with a letter."""
        self._ids = {data: at for at, data in enumerate([*map(bytes, zip(range(256))), b" a"])}
        super().__init__(**names)

    @property
    def vocab_size(self) -> int:
        """Return the number of tokens."""
        return len(self._ids)

    def get_vocab(self) -> Any:
        """Return the tokens, which are bytes, with their ids."""
        return self._ids | self.added_tokens_encoder

    def _tokenize(self, text: str, **_: Any) -> list[bytes]:
        return [bytes([byte]) for byte in text.encode()]

    def _convert_token_to_id(self, token: Any) -> int:
        return self._ids[token]

    def _convert_id_to_token(self, index: int) -> Any:
        return list(self._ids)[index]

    def convert_tokens_to_string(self, tokens: Any) -> str:
        """Return the text of tokens."""
        parts = [part if isinstance(part, bytes) else part.encode() for part in tokens]
        return b"".join(parts).decode(errors="replace")


def test_a_tokenizer_in_python_is_decoded_by_bytes_too() -> None:
    tokenizer = tokenizers.Tokenizer(PythonTokenizer(eos_token=END))
    ids = [*tokenizer.encode("é🙂<end>"), 256]
    for cut in range(len(ids)):
        stream = tokenizer.detokenizer(ids[:cut])
        answer = "".join(stream.push([id_]) for id_ in ids[cut:]) + stream.flush()
        assert tokenizer.detokenizer().push(ids[:cut]) + answer == "é🙂 a" == tokenizer.decode(ids)
    assert "".join(tokenizer.pieces("é<end>")) == "é<end>"
    assert tokenizer.bytes_of(256) == b" a"


@pytest.mark.parametrize("name", KINDS)
def test_each_token_costs_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """However long the answer, and if its tokens have no text by themselves."""
    tokenizer, sizes = wrap(KINDS[name]()), list[int]()  # its own, to watch
    decode = tokenizer.decode

    def spy(ids: Sequence[int], *, skip_special: bool = True) -> str:
        sizes.append(len(ids))
        return decode(ids, skip_special=skip_special)

    monkeypatch.setattr(tokenizer, "decode", spy)
    for id_ in sorted(tokenizer.tokens)[:40]:
        stream = tokenizer.detokenizer([id_] * 50)
        stream.push([id_] * 50)
    assert max(sizes, default=0) <= 9


@SHARED
@given(
    text=st.text("ab é你🙂\u0301\ufffd,. \n"), special=st.sampled_from(["", "<s>", "</s>", UNKNOWN])
)
def test_the_pieces_of_a_prompt_are_the_prompt_as_it_was_given(
    kind: Tokenizer, text: str, special: str
) -> None:
    """Also what the tokenizer does not know, changes or adds; special tokens keep their text."""
    prompt = f"{text}{special} {text}"

    pieces = kind.pieces(prompt)

    assert "".join(pieces) == prompt * bool(pieces)
    assert len(pieces) == len(kind.encode(prompt))


@SHARED
@given(data=st.data())
def test_the_pieces_of_ids_are_their_text_with_special_tokens(
    kind: Tokenizer, data: st.DataObject
) -> None:
    ids = draw_ids(data, kind)

    text = "".join(kind.pieces(ids))

    assert kind.decode(ids, skip_special=False).rstrip("\ufffd") == text.rstrip("\ufffd")


@SHARED
@given(data=st.data())
def test_the_bytes_of_tokens_join_to_the_text_that_they_add(
    kind: Tokenizer, data: st.DataObject
) -> None:
    if kind is toy("word_ends"):
        return  # there the space after a word shows with the next one
    before = [id_ for id_ in sorted(kind.tokens) if kind.bytes_of(id_)][-1:]
    known = sorted(set(kind.tokens) - kind.special_ids)
    ids = data.draw(st.lists(st.sampled_from(known), max_size=6))
    stream = kind.detokenizer(before)

    text = stream.push(ids) + stream.flush()

    joined = b"".join(map(kind.bytes_of, ids))
    assert joined.decode(errors=kind.invalid_bytes) == text


@pytest.mark.parametrize("name", ["llama_2", "byte_level", "gemma"])
@pytest.mark.parametrize("text", ["world the cat", " world the cat", "  world", "é"])
def test_a_continuation_has_the_tokens_of_the_whole_text(name: str, text: str) -> None:
    tokenizer = toy(name)
    ids = tokenizer.encode_continuation(text)

    added = tokenizer.detokenizer(tokenizer.encode("hello")).push(ids)

    assert added.removeprefix(" ") == text.removeprefix(" ")
    if text.startswith(" "):
        assert added == text


def test_an_incomplete_character_stays_pending_until_flush(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("cat 🙂", add_special=False)[:-1]
    stream = tokenizer.detokenizer()

    assert stream.push(ids).rstrip() == "cat"
    assert stream.flush().strip(" ") in {"\ufffd", "\ufffd\ufffd\ufffd"}
    assert not stream.flush()


def test_invalid_bytes_do_not_stay_pending_forever(
    byte_tokenizer: Tokenizer,
) -> None:
    lone = next(id_ for id_ in byte_tokenizer.tokens if byte_tokenizer.bytes_of(id_) == b"\xff")
    stream = byte_tokenizer.detokenizer()

    assert stream.push([lone] * 40).count("\ufffd") >= 30


def test_a_special_token_has_no_text_and_keeps_spaces(space_tokenizer: Tokenizer) -> None:
    cat, the = (
        id_
        for id_, token in sorted(space_tokenizer.tokens.items(), key=lambda item: item[1])
        if token in {"▁cat", "▁the"}
    )
    (end,) = space_tokenizer.stop_ids
    stream = space_tokenizer.detokenizer()

    assert stream.push([the, end, cat]) == "the cat"
    assert space_tokenizer.detokenizer(skip_special=False).push([the, end]) == "the</s>"


def test_decoding_undoes_encoding(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode(tokenizer.encode("the cat 你好")) == "the cat 你好"


def test_a_text_over_the_limit_is_refused(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.encode("cat", limit=3)
    with pytest.raises(ContextTooLong, match="tokens; 2 fit"):
        byte_tokenizer.encode("xyz", limit=2)


def test_a_far_too_long_text_is_refused_before_tokenisation(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextTooLong, match="characters"):
        byte_tokenizer.encode("x" * 10_000_000, limit=100)


def test_a_token_without_logits_is_refused(byte_tokenizer: Tokenizer) -> None:
    narrow = byte_tokenizer.narrowed(1)

    with pytest.raises(InvalidRequest, match="'</s>'"):
        narrow.encode("</s>")


def test_the_chat_template_makes_the_prompt(byte_tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "hello"}]

    ids = byte_tokenizer.chat(messages)

    assert byte_tokenizer.decode(ids, skip_special=False) == "<s>user: hello<s>assistant:"


def test_the_last_message_can_be_continued(byte_tokenizer: Tokenizer) -> None:
    messages = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "the cat"},
    ]

    ids = byte_tokenizer.chat(messages, continue_last=True)

    text = byte_tokenizer.decode(ids, skip_special=False)
    assert text == "<s>user: hello<s>assistant: the cat"


def test_messages_that_the_template_rejects_are_invalid(
    byte_tokenizer: Tokenizer,
) -> None:
    with pytest.raises(InvalidRequest, match="no tools") as refused:
        byte_tokenizer.chat([{"role": "tool", "content": "4"}])
    assert refused.value.param == "messages"


LOOP = "{% for m in messages %}[{{ m.role }}]BODY{% endfor %}"
READS_TEXT = {
    "printed": "{{ m.content }}",
    "added to text": "{{ m['content'] + '!' }}",
    "stripped": "{{ m.content.strip() }}",
    "set, and ignored unless text": "{% if m.content is string %}{% set c = m.content %}"
    "{% else %}{% set c = '' %}{% endif %}{{ c }}",
    "lines of it": "{% for line in m.content.split('\\n') %}{{ line }} {% endfor %}",
}
READS_PARTS = {
    "loop": "{% for part in m.content %}{% if part.type == 'text' %}{{ part.text }}{% endif %}"
    "{% endfor %}",
    "items": "{% for part in m['content'] %}{{ part['text'] }}{% endfor %}",
    "filtered": "{% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %}",
    "joined": "{{ m.content | map(attribute='text') | join }}",
    "first": "{{ m.content[0].text }}",
    "alias": "{% set parts = m.content %}{% for part in parts %}{{ part.text }}{% endfor %}",
    "macro": "{% macro show(some) %}{% for part in some %}{{ part.text }}{% endfor %}"
    "{% endmacro %}{{ show(m.content) }}",
    "raises on text": "{% if m.content is string %}{{ raise_exception('parts!') }}{% endif %}"
    "{% for part in m.content %}{{ part.text }}{% endfor %}",
}
READS_BOTH = {
    "either": "{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}<{{ part.text }}>{% endfor %}{% endif %}",
}


def templated(body: str) -> Tokenizer:
    return wrap(byte_level(), chat_template=LOOP.replace("BODY", body))


def rendered(tokenizer: Tokenizer, *messages: dict[str, Any]) -> str:
    return tokenizer.decode(tokenizer.chat(messages), skip_special=False)


def conversation(role: str, content: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": "hello"}, {"role": role, "content": content}]


@pytest.mark.parametrize("role", ["system", "user", "assistant", "tool", "other"])
@pytest.mark.parametrize("body", [*READS_TEXT.values(), *READS_PARTS.values()])
def test_a_template_gets_the_form_of_content_that_it_reads(body: str, role: str) -> None:
    """Whichever form was sent, its text is in the prompt, and the same for both."""
    tokenizer = templated(body)
    parts = [{"type": "text", "text": "the cat"}]
    text = rendered(tokenizer, *conversation(role, "the cat"))
    assert rendered(tokenizer, *conversation(role, parts)) == text
    assert "hello" in text.split(f"[{role}]")[-2]
    assert "the cat" in text.split(f"[{role}]")[-1]
    assert "type" not in text


@pytest.mark.parametrize("body", READS_BOTH.values())
def test_a_template_that_reads_both_forms_gets_what_was_sent(body: str) -> None:
    """As `apply_chat_template` of transformers does."""
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert rendered(templated(body), *conversation("user", parts)) == "[user]hello[user]<a><b>"
    assert rendered(templated(body), *conversation("user", "ab")) == "[user]hello[user]ab"


def test_each_role_has_its_own_form() -> None:
    """As in templates that read images of users alone."""
    tokenizer = templated(
        "{% if m.role == 'user' %}{% for part in m.content %}{{ part.text }}{% endfor %}"
        "{% else %}{{ m.content }}{% endif %}"
    )
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    for content in ("a\nb", parts):
        assert rendered(tokenizer, *conversation("assistant", content)).endswith("]a\nb")
    assert rendered(tokenizer, *conversation("user", parts)).endswith("]ab")


@pytest.mark.parametrize("body", [*READS_TEXT.values(), READS_PARTS["loop"]])
def test_empty_content_is_no_error(body: str) -> None:
    assert rendered(templated(body), *conversation("assistant", ""))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ m.content.nothing.here }}", "nothing"),
        ("{{ m.content + 1 }}", "TypeError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ m['a'].b.c }}", "no attribute 'a'"),
        ("{{ [][3].x }}", "no element 3"),
        ("{{ range(10**9) }}", "OverflowError"),
        ("{% macro f(x) %}{{ f(x) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{{ m.content.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(m) }}", "unsafe"),
        ("{{ ''.join(3) }}", "TypeError"),
        ("{{ {}['x'].y }}", "no attribute 'x'"),
        ("{{ 'x' | nosuchfilter }}", "nosuchfilter"),
        ("{% if %}", "block"),
        ("{{ strftime_now(3) }}", "TypeError"),
        ("{{ '%d' | format('x') }}", "TypeError"),
        ("{{ '\ud800'.encode('utf-8').decode('ascii') }}", "Unicode"),
    ],
)
def test_whatever_a_template_raises_is_invalid_and_says_what(body: str, words: str) -> None:
    with pytest.raises(InvalidRequest, match=words) as refused:
        templated(body).chat([{"role": "user", "content": "hello"}])
    assert refused.value.param == "messages"


def test_chat_without_a_template_is_an_invalid_request(space_tokenizer: Tokenizer) -> None:
    assert not space_tokenizer.has_chat_template
    with pytest.raises(InvalidRequest, match="no chat template"):
        space_tokenizer.chat([{"role": "user", "content": "hello"}])


def test_a_conversation_over_the_limit_is_refused(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(ContextTooLong):
        byte_tokenizer.chat([{"role": "user", "content": "hello"}], limit=3)


def test_bytes_of_tokens_join_to_the_bytes_of_the_text(tokenizer: Tokenizer) -> None:
    text = "the cat 你好 🙂"
    ids = tokenizer.encode(text, add_special=False)

    joined = b"".join(tokenizer.bytes_of(id_) for id_ in ids)

    assert joined.strip(b" ") == text.encode()
    assert not tokenizer.bytes_of(10**6)


def test_special_tokens_are_known(byte_tokenizer: Tokenizer) -> None:
    assert byte_tokenizer.special_ids == {0, 1}
    assert byte_tokenizer.stop_ids == (1,)
    assert byte_tokenizer.size == 280


def test_a_missing_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="No tokenizer"):
        tokenizers.load(str(tmp_path))


def test_a_saved_tokenizer_is_loaded(tmp_path: Path) -> None:
    backend = byte_level()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path)

    loaded = tokenizers.load(str(tmp_path))

    assert loaded.tokens == wrap(backend).tokens
