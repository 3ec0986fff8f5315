"""Text to tokens and back: loading, limits, chat templates."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cascade.errors import ContextTooLong, InvalidRequest, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

_BROKEN = "\ufffd"  # what a decoder writes for bytes that are no character yet

# A character has at most four tokens, of one byte each; what is broken for longer stays broken.
_PATIENCE = 8


class Detokenizer:
    """Decodes one answer piece by piece; all pieces together are its text.

    A token's text depends on the ones before it (spaces, bytes of one character), so each decode
    starts at the tokens of the piece before.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []  # tokens of the last piece, then those not yet told
        self._told = 0  # of the window
        self._known = ""  # text of the told tokens of the window

    def push(self, tokens: Iterable[int]) -> str:
        """Return the text that `tokens` add; bytes of an unfinished character wait."""
        return "".join(self._next(token) for token in tokens)

    def flush(self) -> str:
        """Return the text that still waits; what is no character is U+FFFD."""
        return self._tell() if self._told < len(self._window) else ""

    def _next(self, token: int) -> str:
        self._window.append(token)
        waiting = len(self._window) - self._told
        if waiting <= _PATIENCE and self._decode(self._window).endswith(_BROKEN):
            return ""
        return self._tell()

    def _tell(self) -> str:
        fresh = self._window[self._told :]
        whole, alone = self._decode(self._window), self._decode(fresh)
        if not whole.startswith(self._known):
            # Half a character can make a decoder give up the whole one before it.
            whole = self._known + alone
        text = whole[len(self._known) :]
        if alone:
            # Tokens without text, special ones, are no context for the next.
            self._window, whole = fresh, alone
        self._told = len(self._window)
        self._known = whole
        return text


_BYTE_TOKEN_LENGTH = len("<0x00>")


class Tokenizer:
    """A tokenizer and the ids it may give: those below `vocabulary`."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, vocabulary: int | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self.tokens: dict[int, str] = {id_: token for token, id_ in tokenizer.get_vocab().items()}
        self.size = max(self.tokens, default=-1) + 1
        self.vocabulary = self.size if vocabulary is None else vocabulary

    @property
    def special_ids(self) -> frozenset[int]:
        """Return the ids that stand for no text."""
        added: Mapping[int, Any] = self._tokenizer.added_tokens_decoder
        flagged = {id_ for id_, token in added.items() if token.special}
        return frozenset(flagged | set(self._tokenizer.all_special_ids))

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the id that ends a text, if there is one."""
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
            text: any text.
            add_special: begin with the token the model expects first, if it has one.
            limit: most tokens to accept.

        Raises:
            ContextTooLong: if there are more than `limit`.
            InvalidRequest: if the model has no logits for a token of the text.
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
        """Return the ids of a conversation under the model's own template.

        Args:
            messages: objects with a `role` and a `content`, oldest first.
            limit: most tokens to accept.
            continue_last: let the answer go on where the last message ends.
            variables: further variables of the template, such as `tools`.

        Raises:
            InvalidRequest: if there is no template, or it refuses the conversation.
            ContextTooLong: if there are more than `limit` tokens.
        """
        if not self.has_chat_template:
            raise InvalidRequest(
                "This model has no chat template; ask for a completion of a prompt instead"
            )
        conversation: Any = [dict(message) for message in messages]
        try:
            text: Any = self._tokenizer.apply_chat_template(
                conversation,
                tokenize=False,
                add_generation_prompt=not continue_last,
                continue_final_message=continue_last,
                **variables,
            )
        except (TemplateError, ValueError, TypeError, KeyError) as error:
            raise InvalidRequest(
                f"The model's chat template refuses these messages: {error}", param="messages"
            ) from error
        return self.encode(text, add_special=False, limit=limit)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Return the text of `ids`."""
        text: Any = self._tokenizer.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text

    def detokenizer(self, *, skip_special: bool = True) -> Detokenizer:
        """Return a decoder for one answer that comes in pieces."""

        def decode(ids: Sequence[int]) -> str:
            return self.decode(ids, skip_special=skip_special)

        return Detokenizer(decode)

    def text_of(self, id_: int) -> str:
        """Return one token's text by itself; part of a character is U+FFFD."""
        return self.bytes_of(id_).decode("utf-8", errors="replace")

    def bytes_of(self, id_: int) -> bytes:
        """Return the bytes one token stands for; nothing for an id without a token."""
        token = self.tokens.get(id_, "")
        if id_ in self._added:
            return token.encode()
        if self._byte_level:
            return bytes(byte for char in token for byte in self._bytes_of_char(char))
        if len(token) == _BYTE_TOKEN_LENGTH and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        return token.replace("\u2581", " ").encode()

    def narrowed(self, vocabulary: int) -> Tokenizer:
        """Return this tokenizer, refusing ids from `vocabulary` on."""
        return Tokenizer(self._tokenizer, vocabulary=vocabulary)

    @cached_property
    def _added(self) -> frozenset[int]:
        added: Mapping[int, Any] = self._tokenizer.added_tokens_decoder
        return frozenset(added)

    @cached_property
    def _longest(self) -> int:
        return max(map(len, self.tokens.values()), default=1)

    @cached_property
    def _alphabet(self) -> dict[str, int]:
        pairs: dict[int, str] = bytes_to_unicode()
        return {char: byte for byte, char in pairs.items()}

    @cached_property
    def _byte_level(self) -> bool:
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        return "ByteLevel" in str(getattr(backend, "decoder", ""))

    def _bytes_of_char(self, char: str) -> bytes:
        byte = self._alphabet.get(char)
        return char.encode() if byte is None else bytes([byte])


def load(name: str, *, revision: str | None = None, trust_remote_code: bool = False) -> Tokenizer:
    """Return the tokenizer at a local path or of a Hugging Face repository.

    Raises:
        UnsupportedModel: if there is none that can be read.
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
