"""The engine's interface: what a session asks for, and who receives the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from cascade.types import SessionId


class Share(NamedTuple):
    """Whose a request is: the prompts of callers share a pass by their weights."""

    caller: str = ""
    weight: int = 1


NOBODYS = Share()


@dataclass(slots=True, kw_only=True)
class ForwardRequest:
    """One session's request: keep `base` tokens, append `tokens`, return some logits.

    The engine remembers the tokens of every session and recomputes what was evicted. A request with
    more uncached tokens than the step budget runs in chunks.

    A session has one request at a time, but one that wants no logits only fills the cache: the next
    one takes over what is left of it, and the handler hears of that one alone.

    A session whose first request names a `parent` is a branch of that session. It starts with a
    copy of the parent's first `base` tokens and their keys and values. A branch takes cache space
    from no session and may lose its own to any; its request fails when there is no space. Branches
    do not count as sessions and end with their parent.

    A session of an encoder-decoder has a `source`, which its first request names; its tokens are
    those of the decoder.
    """

    session: SessionId
    base: int  # tokens of the session to keep; those after it are dropped
    tokens: Sequence[int]
    num_logits: int  # return the logits of the last so many tokens; 0 only fills the cache
    task: Any = None  # for the logits handler
    share: Share
    parent: SessionId | None = None  # read in the first request of a branch
    source: Sequence[int] = ()  # read in the first request of a session
    submitted_s: float | None = None  # set by the engine, until the first pass of the request


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsOutput:
    """Logits `first .. first + count` of a request; `position` is that of the first one's token.

    `last` is False only for a chunk of a request that wants more logits than one pass computes.
    """

    request: ForwardRequest
    first: int
    count: int
    position: int
    last: bool = True


class LogitsHandler(Protocol):
    """Consumes logits. Called on the engine's thread, once per forward pass."""

    def finish(
        self, outputs: Sequence[LogitsOutput], logits_NV: Tensor
    ) -> Sequence[ForwardRequest]:
        """Consume the logits `[N, V]` of all outputs, in order; return the requests that follow."""
        ...

    def fail(self, request: ForwardRequest, error: Exception) -> None:
        """Handle a request that cannot run."""
        ...
