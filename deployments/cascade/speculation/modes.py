"""The policy that each mode really follows.

A tier samples from what the policy's rule makes it ship; where no expert judges, nothing is shipped
and nothing truncated, so a mode without judgement is a rule that never asks for one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import assert_never

from cascade.rules import Chow, ChowLog, Lossless
from cascade.types import Bonus, DecodingParams, Mode, RowFormat, Verification


def policy_in(mode: Mode, policy: DecodingParams) -> DecodingParams:
    """Return the policy with which sessions of this mode are opened.

    A sequence cascade drafts as `drafter_only` does; a refused draft is answered as `expert_only`.
    """
    match mode:
        case Mode.SPECULATIVE | Mode.CASCADE:
            if accepts_without_expert(mode, policy):
                return _alone(policy, bonus=Bonus.NONE, rule=policy.rule)
            return policy
        case Mode.EXPERT_ONLY:
            return _alone(policy, bonus=Bonus.EXPERT, rule=Lossless())
        case Mode.DRAFTER_ONLY | Mode.SEQUENCE_CASCADE:
            return _alone(policy, bonus=Bonus.NONE, rule=Chow(alpha=1))
        case Mode.TOKEN_CASCADE:
            return _alone(policy, bonus=Bonus.NONE, rule=policy.rule)
        case _:
            assert_never(mode)


def accepts_without_expert(mode: Mode, policy: DecodingParams) -> bool:
    """Return whether the drafter's tokens stand without the expert until its own rule defers.

    Where a rule that reads the drafter alone keeps, pi = q: what is drafted stands whatever the
    expert would say, so it is asked at deferrals only, where pi = p.
    """
    drafts = mode in {Mode.SPECULATIVE, Mode.CASCADE, Mode.TOKEN_CASCADE}
    return drafts and isinstance(policy.rule, Chow | ChowLog)


def _alone(policy: DecodingParams, **changes: object) -> DecodingParams:
    """Return the policy with nothing shipped and no block to verify."""
    return replace(policy, rows=RowFormat.AUTO, verification=Verification.TOKEN, **changes)
