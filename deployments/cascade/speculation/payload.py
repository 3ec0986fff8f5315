"""What the drafter must send with a block so that the expert can judge it exactly."""

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
    """At which drafted positions the drafter's probabilities are sent."""

    NONE = auto()
    DEFERRED = auto()  # where the drafter's own rule defers; `sparse_probs.ABSENT` elsewhere
    ALL = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadSpec:
    """What a block carries besides its tokens and their likelihoods."""

    probs: ProbsPayload
    unscaled_probs: bool  # `probs` carry q0 beside q
    draft_stats: bool
    entropy: bool  # of the draft statistics; 0 if nobody reads it
    unscaled: bool  # q0 of the drafted tokens


def payload_spec(policy: DecodingParams) -> PayloadSpec:
    """Return what the policy's rule, coupling, bonus and verification read of the drafter."""
    rule, probs = policy.rule, _probs_payload(policy)
    return PayloadSpec(
        probs=probs,
        unscaled_probs=probs is not ProbsPayload.NONE and isinstance(rule, TokenV1),
        draft_stats=isinstance(rule, Chow | Diff | Opt | ChowLog | DiffLog | OptLog | Bild),
        entropy=isinstance(rule, ChowLog | DiffLog | OptLog),
        unscaled=isinstance(rule, TokenV1),
    )


def is_gumbel(policy: DecodingParams) -> bool:
    """Whether the emitted token is argmax(log pi + g); at temperature 0 there is no noise g."""
    return policy.coupling is Coupling.GUMBEL and not policy.sampling.greedy


def is_blockwise(policy: DecodingParams) -> bool:
    """Whether blocks are verified as a whole, which only the maximal coupling can do."""
    return policy.verification is Verification.BLOCK and not is_gumbel(policy)


def sends_ids_only(policy: DecodingParams) -> bool:
    """Whether a token rule runs on token ids: each draft is judged as a one-hot q.

    A token rule's pi is linear in q and its decisions do not read q, so judging one-hot drafts
    gives pi on average over the drafts. The probability of rejection is sum r q (1 - p), which is
    no less than with probabilities.
    """
    return (
        isinstance(policy.rule, TokenV1 | TokenV2 | TokenV3 | Typical)
        and policy.rows is RowFormat.AUTO
        and policy.bonus is not Bonus.TARGET
        and not is_gumbel(policy)
        and not is_blockwise(policy)
    )


def needs_probs_after_block(policy: DecodingParams) -> bool:
    """Whether the bonus token reads the drafter's probabilities at the position after the block.

    Lossless does not: its pi is p.
    """
    return policy.bonus is Bonus.TARGET and not isinstance(policy.rule, Lossless)


def _probs_payload(policy: DecodingParams) -> ProbsPayload:
    if policy.sampling.greedy:
        # A greedy draft is a one-hot at its token; after the block there is no token to tell it.
        return ProbsPayload.ALL if needs_probs_after_block(policy) else ProbsPayload.NONE
    if sends_ids_only(policy) or (is_gumbel(policy) and isinstance(policy.rule, Lossless)):
        return ProbsPayload.NONE
    if policy.rows is not RowFormat.AUTO or is_blockwise(policy) or needs_probs_after_block(policy):
        return ProbsPayload.ALL
    if is_gumbel(policy) and isinstance(policy.rule, Chow | ChowLog | Diff | DiffLog | Bild):
        # A kept draft is argmax(log q + g) already, and a deferred one depends on p alone.
        return ProbsPayload.NONE
    decides = isinstance(policy.rule, Chow | ChowLog) and not is_gumbel(policy)
    return ProbsPayload.DEFERRED if decides else ProbsPayload.ALL
