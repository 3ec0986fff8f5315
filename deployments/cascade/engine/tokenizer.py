"""Text to tokens and back: limits, chat templates and incremental decoding."""

from __future__ import annotations

import inspect
import re
from codecs import getincrementaldecoder, register_error
from contextlib import suppress
from functools import cached_property, partial
from importlib.util import find_spec
from itertools import islice, zip_longest
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cascade.engine.model_loader import find_file, first_line
from cascade.errors import ContextTooLong, InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

_CONTEXT = 8  # tokens before a text that decide how it is decoded: one, unless they have no text

_BYTE_TOKEN = re.compile("<0x[0-9A-Fa-f]{2}>")
_SENTENCEPIECE = ("tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


def _replace_each_byte(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError), "used to decode"
    return "\ufffd" * (error.end - error.start), error.end


# SentencePiece writes U+FFFD for each invalid byte, byte-level decoders one for several bytes that
# begin the same character. Codecs take such a function by a registered name.
register_error("cascade-each-byte", _replace_each_byte)


class Detokenizer:
    """Decodes the tokens that follow a prompt, one by one.

    The text of a token depends on those before it: decoders drop the space before the first word,
    and a character may have several tokens. So a token is decoded together with the last one that
    has text, and tokens that are bytes are joined as bytes: what is incomplete there waits, what is
    invalid becomes U+FFFD, and a U+FFFD that a model writes is a character like any other.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        skipped: frozenset[int] = frozenset(),
        joined: frozenset[int] = frozenset(),
    ) -> None:
        """Start behind a prompt.

        Args:
            tokenizer: Decodes.
            prompt: Tokens before the first one. If they end inside a character, it is part of the
                text that follows.
            skipped: Tokens without text.
            joined: Tokens that have no space between each other.
        """
        self._tokenizer = tokenizer
        self._decode = partial(tokenizer.decode, skip_special=False)
        self._skipped = skipped
        self._joined = joined
        self._utf8 = getincrementaldecoder("utf-8")(tokenizer.invalid_bytes)
        shown = filter(self._has_text, reversed(prompt))
        self._context = list(islice(shown, _CONTEXT))[::-1]  # the last tokens, with text
        self._before = None if self._context else ""  # their text, if it is known
        for token in self._context:
            data = tokenizer.raw_bytes(token)
            self._utf8.decode(data or b"", final=data is None)

    def push(self, tokens: Iterable[int]) -> str:
        """Return the text that `tokens` add; an incomplete character stays pending."""
        return "".join(map(self._push, tokens))

    def flush(self) -> str:
        """Return the pending text: an incomplete character, as U+FFFD."""
        return self._utf8.decode(b"", final=True)

    def _push(self, token: int) -> str:
        if not self._has_text(token):
            return ""
        data = self._tokenizer.raw_bytes(token)
        if data is None:
            return self.flush() + self._decode_in_context(token)
        self._context, self._before = [token], None
        return self._utf8.decode(data)

    def _has_text(self, token: int) -> bool:
        return token not in self._skipped and token in self._tokenizer.tokens

    def _decode_in_context(self, token: int) -> str:
        before = self._decode(self._context) if self._before is None else self._before
        together = [*self._context, token]
        whole, alone = self._decode(together), self._decode([token])
        if token in self._joined and self._joined.issuperset(self._context[-1:]):
            whole = before + alone
        self._context, self._before = ([token], alone) if alone else (together[-_CONTEXT:], None)
        return whole[len(before) :] if whole.startswith(before) else alone


# What `apply_chat_template` takes that is no variable of a template, or that `chat` passes itself.
_RESERVED = {
    "messages",
    *inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters,
} - {"documents", "kwargs"}

# Texts that no chat template has of its own, to see what it shows of a message.
_NEEDLE, _KEY = "7d1f0c9e", "b24c86a5"


def _readable(message: Mapping[str, Any], forms: Mapping[str, set[type]]) -> Mapping[str, Any]:
    """Return the message with its content in a form that the chat template reads."""
    content: Any = message.get("content")
    reads = forms.get(message["role"], forms["user"])
    if isinstance(content, str) and str not in reads:
        parts = [{"type": "text", "text": content}] if content else []
        return {**message, "content": parts}
    if isinstance(content, list) and list not in reads:
        texts: Any = content
        return {**message, "content": "\n".join(part["text"] for part in texts)}
    return message


class Tokenizer:
    """A tokenizer that gives only ids below `vocabulary`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.tokens: dict[int, str] = {id_: token for token, id_ in tokenizer.get_vocab().items()}
        self.size = max(self.tokens, default=-1) + 1
        self._bytes: dict[int, bytes] = {}  # of the tokens that `bytes_of` was asked for
        self.vocabulary = self.size if vocabulary is None else vocabulary

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Return the ids that are special tokens."""
        flagged = {id_ for id_, token in self._added.items() if token.special}
        return frozenset(flagged | set(self._tokenizer.all_special_ids))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the end-of-text id, if there is one."""
        end: Any = self._tokenizer.eos_token_id
        return () if end is None else (end,)

    @property
    def begin_ids(self) -> tuple[int, ...]:
        """Return the beginning-of-text id, if there is one."""
        begin: Any = self._tokenizer.bos_token_id
        return () if begin is None else (begin,)

    @property
    def unknown_id(self) -> int | None:
        """Return the token of text that the tokenizer does not know, if there is one."""
        unknown: Any = self._tokenizer.unk_token_id
        return unknown

    @property
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._tokenizer.chat_template is not None

    @property
    def chat_template(self) -> str:
        """Return the source of the chat template that conversations with tools get, or nothing."""
        found: Any = self._tokenizer.chat_template
        if isinstance(found, dict):
            found = found.get("tool_use") or found.get("default")
        return found or ""

    @property
    def response_template(self) -> dict[str, Any] | None:
        """Return what the checkpoint says of how answers are written, as transformers has it."""
        return getattr(self._tokenizer, "response_template", None)

    def encode(
        self, text: str, *, add_special: bool = True, limit: int | None = None
    ) -> tuple[int, ...]:
        """Return the ids of `text`.

        Args:
            text: Any text.
            add_special: Begin with the token that the model expects first, if it has one.
            limit: Most tokens to accept.

        Raises:
            ContextTooLong: There are more than `limit` tokens.
            InvalidRequest: The models have no logits for a token of the text.
        """
        if limit is not None and len(text) > limit * self._longest:
            raise ContextTooLong(
                f"The text has {len(text)} characters, more than {limit} tokens can hold"
            )
        ids: list[int] = self._tokenizer(text, add_special_tokens=add_special, verbose=False)[
            "input_ids"
        ]
        if limit is not None and len(ids) > limit:
            raise ContextTooLong(f"The text has {len(ids)} tokens; {limit} fit")
        unknown = next((id_ for id_ in ids if id_ >= self.vocabulary), None)
        if unknown is not None:
            raise InvalidRequest(
                f"The text contains {self.tokens[unknown]!r}, for which the models have no logits"
            )
        return tuple(ids)

    def encode_continuation(self, text: str) -> tuple[int, ...]:
        """Return the ids of a text that continues another; raises as `encode` does.

        Some tokenizers begin every text with a space: it is the one that the text begins with.
        """
        ids = self.encode(text, add_special=False)
        if self._continued(ids) == f" {text}" and text.startswith(" "):
            return self.encode(text[1:], add_special=False)
        return ids

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        limit: int | None = None,
        **rendering: Any,
    ) -> tuple[int, ...]:
        """Return the ids of a conversation in the model's chat template.

        Args:
            messages: Objects with a `role` and a `content`, oldest first.
            limit: Most tokens to accept.
            rendering: The other arguments of `render`.

        Raises:
            InvalidRequest: There is no template, it rejects the conversation, or a variable is not
                the template's.
            ContextTooLong: There are more than `limit` tokens.
        """
        return self.encode(self.render(messages, **rendering), add_special=False, limit=limit)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_last: bool = False,
        variables: Mapping[str, Any] | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> str:
        """Return the text of a conversation in the model's chat template.

        Args:
            messages: Objects with a `role` and a `content`, oldest first. Content is a text or a
                list of text parts; the template gets the form that it reads.
            add_generation_prompt: Begin an answer, unless the last message is continued.
            continue_last: Continue the last message instead of starting a new one.
            variables: Further variables of the template, such as `enable_thinking`.
            tools: What the model may call, as OpenAI's API describes it.

        Raises:
            InvalidRequest: There is no template, it rejects the conversation, or a variable is not
                the template's.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template; ask for a completion of a prompt instead"
            )
        variables = variables or {}
        if reserved := sorted(_RESERVED & variables.keys()):
            param = f"chat_template_kwargs.{reserved[0]}"
            raise InvalidRequest(
                f"`{param}` is no variable of a chat template here; leave it out, and send"
                " messages, `add_generation_prompt` and `continue_final_message` as fields of the"
                " request",
                param=param,
            )
        try:
            return self._render(
                [_readable(message, self._content_forms) for message in messages],
                add_generation_prompt=add_generation_prompt and not continue_last,
                continue_final_message=continue_last,
                **({"tools": [dict(tool) for tool in tools]} if tools else {}),
                **variables,
            )
        except Exception as error:
            what = str(error) if isinstance(error, TemplateError) else repr(error)
            raise InvalidRequest(
                f"The model's chat template rejects these messages: {what}", param="messages"
            ) from error

    def _render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        conversation: Any = [dict(message) for message in messages]
        text: Any = self._tokenizer.apply_chat_template(conversation, tokenize=False, **variables)
        return text

    @cached_property
    def shows_tools(self) -> bool:
        """Whether the chat template shows the model what it may call."""
        tool = {"type": "function", "function": {"name": _NEEDLE, "parameters": {}}}
        with suppress(Exception):
            return _NEEDLE in self._render([{"role": "user", "content": "?"}], tools=[tool])
        return False

    @cached_property
    def _content_forms(self) -> dict[str, set[type]]:
        """Return by role which forms of content the chat template reads: text, lists of parts.

        What a template reads is in the text that it makes of a conversation.
        """
        forms: dict[str, set[type]] = {"user": {str, list}}
        call = {"id": "call12345", "type": "function", "function": {"name": "f", "arguments": {}}}
        asked: list[Any] = [{"role": "user", "content": "?"}]
        called = {"role": "assistant", "content": "", "tool_calls": [call]}
        for role, before, after in (
            ("user", [], []),
            ("system", [], asked),
            ("assistant", asked, asked),
            ("tool", [*asked, called], []),
        ):
            shown: set[type] = set()
            for content in (_NEEDLE, [{"type": "text", "text": _NEEDLE, "key": _KEY}]):
                probe = {"role": role, "content": content}
                conversation = [_readable(one, forms) for one in before]
                conversation += [probe, *(_readable(one, forms) for one in after)]
                with suppress(Exception):
                    text = self._render(conversation, add_generation_prompt=True)
                    if _NEEDLE in text and _KEY not in text:
                        shown.add(type(content))
            forms[role] = shown or forms["user"]
        return forms

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        text: Any = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text

    def detokenizer(
        self,
        prompt: Sequence[int] = (),
        *,
        skip_special: bool = True,
        visible: frozenset[int] = frozenset(),
        spaces: bool = True,
    ) -> Detokenizer:
        """Return an incremental decoder of the text that follows a prompt.

        Args:
            prompt: Tokens before the text.
            skip_special: Special tokens have no text.
            visible: Special tokens that have text nevertheless.
            spaces: Keep spaces that the tokenizer writes between added tokens.
        """
        return Detokenizer(
            self,
            prompt,
            skipped=self.special_ids - visible if skip_special else frozenset(),
            joined=frozenset() if spaces else frozenset(self._added),
        )

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Return tokens as the vocabulary writes them."""
        found: list[Any] = [self.tokens.get(id_, "") for id_ in ids]
        return [token if isinstance(token, str) else repr(token) for token in found]

    def bad_word(self, word: str) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of a word at the beginning of a text and, if they differ, inside one.

        As vLLM does: with a space before it the word counts only if it has as many tokens and
        begins with another.
        """
        text = word.lstrip() or word
        alone = self.encode(text, add_special=False)
        inside = self.encode(f" {text}", add_special=False)
        differs = len(inside) == len(alone) and inside[:1] != alone[:1]
        return tuple(ids for ids in (alone, inside if differs else ()) if ids)

    def pieces(self, prompt: str | Sequence[int]) -> tuple[str, ...]:
        """Return the text of each token of a prompt; together they are the prompt as it was given.

        Special tokens keep their text, those that `encode` adds have none. The text of a character
        of several tokens is that of the last; ids may end inside a character, which has no text.
        """
        if not isinstance(prompt, str):
            detokenizer = self.detokenizer(skip_special=False)
            return tuple(detokenizer.push([id_]) for id_ in prompt)
        if not self._tokenizer.is_fast:
            # There are no offsets, so the whole text is that of the last token.
            return (*[""] * (len(self.encode(prompt)) - 1), prompt)
        encoding: Any = self._tokenizer(prompt, return_offsets_mapping=True, verbose=False)
        spans: list[tuple[int, int]] = encoding["offset_mapping"]
        shown = [(index, span) for index, span in enumerate(spans) if span[0] < span[1]]
        texts, at = [""] * len(spans), 0
        for (index, (_, end)), following in zip_longest(shown, shown[1:]):
            cut = max(at, min(end, following[1][0])) if following else len(prompt)
            texts[index], at = prompt[at:cut], cut
        return (*texts[:-1], texts[-1] + prompt[at:]) if texts else ()

    def raw_bytes(self, id_: int) -> bytes | None:
        """Return the bytes of a token that adds them wherever it stands; None for one of text."""
        token: Any = self.tokens[id_]
        if isinstance(token, bytes):  # of tiktoken
            return token
        if self._byte_level:
            try:
                return bytes(self._alphabet[char] for char in token)
            except KeyError:  # an added token: decoders take it as it is
                return token.encode()
        if self._byte_fallback and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        return None

    def bytes_of(self, id_: int) -> bytes:
        """Return the bytes that a token adds to a text; none for an id without a token."""
        if id_ not in self.tokens:
            return b""
        if id_ not in self._bytes:
            data = self.raw_bytes(id_)
            if data is None:
                data = self._continued((id_,)).encode()
            self._bytes[id_] = data
        return self._bytes[id_]

    def _continued(self, ids: tuple[int, ...]) -> str:
        """Return the text that tokens add to a text."""
        once = self.decode(ids, skip_special=False)
        return self.decode(ids + ids, skip_special=False).removeprefix(once)

    def narrowed(self, vocabulary: int) -> Tokenizer:
        """Return this tokenizer with a smaller vocabulary; other ids are refused."""
        return Tokenizer(self._tokenizer, vocabulary=vocabulary)

    @cached_property
    def _added(self) -> Mapping[int, Any]:
        return self._tokenizer.added_tokens_decoder

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens.values()), default=1)

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        pairs: dict[int, str] = bytes_to_unicode()
        return {char: byte for byte, char in pairs.items()}

    @cached_property
    def _decoder(self) -> str | None:
        """Return the names of the decoder's parts; None for a tokenizer in Python."""
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        return None if backend is None else str(backend.decoder)

    @cached_property
    def _byte_level(self) -> bool:
        if self._decoder is None:
            return hasattr(self._tokenizer, "byte_decoder")
        return "ByteLevel" in self._decoder

    @cached_property
    def _byte_fallback(self) -> bool:
        return self._decoder is None or "ByteFallback" in self._decoder

    @cached_property
    def invalid_bytes(self) -> str:
        """Return the name of the error handler that writes invalid bytes as the decoder does."""
        return "replace" if self._byte_level else "cascade-each-byte"


def load(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer at a local path or of a Hugging Face repository.

    Args:
        name: Directory or repository id.
        revision: Branch, tag or commit of the repository.
        trust_remote_code: Run tokenizer code that comes with the checkpoint.

    Raises:
        UnsupportedModel: There is none that can be read.
    """
    try:
        loaded: Any = AutoTokenizer.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    # transformers fails in as many ways as a tokenizer can be broken.
    except Exception as error:
        reason = _missing_file(name, revision=revision) or first_line(error)
        raise UnsupportedModel(f"No tokenizer at {name!r} that can be read: {reason}") from error
    return Tokenizer(loaded)


def _missing_file(name: str, *, revision: str | None) -> str | None:
    """Return what to install or do if there is no tokenizer.json."""
    if find_file(name, "tokenizer.json", revision=revision) or find_spec("sentencepiece"):
        return None
    found = (file for file in _SENTENCEPIECE if find_file(name, file, revision=revision))
    file = next(found, None)
    return "it has no tokenizer.json" + (
        f" but a SentencePiece model ({file}); pip install sentencepiece, or save the tokenizer "
        "with transformers, which writes a tokenizer.json"
        if file
        else ""
    )
