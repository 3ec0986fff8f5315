"""Log-probabilities in OpenAI's two shapes. The tokens' texts join to the text of the answer."""

from __future__ import annotations

import math
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.ingress.events import Entry
    from cascade.ingress.service import Tokenizer

_IMPOSSIBLE = -9999.0  # JavaScript cannot read -Infinity; OpenAI documents this number


def text_logprobs(
    entries: Sequence[Entry], tokenizer: Tokenizer, *, offset: int
) -> dict[str, list[Any]]:
    """Return the `logprobs` of a text completion whose first entry is `offset` characters in."""
    lengths = [len(entry.text) for entry in entries]
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [_own(entry) for entry in entries],
        "top_logprobs": [_alternatives(entry, tokenizer) for entry in entries],
        "text_offset": list(accumulate(lengths[:-1], initial=offset)) if lengths else [],
    }


def chat_logprobs(entries: Sequence[Entry], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `logprobs` of a chat completion; the bytes of all tokens decode to the text."""
    content = [
        _chat_token(entry.text.encode(), _own(entry))
        | {"top_logprobs": [_chat_token(*one) for one in _tops(entry, tokenizer)]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _own(entry: Entry) -> float | None:
    return None if entry.logprob is None else _finite(entry.logprob.logprob)


def _alternatives(entry: Entry, tokenizer: Tokenizer) -> dict[str, float] | None:
    """Return the likeliest texts, and the token itself among them whether it is likely or not."""
    if entry.logprob is None:
        return None
    tops = {_name(data): logprob for data, logprob in _tops(entry, tokenizer)}
    return tops | {entry.text: _finite(entry.logprob.logprob)}


def _tops(entry: Entry, tokenizer: Tokenizer) -> list[tuple[bytes, float]]:
    """Return the likeliest tokens as bytes; the token itself has those it has in the text."""
    if entry.logprob is None:
        return []
    return [
        (entry.text.encode() if token == entry.token else tokenizer.bytes_of(token), _finite(value))
        for token, value in entry.logprob.top
    ]


def _name(data: bytes) -> str:
    """Return a token's text; where it is part of a character, its bytes as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _chat_token(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _name(data), "logprob": logprob, "bytes": list(data)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE
