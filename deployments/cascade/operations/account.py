"""One answer as an observer sees it: what was asked, what came, when, and how it ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.decoding.generation import Statistics
from cascade.errors import CascadeError

if TYPE_CHECKING:
    from cascade.decoding.generation import Piece, Request

CLOSED = "closed"  # by the door: a stop string, or a client that left


@dataclass(slots=True, kw_only=True, eq=False)
class Account:
    """Grows piece by piece; times are seconds of one clock."""

    request: Request
    began_s: float
    heard_s: float = 0.0  # when the last piece came
    first_s: float | None = None  # when the first came
    tokens: int = 0
    finish: str = CLOSED
    error: BaseException | None = None
    statistics: Statistics = field(default_factory=Statistics)
    reasons: dict[str, int] = field(default_factory=dict)  # rounds by what decided their length

    def hear(self, piece: Piece, *, now_s: float) -> None:
        """Take in a piece; the statistics it has go on growing."""
        self.heard_s = now_s
        if self.first_s is None and piece.tokens:
            self.first_s = now_s
        self.tokens += len(piece.tokens)
        if piece.finish is not None:
            self.finish = piece.finish
        if piece.statistics is not None:
            self.statistics = piece.statistics
            reason = piece.statistics.draft_length_reason
            self.reasons[reason] = self.reasons.get(reason, 0) + 1

    def fail(self, error: BaseException) -> None:
        """Take in what ended the answer early."""
        if isinstance(error, GeneratorExit | asyncio.CancelledError):
            return
        self.error = error
        self.finish = error.grpc.lower() if isinstance(error, CascadeError) else "internal"

    @property
    def rule(self) -> str:
        """Return the rule's name."""
        return self.request.policy.rule.kind

    @property
    def drafts(self) -> int:
        """Return the number of blocks that had tokens."""
        return sum(self.statistics.accepted_lengths)

    def accepted_at(self) -> list[int]:
        """Return for each place in a block how many blocks' token there was accepted."""
        counts = self.statistics.accepted_lengths
        return [sum(counts[place + 1 :]) for place in range(len(counts) - 1)]
