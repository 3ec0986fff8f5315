"""Text from tokens as they come, never half a character."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

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
