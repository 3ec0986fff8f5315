"""What a session asks of the engine's next forward pass, and what is done with the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.types import SessionId


@dataclass(slots=True, kw_only=True)
class ForwardRequest:
    """One session's wish: keep `base` tokens, append `tokens`, return logits of the last `rows`.

    The engine remembers the tokens of every session, so an evicted cache is filled again unseen.
    A step whose uncached tokens exceed the step budget runs in chunks. `rows` 0 only fills the
    cache.

    A session whose first step names a `trunk` is a branch of that session: it begins with a copy of
    the trunk's first `base` tokens and their rows. It takes no room from others and loses its own
    to any of them; without room its step fails. It counts as no session, and ends with its trunk.
    """

    session: SessionId
    base: int
    tokens: Sequence[int]
    num_logits: int
    task: Any = None  # the head's own
    parent: SessionId | None = None  # read in the first step of a branch
    submitted_s: float | None = None  # the engine's: when, until its first pass


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOutput:
    """Rows `first .. first + count` of the step's logits; `index` is the first row's token's place.

    `last` is false only for a chunk of a step that wants more rows than one pass holds.
    """

    request: ForwardRequest
    first: int
    count: int
    position: int
    last: bool = True


class LogitsHandler(Protocol):
    """What becomes of logits. Called on the engine's thread, once a forward pass."""

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Consume the rows of every ready step and return the steps that follow at once."""
        ...

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Hear that a step cannot run."""
        ...
