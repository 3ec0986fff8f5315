"""What the expert must be told of a draft to judge it exactly."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from cascade.rules import (
    Bild,
    Chow,
    ChowLog,
    Diff,
    DiffLog,
    Lossless,
    Opt,
    OptLog,
    TokenV1,
    TokenV2,
    TokenV3,
    Typical,
)
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, Verification


class ProbsPayload(Enum):
    """Which drafted positions ship the drafter's row."""

    NONE = auto()
    DEFERRED = auto()  # those that the drafter's own rule defers; others are `rows.ABSENT`
    ALL = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadSpec:
    """What a block carries besides its tokens."""

    rows: ProbsPayload
    row_unscaled: bool  # rows carry q0 beside q
    draft_stats: bool
    entropy: bool  # the gates' entropy is read; else it is 0
    likelihoods: bool  # q(x)
    unscaled: bool  # q0(x)
    ids_only: bool  # judged by the form without rows


def payload_spec(policy: DecodingParams) -> PayloadSpec:
    """Return what the policy's rule, coupling, bonus and verification read of the drafter."""
    blind = not policy.sampling.greedy and is_gumbel(policy) and isinstance(policy.rule, Lossless)
    rows = _rows(policy)
    return PayloadSpec(
        rows=rows,
        row_unscaled=rows is not ProbsPayload.NONE and isinstance(policy.rule, TokenV1),
        draft_stats=isinstance(policy.rule, Chow | Diff | Opt | ChowLog | DiffLog | OptLog | Bild),
        entropy=isinstance(policy.rule, ChowLog | DiffLog | OptLog),
        likelihoods=not policy.sampling.greedy and not blind,
        unscaled=isinstance(policy.rule, TokenV1),
        ids_only=sends_ids_only(policy),
    )


def is_gumbel(policy: DecodingParams) -> bool:
    """Whether the emitted token is argmax(log pi + g); at temperature 0 there is no noise."""
    return policy.coupling is Coupling.GUMBEL and not policy.sampling.greedy


def is_blockwise(policy: DecodingParams) -> bool:
    """Whether the longest prefix of the block stands; only the maximal coupling can."""
    return policy.verification is Verification.BLOCK and not is_gumbel(policy)


def sends_ids_only(policy: DecodingParams) -> bool:
    """Whether a token rule runs on token ids: each draft is judged as a one-hot q.

    A token rule's pi is linear in q while its decisions do not read q, so the law of judging
    one-hots, averaged over the drafts, is pi. It refuses sum r q (1 - p), no less than with rows.
    """
    return (
        isinstance(policy.rule, TokenV1 | TokenV2 | TokenV3 | Typical)
        and policy.rows is RowFormat.AUTO
        and policy.bonus is not Bonus.TARGET
        and not is_gumbel(policy)
        and not is_blockwise(policy)
    )


def wants_target(policy: DecodingParams) -> bool:
    """Whether the bonus needs the drafter's row after the block; lossless pi is p anyway."""
    return policy.bonus is Bonus.TARGET and not isinstance(policy.rule, Lossless)


def _rows(policy: DecodingParams) -> ProbsPayload:
    """Return which rows cross the wire."""
    if policy.sampling.greedy:
        # A greedy row is its token; only the one after the block has none to speak for it.
        return ProbsPayload.ALL if wants_target(policy) else ProbsPayload.NONE
    if sends_ids_only(policy) or (is_gumbel(policy) and isinstance(policy.rule, Lossless)):
        return ProbsPayload.NONE
    if policy.rows is not RowFormat.AUTO or is_blockwise(policy) or wants_target(policy):
        return ProbsPayload.ALL
    if is_gumbel(policy) and isinstance(policy.rule, Chow | ChowLog | Diff | DiffLog | Bild):
        # Kept, a draft is argmax(log q + g) already; deferred, only p matters.
        return ProbsPayload.NONE
    decided = isinstance(policy.rule, Chow | ChowLog) and not is_gumbel(policy)
    return ProbsPayload.DEFERRED if decided else ProbsPayload.ALL
