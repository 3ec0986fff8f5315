"""The phases of an answer as a request means them: their rules, and the thinking budget."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.api.chat_format import CALLS, THOUGHTS, ChatFormat, chat_format
from cascade.api.schema import ChatBody, Generated, Options
from cascade.errors import InvalidRequest
from cascade.types import Bonus, Mode, Phase, PhaseRules, PhaseSwitch

if TYPE_CHECKING:
    from cascade.api.context import ServingContext
    from cascade.rules import Rule
    from cascade.types import Request

_REGIONS = {THOUGHTS: Phase.THINKING, CALLS: Phase.TOOL}


def phase_rules(
    body: Generated, service: ServingContext, request: Request, *, start: str | None = None
) -> PhaseRules | None:
    """Return the phases of an answer; None if no rule and no budget needs them.

    Args:
        body: The body.
        service: Has the tokenizer.
        request: The request without them.
        start: The field of the response template that the prompt ends in.

    Raises:
        InvalidRequest: The mode has no rules of phases, or the model no such phase.
    """
    rules, budget = _rules(body.cascade or Options()), _budget(body)
    if not rules and budget is None:
        return None
    if rules and request.mode is not Mode.CASCADE:
        raise InvalidRequest(
            f"`cascade.phases` needs mode `cascade`, and this request has `{request.mode}`; leave"
            " out one",
            param="cascade.phases",
        )
    if rules and request.policy.bonus is Bonus.TARGET:
        raise InvalidRequest(
            "`cascade.phases` needs bonus `expert` or `none`; with `target` the token after a block"
            " would need the drafter's probabilities under another rule",
            param="cascade.bonus",
        )
    form = chat_format(service.tokenizer)
    switches = () if form is None else _switches(form, service)
    known = {switch.phase for switch in switches} | {Phase.ANSWER}
    param = "cascade.phases." if budget is None else "thinking_token_budget"
    wanted = {phase for phase, _ in rules} | ({Phase.THINKING} if budget is not None else set())
    if missing := sorted(wanted - known):
        if param.endswith("."):
            param += missing[0]
        raise InvalidRequest(
            f"`{param}` cannot be used: how this model marks its `{missing[0]}` phase is not known;"
            " leave it out, or serve a tokenizer whose `response_template` says so",
            param=param,
        )
    return PhaseRules(
        start=_REGIONS.get(start or "", Phase.ANSWER),
        switches=switches,
        rules=rules,
        thinking_tokens=budget,
    )


def _rules(options: Options) -> tuple[tuple[Phase, Rule], ...]:
    phases = options.phases
    if phases is None:
        return ()
    named = {
        Phase.THINKING: phases.thinking,
        Phase.ANSWER: phases.answer,
        Phase.TOOL: phases.tool,
    }
    return tuple((phase, rule) for phase, rule in named.items() if rule is not None)


def _budget(body: Generated) -> int | None:
    if not isinstance(body, ChatBody):
        return None
    one, other = body.thinking_token_budget, body.thinking_budget
    if one is not None and other is not None and one != other:
        raise InvalidRequest(
            f"`thinking_token_budget` is {one} and `thinking_budget` is {other}; send one",
            param="thinking_budget",
        )
    return other if one is None else one


def _switches(form: ChatFormat, service: ServingContext) -> tuple[PhaseSwitch, ...]:
    """Return what begins and ends thoughts and calls, in tokens."""
    found: list[PhaseSwitch] = []
    for phase, markers in ((Phase.THINKING, form.think), (Phase.TOOL, form.call)):
        if markers is None:
            continue
        begin, end = (service.tokenizer.encode(text, add_special=False) for text in markers)
        found.append(PhaseSwitch(phase=Phase.ANSWER, tokens=begin, next=phase))
        found.append(PhaseSwitch(phase=phase, tokens=end, next=Phase.ANSWER))
    return tuple(found)
