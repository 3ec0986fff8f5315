"""Text to tokens and back: limits, chat templates and incremental decoding."""

from __future__ import annotations

from contextlib import suppress
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cascade.errors import ContextTooLong, InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_REPLACEMENT = "\ufffd"  # what a decoder writes for an incomplete character

# A character has at most four tokens, of one byte each; after more it is invalid, not incomplete.
_MAX_HELD = 8


class Detokenizer:
    """Decodes one completion incrementally.

    A token's text depends on those before it (spaces, bytes of one character), so each decode
    starts at the tokens of the previous piece of text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # tokens of the last piece, then the pending ones
        self._emitted = 0  # tokens of the window whose whole text was returned
        self._prefix = ""  # the window's text that was returned
        self._held = 0  # tokens since text was last returned

    def push(self, tokens: Iterable[int]) -> str:
        """Return the text that `tokens` add; an incomplete character stays pending."""
        return "".join(self._push(token) for token in tokens)

    def flush(self) -> str:
        """Return the pending text; an incomplete character becomes U+FFFD."""
        return self._emit() if self._emitted < len(self._window) else ""

    def _push(self, token: int) -> str:
        self._window.append(token)
        self._held += 1
        text = self._decode(self._window)
        if not text.endswith(_REPLACEMENT) or self._held > _MAX_HELD:
            return self._emit()
        # Tokens may end inside characters for long: what is complete need not wait.
        complete = text.rstrip(_REPLACEMENT)
        if len(complete) <= len(self._prefix) or not complete.startswith(self._prefix):
            return ""
        new, self._prefix, self._held = complete[len(self._prefix) :], complete, 0
        return new

    def _emit(self) -> str:
        pending = self._window[self._emitted :]
        whole, alone = self._decode(self._window), self._decode(pending)
        if not whole.startswith(self._prefix):
            # Half a character can make a decoder drop the complete one before it.
            whole = self._prefix + alone
        text = whole[len(self._prefix) :]
        if alone:
            # Tokens without text, special ones, are no context for the next.
            self._window, whole = pending, alone
        self._emitted, self._held = len(self._window), 0
        self._prefix = whole
        return text


_BYTE_TOKEN_LENGTH = len("<0x00>")

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
        self.vocabulary = self.size if vocabulary is None else vocabulary

    @property
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
    def has_chat_template(self) -> bool:
        """Whether `chat` works."""
        return self._tokenizer.chat_template is not None

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

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        limit: int | None = None,
        continue_last: bool = False,
        **variables: Any,
    ) -> tuple[int, ...]:
        """Return the ids of a conversation in the model's chat template.

        Args:
            messages: Objects with a `role` and a `content`, oldest first. Content is a text or a
                list of text parts; the template gets the form that it reads.
            limit: Most tokens to accept.
            continue_last: Continue the last message instead of starting a new one.
            variables: Further variables of the template, such as `tools`.

        Raises:
            InvalidRequest: There is no template, or it rejects the conversation.
            ContextTooLong: There are more than `limit` tokens.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template; ask for a completion of a prompt instead"
            )
        try:
            text = self._render(
                [_readable(message, self._content_forms) for message in messages],
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
                **variables,
            )
        except Exception as error:
            what = str(error) if isinstance(error, TemplateError) else repr(error)
            raise InvalidRequest(
                f"The model's chat template rejects these messages: {what}", param="messages"
            ) from error
        return self.encode(text, add_special=False, limit=limit)

    def _render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        conversation: Any = [dict(message) for message in messages]
        text: Any = self._tokenizer.apply_chat_template(conversation, tokenize=False, **variables)
        return text

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

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """Return an incremental decoder for one completion."""
        return Detokenizer(partial(self.decode, skip_special=skip_special))

    def bytes_of(self, id_: int) -> bytes:
        """Return the bytes of one token; none for an id without a token."""
        token = self.tokens.get(id_, "")
        if id_ in self._added:
            return token.encode()
        if self._byte_level:
            return b"".join(self._alphabet.get(char) or char.encode() for char in token)
        if len(token) == _BYTE_TOKEN_LENGTH and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

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
    def _alphabet(self) -> dict[str, bytes]:
        pairs: dict[int, str] = bytes_to_unicode()
        return {char: bytes([byte]) for byte, char in pairs.items()}

    @cached_property
    def _byte_level(self) -> bool:
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in str(getattr(backend, "decoder", ""))


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
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UnsupportedModel(
            f"No tokenizer at {name!r} that can be read: {str(error).strip().splitlines()[0]}"
        ) from error
    return Tokenizer(loaded)
