"""What can be asked of a pair whose drafter drafts text (`drafter.vocabulary`, way `slem`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.errors import InvalidRequest
from cascade.rules import Lossless, TokenV3
from cascade.types import Bonus, ExpertLoss, Mode

if TYPE_CHECKING:
    from cascade.types import Request

_WHY = (
    "drafter and expert of this server have few tokens in common, so drafts are text, which has no"
    " probabilities in the expert's tokens (`drafter.vocabulary: slem`)"
)
_MODES = (Mode.CASCADE, Mode.SPECULATIVE, Mode.EXPERT_ONLY)


def check_text_drafts(request: Request) -> None:
    """Check that a request needs no probabilities of the drafter.

    Raises:
        InvalidRequest: It does; `param` names the field.
    """
    policy, mode = request.policy, request.mode
    if mode not in _MODES:
        raise InvalidRequest(
            f"`cascade.mode` is `{mode}`, but {_WHY}; use `cascade`, `speculative` or"
            " `expert_only`",
            param="cascade.mode",
        )
    if request.on_expert_loss is ExpertLoss.DRAFTER:
        raise InvalidRequest(
            f"`cascade.on_expert_loss` is `drafter`, but {_WHY}; use `fail`",
            param="cascade.on_expert_loss",
        )
    if mode is Mode.EXPERT_ONLY:
        return
    wrong = next((one for one in policy.rules if not isinstance(one, Lossless | TokenV3)), None)
    if wrong is not None:
        raise InvalidRequest(
            f"`cascade.rule` is `{wrong.kind}`, but {_WHY}; use `lossless` or `token_v3`",
            param="cascade.rule",
        )
    if all(isinstance(one, Lossless) for one in policy.rules):
        return
    if policy.bonus is Bonus.TARGET:
        raise InvalidRequest(
            f"`cascade.bonus` is `target` under rule `token_v3`, but {_WHY}; use `expert` or"
            " `none`",
            param="cascade.bonus",
        )
    sampling = policy.sampling
    if sampling.counts_tokens or sampling.logit_bias:
        raise InvalidRequest(
            "penalties and `logit_bias` need rule `lossless` here: they count in the expert's"
            f" tokens, and {_WHY}",
            param="logit_bias" if sampling.logit_bias else "cascade.rule",
        )
