"""How many tokens to draft next."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from cascade.decoding.session import Bonus

if TYPE_CHECKING:
    from cascade.decoding.session import Policy


@dataclass(frozen=True, slots=True, kw_only=True)
class Length:
    """A number of tokens to draft, and the reason, which statistics report."""

    tokens: int  # 0: the expert decodes alone
    reason: str


def reserved(policy: Policy) -> int:
    """Return how many tokens of a round's room are the expert's: drafting them would be in vain.

    Under bonus `target` none is: a last token decoded alone would follow p, not the target.
    """
    return int(policy.bonus is Bonus.EXPERT)


class DraftLength(Protocol):
    """What decides a session's draft lengths; one object a session."""

    def next(self, *, room: int) -> Length:
        """Return the length of the next block; `room` is the tokens that may still be committed."""
        ...

    def learn(self, *, drafted: int, accepted: int, draft_s: float, judge_s: float) -> None:
        """Hear how a block fared and what it cost."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Fixed:
    """The same length every time, cut to the room."""

    tokens: int
    reason: str = "fixed"

    def next(self, *, room: int) -> Length:
        """Return the fixed length, or the room if that is less."""
        return Length(tokens=max(0, min(self.tokens, room)), reason=self.reason)

    def learn(self, *, drafted: int, accepted: int, draft_s: float, judge_s: float) -> None:
        """Change nothing."""
