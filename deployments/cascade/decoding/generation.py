"""A request that cannot be wrong, and what comes back for it: the seam between doors and router."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

from cascade.decoding.session import Mode, Origin, Policy, TokenLogprob

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Sequence


class FinishReason(StrEnum):
    """Why an answer ended, in OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"


class ExpertLoss(StrEnum):
    """What becomes of an answer that no expert is left for."""

    FAIL = "fail"
    DRAFTER = "drafter"  # the drafter ends it, and the statistics say so


class Confidence(StrEnum):
    """What a sequence cascade reads of the drafter's token log-probabilities."""

    MEAN = "mean"
    MINIMUM = "minimum"
    QUANTILE = "quantile"  # the lowest decile


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """When a sequence cascade keeps the drafter's answer: confidence (nats) >= threshold."""

    confidence: Confidence = Confidence.MEAN
    threshold: float = -0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One answer to generate. Built by `ingress.translate`, which has refused all that is wrong."""

    prompt: tuple[int, ...]  # at least one token; prompt + max_tokens fits the context
    policy: Policy
    mode: Mode = Mode.CASCADE
    max_tokens: int = 16
    draft_tokens: int | None = None  # None lets the server choose
    patience: Patience = field(default_factory=Patience)
    prediction: tuple[int, ...] = ()  # a draft the client supplies for the start of the answer
    deadline_s: float | None = None
    on_expert_loss: ExpertLoss = ExpertLoss.FAIL
    trace: bool = False  # report every round
    name: str = ""  # what the client calls it, for logs


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One block and its verdict, for the trace."""

    position: int
    drafted: int
    accepted: int
    deferred: int
    tokens: int
    draft_ms: float
    judge_ms: float


@dataclass(slots=True, kw_only=True)
class Statistics:
    """What an answer cost and who wrote it; grows round by round."""

    rounds: int = 0
    drafted: int = 0
    accepted: int = 0  # drafted tokens that were committed
    judged: int = 0
    deferred: int = 0
    drafter_tokens: int = 0  # committed tokens by origin
    kept_tokens: int = 0
    expert_tokens: int = 0
    drafter_passes: int = 0
    expert_passes: int = 0
    predicted_accepted: int = 0  # tokens of the client's prediction that stood, or fell
    predicted_rejected: int = 0
    branched_rounds: int = 0  # whose block was drafted in advance beside the likeliest guess
    cached_prompt_tokens: int = 0
    drafter_s: float = 0.0  # seconds the router waited for each tier
    expert_s: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0
    failovers: int = 0
    expert_losses: int = 0  # 1: no expert was left, and the drafter ended the answer
    failover_causes: dict[str, int] = field(default_factory=dict)  # "drafter late": 2
    accepted_lengths: list[int] = field(
        default_factory=list
    )  # histogram: index = accepted, value = rounds
    draft_length_reason: str = ""
    trace: list[Round] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Tokens committed by one round. The last piece of an answer has a finish reason."""

    tokens: tuple[int, ...]
    origins: tuple[Origin, ...]
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: FinishReason | None = None
    statistics: Statistics | None = None  # so far, and it grows: a door may end an answer early


class Generator(Protocol):
    """What a door calls. `router.Router` is one; closing the iterator early frees everything."""

    def generate(self, request: Request) -> AsyncGenerator[Piece]:
        """Yield the pieces of one answer; raises a CascadeError."""
        ...

    async def score(self, tokens: Sequence[int], *, top: int) -> tuple[TokenLogprob, ...]:
        """Return the expert's log-probability of each token but the first, given its past."""
        ...
