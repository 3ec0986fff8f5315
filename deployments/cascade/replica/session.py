"""A session as one replica holds it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from cascade.engine.request import ForwardRequest
from cascade.protocol.prefix_hash import extend

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.protocol.messages import Judge, Propose
    from cascade.protocol.server import Connection
    from cascade.types import Session, SessionId


@dataclass(slots=True, eq=False, kw_only=True)
class ReplicaSession:
    """The committed answer of a session, and what the engine was fed of it.

    The event loop owns a seat; the engine's thread reads it only while `busy`.
    """

    connection: Connection
    opened: Session
    epoch: int
    token: str  # of its lease
    key: SessionId  # the engine's name for it: no two seats share one
    answer: list[int]
    digest: int = field(init=False)
    fed: list[int] = field(init=False, default_factory=list[int])  # in the engine, drafts too
    agreed: int = 0  # fed[:agreed] == answer[:agreed]
    prompted: bool = field(init=False, default=False)  # the engine was fed the whole prompt
    busy: bool = False
    closed: bool = False
    queued: deque[Propose | Judge] = field(init=False, default_factory=deque)  # while busy
    serving: Propose | Judge | None = None  # the item that the step in flight is for
    asked_s: float = 0.0  # when the last item came

    def __post_init__(self) -> None:
        self.digest = extend(extend(0, self.opened.prompt), self.answer)

    @property
    def length(self) -> int:
        """Return the number of tokens of prompt and committed answer."""
        return len(self.opened.prompt) + len(self.answer)

    def repeats(self, item: Propose | Judge) -> bool:
        """Return whether the item asks again, impatiently, for what will be answered anyway."""
        last = self.queued[-1] if self.queued else self.serving
        return last is not None and (last.position, last.digest) == (item.position, item.digest)

    def commit(self, tokens: Sequence[int]) -> None:
        """Append committed tokens."""
        self.answer.extend(tokens)
        self.digest = extend(self.digest, tokens)

    def sync_tokens(self, *, position: int, tokens: Sequence[int], digest: int) -> int | None:
        """Make `tokens` the last committed before `position`.

        Returns None, or the position from which tokens are needed because these do not connect.
        """
        start = position - len(tokens)
        if start > len(self.answer):
            return len(self.answer)
        if start < len(self.answer):
            del self.answer[start:]
            self.agreed = min(self.agreed, start)
            self.digest = extend(extend(0, self.opened.prompt), self.answer)
        self.commit(tokens)
        return None if self.digest == digest else 0

    def step(self, draft: Sequence[int], *, rows: int, task: object) -> ForwardRequest:
        """Return the step that feeds answer and draft, with logits of the last `rows` tokens."""
        known = min(len(self.fed), len(self.answer))
        while self.agreed < known and self.fed[self.agreed] == self.answer[self.agreed]:
            self.agreed += 1
        # The last committed token runs again if need be: its row is the first that is wanted.
        keep = min(self.agreed, len(self.answer) - 1) if self.prompted else -1
        self.prompted = True
        fresh = (*self.answer[max(keep, 0) :], *draft)
        self.fed[max(keep, 0) :] = fresh
        tokens = fresh if keep >= 0 else (self.opened.prompt[-1], *fresh)
        return ForwardRequest(
            session=self.key,
            base=len(self.opened.prompt) + keep,
            tokens=tokens,
            num_logits=rows,
            task=task,
        )

    def prefill(self, task: object) -> ForwardRequest:
        """Return the step that feeds all but the last known token, without logits."""
        known = (*self.opened.prompt, *self.answer)[:-1]
        self.fed = list(self.answer[:-1])
        self.prompted = bool(self.answer)
        return ForwardRequest(session=self.key, base=0, tokens=known, num_logits=0, task=task)
