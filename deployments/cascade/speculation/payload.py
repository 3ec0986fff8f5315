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
from cascade.types import Bonus, Coupling, Policy, RowFormat, Verification


class Rows(Enum):
    """Which drafted positions ship the drafter's row."""

    NONE = auto()
    DEFERRED = auto()  # those that the drafter's own rule defers; others are `rows.ABSENT`
    ALL = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What a block carries besides its tokens."""

    rows: Rows
    row_unscaled: bool  # rows carry q0 beside q
    gates: bool
    entropy: bool  # the gates' entropy is read; else it is 0
    likelihoods: bool  # q(x)
    unscaled: bool  # q0(x)
    fresh: bool  # judged by the form without rows


def needs(policy: Policy) -> Needs:
    """Return what the policy's rule, coupling, bonus and verification read of the drafter."""
    blind = not policy.sampling.greedy and is_gumbel(policy) and isinstance(policy.rule, Lossless)
    rows = _rows(policy)
    return Needs(
        rows=rows,
        row_unscaled=rows is not Rows.NONE and isinstance(policy.rule, TokenV1),
        gates=isinstance(policy.rule, Chow | Diff | Opt | ChowLog | DiffLog | OptLog | Bild),
        entropy=isinstance(policy.rule, ChowLog | DiffLog | OptLog),
        likelihoods=not policy.sampling.greedy and not blind,
        unscaled=isinstance(policy.rule, TokenV1),
        fresh=is_fresh(policy),
    )


def is_gumbel(policy: Policy) -> bool:
    """Whether the emitted token is argmax(log pi + g); at temperature 0 there is no noise."""
    return policy.coupling is Coupling.GUMBEL and not policy.sampling.greedy


def is_blockwise(policy: Policy) -> bool:
    """Whether the longest prefix of the block stands; only the maximal coupling can."""
    return policy.verification is Verification.BLOCK and not is_gumbel(policy)


def is_fresh(policy: Policy) -> bool:
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


def wants_target(policy: Policy) -> bool:
    """Whether the bonus needs the drafter's row after the block; lossless pi is p anyway."""
    return policy.bonus is Bonus.TARGET and not isinstance(policy.rule, Lossless)


def _rows(policy: Policy) -> Rows:
    """Return which rows cross the wire."""
    if policy.sampling.greedy:
        # A greedy row is its token; only the one after the block has none to speak for it.
        return Rows.ALL if wants_target(policy) else Rows.NONE
    if is_fresh(policy) or (is_gumbel(policy) and isinstance(policy.rule, Lossless)):
        return Rows.NONE
    if policy.rows is not RowFormat.AUTO or is_blockwise(policy) or wants_target(policy):
        return Rows.ALL
    if is_gumbel(policy) and isinstance(policy.rule, Chow | ChowLog | Diff | DiffLog | Bild):
        # Kept, a draft is argmax(log q + g) already; deferred, only p matters.
        return Rows.NONE
    decided = isinstance(policy.rule, Chow | ChowLog) and not is_gumbel(policy)
    return Rows.DEFERRED if decided else Rows.ALL
