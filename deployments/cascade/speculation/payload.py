"""What the drafter must send with a block so that the expert can judge it exactly."""

from __future__ import annotations

from dataclasses import dataclass

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
from cascade.sampling.sparse_probs import Cut
from cascade.types import Bonus, Coupling, DecodingParams, RowFormat, Verification

# The probability of the drafter's unlikeliest tokens that are cut: the total variation by which the
# law of a token may depart from the rule's.
MAX_LOST = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class PayloadSpec:
    """What a block carries besides its tokens and their likelihoods."""

    probs: bool  # the drafter's q at every position
    unscaled_probs: bool  # `probs` carry q0 beside q
    draft_stats: bool
    entropy: bool  # of the draft statistics; 0 if nobody reads it
    unscaled: bool  # q0 of the drafted tokens


def payload_spec(policy: DecodingParams) -> PayloadSpec:
    """Return what the policy's rule, coupling, bonus and verification read of the drafter."""
    rule, probs = policy.rule, _sends_probs(policy)
    return PayloadSpec(
        probs=probs,
        unscaled_probs=probs and isinstance(rule, TokenV1),
        draft_stats=isinstance(rule, Chow | Diff | Opt | ChowLog | DiffLog | OptLog | Bild),
        entropy=isinstance(rule, ChowLog | DiffLog | OptLog),
        unscaled=isinstance(rule, TokenV1),
    )


def draft_cut(policy: DecodingParams) -> Cut:
    """Return how the drafter's q is cut, in every mode and whether or not it is sent.

    What is committed under the lossless rule does not depend on q, so a small q is exact.
    """
    if policy.rows is RowFormat.FULL:
        return Cut()
    if policy.rows is RowFormat.SPARSE or isinstance(policy.rule, Lossless):
        return Cut(entries=policy.row_entries)
    return Cut(lost=MAX_LOST)


def is_gumbel(policy: DecodingParams) -> bool:
    """Whether the emitted token is argmax(log pi + g); at temperature 0 there is no noise g."""
    return policy.coupling is Coupling.GUMBEL and not policy.sampling.greedy


def is_blockwise(policy: DecodingParams) -> bool:
    """Whether blocks are verified as a whole, which only the maximal coupling can do."""
    return policy.verification is Verification.BLOCK and not is_gumbel(policy)


def sends_ids_only(policy: DecodingParams) -> bool:
    """Whether the rule runs on token ids: each draft is judged as a one-hot q.

    If pi is linear in q and the decisions do not read q, judging one-hot drafts gives pi on average
    over the drafts. The probability of rejection is sum r q (1 - p), which is no less than with
    probabilities; so an explicit format sends them, except under rules that the drafter decides,
    whose drafts no mode has verified.
    """
    by_token = isinstance(policy.rule, TokenV1 | TokenV2 | TokenV3 | Typical)
    by_ids = isinstance(policy.rule, Chow | ChowLog) or (by_token and policy.rows is RowFormat.AUTO)
    return (
        by_ids
        and policy.divergence_budget is None
        and policy.bonus is not Bonus.TARGET
        and not is_gumbel(policy)
        and not is_blockwise(policy)
    )


def needs_probs_after_block(policy: DecodingParams) -> bool:
    """Whether the bonus token reads the drafter's probabilities at the position after the block.

    Lossless does not: its pi is p.
    """
    return policy.bonus is Bonus.TARGET and not isinstance(policy.rule, Lossless)


def _sends_probs(policy: DecodingParams) -> bool:
    if needs_probs_after_block(policy):
        return True
    if policy.sampling.greedy or sends_ids_only(policy):
        return False  # a greedy draft is a one-hot at its token
    if policy.divergence_budget is not None and not isinstance(policy.rule, Lossless):
        return True
    # Under shared noise a kept draft is argmax(log q + g) already, and a deferred token depends on
    # p alone.
    ids_do = isinstance(policy.rule, Lossless | Chow | ChowLog | Diff | DiffLog | Bild)
    return not (is_gumbel(policy) and ids_do)
