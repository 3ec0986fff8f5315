from __future__ import annotations

from typing import Any

import pytest

from cascade.api.text_drafts import check_text_drafts
from cascade.errors import InvalidRequest
from cascade.rules import Chow, Lossless, TokenV3
from cascade.types import (
    Bonus,
    DecodingParams,
    ExpertLoss,
    Mode,
    Phase,
    PhaseRules,
    Request,
    SamplingParams,
)

KEEPS: Any = {"rule": TokenV3(alpha=0.5)}


def check(policy: dict[str, Any] | None = None, **more: Any) -> None:
    check_text_drafts(Request(prompt=(1,), policy=DecodingParams(**(policy or {})), **more))


@pytest.mark.parametrize(
    ("policy", "more"),
    [
        ({}, {}),
        (KEEPS, {}),
        ({"rule": Lossless(), "bonus": Bonus.TARGET}, {}),
        ({"sampling": SamplingParams(logit_bias=((3, 1.0),), presence_penalty=1.0)}, {}),
        ({"rule": Chow(alpha=0.5)}, {"mode": Mode.EXPERT_ONLY}),
    ],
)
def test_what_needs_no_probabilities_is_served(policy: Any, more: Any) -> None:
    check(policy, **more)


@pytest.mark.parametrize(
    ("param", "policy", "more"),
    [
        ("cascade.mode", {}, {"mode": Mode.DRAFTER_ONLY}),
        ("cascade.mode", {}, {"mode": Mode.SEQUENCE_CASCADE}),
        ("cascade.mode", {"rule": Chow(alpha=0.5)}, {"mode": Mode.TOKEN_CASCADE}),
        ("cascade.on_expert_loss", {}, {"on_expert_loss": ExpertLoss.DRAFTER}),
        ("cascade.rule", {"rule": Chow(alpha=0.5)}, {}),
        ("cascade.rule", {"phases": PhaseRules(rules=((Phase.ANSWER, Chow(alpha=0.5)),))}, {}),
        ("cascade.bonus", KEEPS | {"bonus": Bonus.TARGET}, {}),
        ("logit_bias", KEEPS | {"sampling": SamplingParams(logit_bias=((3, -100.0),))}, {}),
        ("cascade.rule", KEEPS | {"sampling": SamplingParams(presence_penalty=1.0)}, {}),
    ],
)
def test_what_needs_them_is_refused_with_the_reason(param: str, policy: Any, more: Any) -> None:
    with pytest.raises(InvalidRequest, match="few tokens in common") as refused:
        check(policy, **more)

    assert refused.value.param == param
