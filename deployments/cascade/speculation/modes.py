"""What each mode means over the router's one loop: one `Plan`, chosen once per answer.

| mode | drafter | verifier | draft length |
|---|---|---|---|
| expert_only | none | always | 0 |
| drafter_only, sequence_cascade | required | never | a chunk |
| token_cascade | required | on deferral | a chunk |
| speculative, cascade | best effort | always | requested or adaptive |
| with a rule that reads q alone | best effort | on deferral | requested or a chunk |
| the same with a divergence budget | best effort | always | requested or adaptive |

Where no expert verifies, no distribution is sent, so such a mode runs with a rule that the drafter
alone decides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import StrEnum
from typing import assert_never

from cascade.rules import Chow, ChowLog, Lossless, Lossy, Rule
from cascade.types import Bonus, DecodingParams, Mode, Verification


class DraftSource(StrEnum):
    """How much an answer depends on a drafter."""

    NONE = "none"
    REQUIRED = "required"  # the answer waits for a drafter, and fails without one
    BEST_EFFORT = "best_effort"  # without a draft in time, the expert writes the next token alone


class VerifyWhen(StrEnum):
    """When the expert runs."""

    ALWAYS = "always"
    ON_DEFERRAL = "on_deferral"
    NEVER = "never"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one answer is generated. `length_reason` names a fixed draft length in metrics."""

    params: DecodingParams  # what sessions are opened with on both tiers
    drafter: DraftSource
    verify: VerifyWhen
    length_reason: str | None = None  # None: the requested length, or the adaptive one


RULES: dict[Mode, tuple[tuple[type[Rule], ...], Rule]] = {
    Mode.SPECULATIVE: ((Lossless, Lossy), Lossless()),
    Mode.TOKEN_CASCADE: ((Chow, ChowLog), Chow(alpha=0.5)),
    Mode.EXPERT_ONLY: ((), Lossless()),
    Mode.DRAFTER_ONLY: ((), Lossless()),
    Mode.SEQUENCE_CASCADE: ((), Lossless()),
}
"""The rules that a mode accepts and its default; `cascade` accepts all."""


def plan_for(mode: Mode, params: DecodingParams) -> Plan:
    """Return the plan of a mode for a request's decoding parameters.

    A sequence cascade first runs as `drafter_only`; if the draft is rejected, as `expert_only`.
    """
    match mode:
        case Mode.SPECULATIVE | Mode.CASCADE:
            decides_alone = _reads_drafter_alone(params.rule) and params.divergence_budget is None
            if params.has_phase_rules or not decides_alone:
                return Plan(
                    params=params, drafter=DraftSource.BEST_EFFORT, verify=VerifyWhen.ALWAYS
                )
            return Plan(
                params=_without_block(params, bonus=Bonus.NONE, rule=params.rule),
                drafter=DraftSource.BEST_EFFORT,
                verify=VerifyWhen.ON_DEFERRAL,
                length_reason="until deferral",
            )
        case Mode.EXPERT_ONLY:
            return Plan(
                params=_without_block(params, bonus=Bonus.EXPERT, rule=Lossless()),
                drafter=DraftSource.NONE,
                verify=VerifyWhen.ALWAYS,
                length_reason="expert_only",
            )
        case Mode.DRAFTER_ONLY | Mode.SEQUENCE_CASCADE:
            return Plan(
                params=_without_block(params, bonus=Bonus.NONE, rule=Chow(alpha=1)),
                drafter=DraftSource.REQUIRED,
                verify=VerifyWhen.NEVER,
                length_reason="no expert waits",
            )
        case Mode.TOKEN_CASCADE:
            return Plan(
                params=_without_block(params, bonus=Bonus.NONE, rule=params.rule),
                drafter=DraftSource.REQUIRED,
                verify=VerifyWhen.ON_DEFERRAL,
                length_reason="no expert waits",
            )
        case _:
            assert_never(mode)


def _reads_drafter_alone(rule: Rule) -> bool:
    """Return whether a rule decides from the drafter's distribution q alone.

    Where such a rule keeps the drafter, pi = q: the token is accepted whatever the expert would
    say. The expert is needed at deferrals only, where pi = p.
    """
    return isinstance(rule, Chow | ChowLog)


def _without_block(params: DecodingParams, **changes: object) -> DecodingParams:
    """Return parameters with no block to verify."""
    phases = params.phases and replace(params.phases, rules=())
    return replace(params, verification=Verification.TOKEN, phases=phases, **changes)
