"""The messages between router and replicas as dataclasses; `codec` turns them into protobuf.

Every message names its session and epoch; the epoch grows when a session moves to another replica.
`position` counts the committed tokens after the prompt. `digest` is the `extend_digest` of the
prompt and the committed tokens up to the position.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from xxhash import xxh3_64_intdigest

from cascade.speculation.cost_model import Timing
from cascade.types import Block, Session, SessionId, TokenLogprob, Verdict

if TYPE_CHECKING:
    from collections.abc import Iterable


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Start or resume a session on this replica; `lease` is the token of the router's lease.

    If its first `message_follows` at once, the prefill waits for it, and both run in one pass.
    """

    session: Session
    epoch: int
    lease: str
    traceparent: str = ""  # W3C trace context; empty if the request is not traced
    caller: str = ""  # whose prompts share a pass with those of others
    weight: int = 1  # of the caller
    message_follows: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Propose:
    """Draft up to `count` tokens after `position`; `tokens` are the last committed before it.

    While the expert verifies the block, draft `ahead` more blocks and send them without being
    asked, each assuming that the ones before it are accepted and which token the expert adds. A
    block that was sent already is not sent again: this message then confirms its assumption. Draft
    up to `branches` more blocks for other likely verdicts, as far as the drafter is idle. End a
    block early where the drafter gives the whole of it a probability below `floor`. Tokens that the
    session's masks leave no choice of do not count: they lengthen a block up to `DRAFT_LIMIT`.
    """

    session_id: SessionId
    epoch: int
    position: int
    digest: int
    count: int
    tokens: tuple[int, ...] = ()
    until_deferral: bool = False  # stop before the first token that a drafter-only rule defers
    ahead: int = 0
    floor: float = 0.0
    branches: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Judge a block at `position`; then generate `ahead` more tokens, one `Judgement` each.

    `divergence_left` is what the answer may still diverge, if its policy has a budget.
    """

    session_id: SessionId
    epoch: int
    position: int
    digest: int
    block: Block = field(default_factory=Block)
    tokens: tuple[int, ...] = ()
    ahead: int = 0
    divergence_left: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Score:
    """Return the log-probability of all `tokens` but the first, with `top` alternatives each."""

    session_id: SessionId
    epoch: int
    lease: str
    tokens: tuple[int, ...]
    top: int
    caller: str = ""  # as in `Open`
    weight: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Free the session."""

    session_id: SessionId
    epoch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposal:
    """The block drafted after the prefix with this position and digest.

    `deferred`: the block ends where the drafter's own rule defers the next token. `branched`: it
    was drafted for another verdict than the likeliest one. `lost_mass`: the probability of tokens
    that the expert has not, summed over the block.
    """

    session_id: SessionId
    epoch: int
    position: int
    digest: int
    block: Block
    deferred: bool = False
    passes: int = 0
    cached_prompt_tokens: int = 0
    timing: Timing = field(default_factory=Timing)
    branched: bool = False
    lost_mass: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Judgement:
    """The verdict on the block after the prefix with this position and digest."""

    session_id: SessionId
    epoch: int
    position: int
    digest: int
    verdict: Verdict
    cached_prompt_tokens: int = 0
    timing: Timing = field(default_factory=Timing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The reply to `Score`."""

    session_id: SessionId
    epoch: int
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """The replica lacks the committed tokens from `position` on; send the message with them."""

    session_id: SessionId
    epoch: int
    position: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """This session cannot continue on this replica; `code` is the name of a gRPC status."""

    session_id: SessionId
    epoch: int
    code: str
    reason: str
    message: str


ToDrafter: TypeAlias = Open | Propose | Close

ToExpert: TypeAlias = Open | Judge | Score | Close

FromDrafter: TypeAlias = Proposal | Need | Refusal

FromExpert: TypeAlias = Judgement | Scores | Need | Refusal


def extend_digest(digest: int, tokens: Iterable[int]) -> int:
    """Return the 64-bit digest of a token sequence extended by `tokens`; the empty one has 0.

    Two processes with the same digest at the same position have the same tokens, except with
    probability 2**-64. The digest detects mistakes, not attacks: leases do that. How the tokens are
    split into calls does not matter:
    `extend_digest(extend_digest(0, (1, 2)), (3,)) == extend_digest(0, (1, 2, 3))`.
    """
    for token in tokens:
        digest = xxh3_64_intdigest(token.to_bytes(4, "little"), digest)
    return digest
