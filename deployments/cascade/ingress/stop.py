"""Stop strings, found in text that comes in pieces, without ever letting one through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
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

    def push(self, text: str) -> Passage:
        """Return what of the held and the new text can no longer belong to a stop string."""
        text = self._held + text
        found = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in self._stops]
        matches = [match for match in found if match[1] >= 0]
        if matches:
            _, start, stop = min(matches)
            self._held = ""
            return Passage(text=text[:start], stop=stop)
        room = len(text) - max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[room:]
        return Passage(text=text[:room])

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
