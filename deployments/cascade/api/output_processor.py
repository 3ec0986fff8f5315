"""Turns the generator's tokens into text deltas and finds the stop strings in them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from cascade.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cascade.api.response_parser import MessageDelta
    from cascade.engine.tokenizer import Tokenizer
    from cascade.types import Origin, OutputChunk, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMatch:
    """Text that is safe to send, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Holds text back while it may be the beginning of a stop string.

    The result does not depend on how the text is split: the stop string that is complete first
    wins, and of several that are complete at once the one that began first.

    Example: with the stop `END`, "xE" gives "x", then "NO" gives "ENO", then "END!" ends with "".
    """

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._include = include
        self._held = ""

    def push(self, text: str, *, early: bool = False) -> StopMatch:
        """Return the part of the held and the new text that cannot belong to a stop string.

        Args:
            text: The new text.
            early: A stop string that it completes does not count.
        """
        known, text = len(self._held), self._held + text
        matches: list[tuple[int, int, str]] = []
        for stop in () if early else self._stops:
            start = text.find(stop, max(0, known - len(stop) + 1))
            if start >= 0:
                matches.append((start + len(stop), start, stop))
        if matches:
            end, start, stop = min(matches)
            self._held = ""
            return StopMatch(text=text[: end if self._include else start], stop=stop)
        safe = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[safe:]
        return StopMatch(text=text[:safe])

    def flush(self) -> str:
        """Return the held text: without more text it is no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    start = max(len(text) - len(stop) + 1, 0)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One token and the text it added; empty if its character needs bytes of later tokens."""

    token_id: int
    text: str
    origin: Origin | None = None  # None: a token of the prompt
    logprob: TokenLogprob | None = None
    draft: TokenLogprob | None = None  # what the drafter proposed here, if it says so


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What was added to a completion. The last one has a finish reason."""

    tokens: tuple[TokenText, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None  # the stop string or stop id that ended it
    message: MessageDelta | None = None  # what a chat's text says; None: it is content

    @property
    def text(self) -> str:
        """Return the text of all tokens."""
        return "".join(token.text for token in self.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOptions:
    """What ends a completion besides its stop tokens, and what its text shows."""

    stops: tuple[str, ...] = ()  # strings that end it
    include_stop: bool = False  # what ends it, string or token, is part of its text
    min_tokens: int = 0  # within which no stop string ends it
    skip_special: bool = True  # special tokens have no text
    visible: frozenset[int] = frozenset()  # but these
    special_spaces: bool = True  # keep spaces that the tokenizer writes between added tokens


class OutputProcessor:
    """Detokenizes one completion.

    A token is released once its text is final: all bytes of its characters are there, and it cannot
    belong to a stop string. So the text of a delta is always the text of its tokens. A stop string
    ends the completion at the token that completes it; text from the stop string on is cut off.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        stop_ids: Iterable[int] = (),
        options: TextOptions | None = None,
    ) -> None:
        """Start a completion.

        Args:
            tokenizer: Makes the detokenizer.
            prompt: The tokens that the completion continues.
            stop_ids: Tokens that end the completion.
            options: What ends it and what its text shows.
        """
        options = options or TextOptions()
        self._detokenizer = tokenizer.detokenizer(
            prompt,
            skip_special=options.skip_special,
            visible=options.visible,
            spaces=options.special_spaces,
        )
        self._matcher = StopMatcher(options.stops, include=options.include_stop)
        self._stop_ids = frozenset(stop_ids)
        self._include_stop = options.include_stop
        self._early = options.min_tokens  # tokens left within which no stop string counts
        self._pending: deque[TokenText] = deque()
        self._safe = 0  # characters of the pending tokens that cannot belong to a stop string

    def push(self, chunk: OutputChunk) -> Delta:
        """Return the tokens that are final after this chunk."""
        tokens = zip(chunk.tokens, chunk.origins, strict=True)
        for (token_id, origin), logprob, draft in zip_longest(tokens, chunk.logprobs, chunk.drafts):
            ends = token_id in self._stop_ids
            hidden = ends and not self._include_stop
            text = "" if hidden else self._detokenizer.push([token_id])
            self._early -= 1
            self._pending.append(
                TokenText(token_id=token_id, text=text, origin=origin, logprob=logprob, draft=draft)
            )
            if (stop := self._find_stop(text)) is not None:
                return self._release_all(FinishReason.STOP, stop)
            if ends:
                return self._finish(FinishReason.STOP, token_id)
        if chunk.finish is not None:
            return self._finish(chunk.finish, None)
        return Delta(tokens=self._release())

    def _find_stop(self, text: str) -> str | None:
        """Return the stop string that the text completes."""
        match = self._matcher.push(text, early=self._early >= 0)
        self._safe += len(match.text)
        return match.stop

    def _finish(self, finish: FinishReason, stop_id: int | None) -> Delta:
        """Release the tokens that waited for the rest of a character or a stop string."""
        rest = self._detokenizer.flush()
        if rest and self._pending:
            last = self._pending.pop()
            self._pending.append(replace(last, text=last.text + rest))
            if (stop := self._find_stop(rest)) is not None:
                return self._release_all(FinishReason.STOP, stop)
        self._safe += len(self._matcher.flush())
        return self._release_all(finish, stop_id)

    def _release_all(self, finish: FinishReason, stop: str | int | None) -> Delta:
        """Release all pending tokens, with only the text before a stop string."""
        tokens: list[TokenText] = []
        for token in self._pending:
            tokens.append(replace(token, text=token.text[: self._safe]))
            self._safe -= len(tokens[-1].text)
        self._pending.clear()
        return Delta(tokens=tuple(tokens), finish=finish, stop=stop)

    def _release(self) -> tuple[TokenText, ...]:
        """Release the tokens whose text is final; one without text waits for the next with text."""
        released: list[TokenText] = []
        while True:
            count = next((at for at, token in enumerate(self._pending, 1) if token.text), 0)
            if not count or len(self._pending[count - 1].text) > self._safe:
                return tuple(released)
            self._safe -= len(self._pending[count - 1].text)
            released.extend(self._pending.popleft() for _ in range(count))
