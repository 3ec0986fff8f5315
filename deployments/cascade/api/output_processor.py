"""From pieces of tokens to pieces of text: what a client hears of one answer."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from cascade.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cascade.api.context import Tokenizer
    from cascade.types import Origin, OutputChunk, TokenLogprob


@dataclass(frozen=True, slots=True, kw_only=True)
class StopMatch:
    """Text that may go out, and the stop string that ended it, if one did."""

    text: str
    stop: str | None = None


class StopMatcher:
    """Holds text back while it may be the beginning of a stop string.

    What comes out does not depend on how the text was cut: the stop string that is complete first
    wins, and of several complete at once the one that began first.

    Example: with the stop `END`, "xE" gives "x", then "NO" gives "ENO", then "END!" ends with "".
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> StopMatch:
        """Return what of the held and the new text can no longer belong to a stop string."""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops]
        matches = [match for match in found if match[1] >= 0]
        if matches:
            _, start, stop = min(matches)
            self._held = ""
            return StopMatch(text=text[:start], stop=stop)
        room = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[room:]
        return StopMatch(text=text[:room])

    def flush(self) -> str:
        """Return the held text: no more comes, so it is no stop string."""
        text, self._held = self._held, ""
        return text


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop` and is not all of it."""
    start = max(len(text) - len(stop) + 1, 0)
    while (start := text.find(stop[0], start)) >= 0:
        if stop.startswith(text[start:]):
            return len(text) - start
        start += 1
    return 0


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenText:
    """One token and the text it added; empty while a character waits for its other bytes."""

    token_id: int
    text: str
    origin: Origin | None = None  # None: a token of the prompt
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """What was added to an answer. The last one says why it ended."""

    tokens: tuple[TokenText, ...] = ()
    finish: FinishReason | None = None
    stop: str | int | None = None  # the stop string or stop id that ended it

    @property
    def text(self) -> str:
        """Return the text of all entries."""
        return "".join(entry.text for entry in self.tokens)


class OutputProcessor:
    """Writes one answer down, token by token.

    A token goes out once all of its text is certain: no unfinished character, no possible beginning
    of a stop string. So the text of a delta is always the text of its tokens. At a stop string the
    answer ends with the token that completed it; text from the stop string on is cut off.
    """

    def __init__(
        self, tokenizer: Tokenizer, *, stops: Sequence[str] = (), stop_ids: Iterable[int] = ()
    ) -> None:
        self._words = tokenizer.detokenizer()
        self._matcher = StopMatcher(stops)
        self._stop_ids = frozenset(stop_ids)
        self._waiting: deque[TokenText] = deque()
        self._free = 0  # characters of the waiting entries that may go out

    def push(self, piece: OutputChunk) -> Delta:
        """Return what the piece makes certain."""
        logprobs = piece.logprobs or (None,) * len(piece.tokens)
        for token, origin, logprob in zip(piece.tokens, piece.origins, logprobs, strict=True):
            ends = token in self._stop_ids
            text = "" if ends else self._words.push([token])
            entry = TokenText(token_id=token, text=text, origin=origin, logprob=logprob)
            stop = self._write(entry)
            if stop is not None:
                return self._end(FinishReason.STOP, stop)
            if ends:
                return self._finish(FinishReason.STOP, token)
        if piece.finish is not None:
            return self._finish(piece.finish, None)
        return Delta(tokens=tuple(self._certain()))

    def _write(self, entry: TokenText) -> str | None:
        """Let an entry wait; return the stop string that it completes."""
        self._waiting.append(entry)
        passage = self._matcher.push(entry.text)
        self._free += len(passage.text)
        return passage.stop

    def _finish(self, finish: FinishReason, token: int | None) -> Delta:
        """Let out what waits for a character or a stop string that will not come."""
        rest = self._words.flush()
        stop = None
        if rest and self._waiting:
            last = self._waiting.pop()
            passage = self._matcher.push(rest)
            self._waiting.append(replace(last, text=last.text + rest))
            self._free += len(passage.text)
            stop = passage.stop
        if stop is not None:
            return self._end(FinishReason.STOP, stop)
        self._free += len(self._matcher.flush())
        return self._end(finish, token)

    def _end(self, finish: FinishReason, stop: str | int | None) -> Delta:
        """Let out all waiting tokens, with the text that is free."""
        entries: list[TokenText] = []
        for entry in self._waiting:
            entries.append(replace(entry, text=entry.text[: self._free]))
            self._free -= len(entries[-1].text)
        self._waiting.clear()
        return Delta(tokens=tuple(entries), finish=finish, stop=stop)

    def _certain(self) -> Iterable[TokenText]:
        """Take out the tokens whose text is free; one without text waits for the next with some."""
        while count := self._ready():
            for _ in range(count):
                entry = self._waiting.popleft()
                self._free -= len(entry.text)
                yield entry

    def _ready(self) -> int:
        """Return how many waiting tokens the next text to go out spans; 0 if it is not all free."""
        for count, entry in enumerate(self._waiting, start=1):
            if entry.text:
                return count if len(entry.text) <= self._free else 0
        return 0
