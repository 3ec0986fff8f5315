"""Defaults, limits and combinations: from a body to requests that cannot be wrong."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cascade.api import build_request
from cascade.api.context import MAX_SEED, Defaults, Limits
from cascade.api.schema import ChatBody, CompletionBody
from cascade.errors import ContextTooLong, InvalidRequest, ModelNotFound
from cascade.rules import Chow, Lossless, Lossy, TokenV3
from cascade.types import (
    Bonus,
    Confidence,
    Coupling,
    Mode,
    RowFormat,
    SamplingParams,
    SequenceCascadeParams,
    Verification,
)

if TYPE_CHECKING:
    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext
    from cascade.types import Request


DEEP = "[" * 100_000


def complete(service: ServingContext, **fields: Any) -> CompletionCall:
    return build_request.completion(
        CompletionBody.model_validate({"prompt": "Buzz"} | fields), service
    )


def request(service: ServingContext, **fields: Any) -> Request:
    return complete(service, **fields).requests[0]


def chat(service: ServingContext, **fields: Any) -> CompletionCall:
    turns = [{"role": "user", "content": "Buzz"}]
    return build_request.chat(ChatBody.model_validate({"messages": turns} | fields), service)


def refused(service: ServingContext, **fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        complete(service, **fields)
    return caught.value.param


def test_a_body_that_says_nothing_gets_the_defaults(service: ServingContext) -> None:
    defaults = Defaults(
        mode=Mode.CASCADE,
        rule=TokenV3(alpha=0.8),
        draft_tokens=4,
        coupling=Coupling.GUMBEL,
        bonus=Bonus.TARGET,
        rows=RowFormat.FULL,
        row_entries=9,
        patience=SequenceCascadeParams(threshold=-2.0),
        temperature=0.5,
        top_p=0.9,
        top_k=11,
        deadline_s=3.0,
    )
    got = request(replace(service, defaults=defaults))
    assert got.policy.sampling == SamplingParams(temperature=0.5, top_p=0.9, top_k=11)
    assert (got.policy.rule, got.policy.coupling) == (TokenV3(alpha=0.8), Coupling.GUMBEL)
    assert (got.policy.bonus, got.policy.rows, got.policy.row_entries) == ("target", "full", 9)
    assert (got.mode, got.draft_tokens, got.max_tokens, got.deadline_s) == ("cascade", 4, 16, 3.0)
    assert got.patience == SequenceCascadeParams(threshold=-2.0)
    assert (got.policy.logprobs, got.trace, got.prediction) == (None, False, ())


def test_a_body_that_says_everything_is_heard(service: ServingContext) -> None:
    got = request(
        service,
        temperature=0.3,
        top_p=0.7,
        top_k=5,
        min_p=0.1,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        repetition_penalty=1.5,
        logit_bias={7: -3.0, 3: 2.0},
        seed=5,
        logprobs=2,
        cascade={
            "mode": "cascade",
            "rule": {"kind": "chow", "alpha": 0.25},
            "draft_tokens": 3,
            "coupling": "maximal",
            "bonus": "none",
            "verification": "block",
            "rows": "sparse",
            "patience": {"confidence": "minimum", "threshold": -1.5},
            "trace": True,
        },
    )
    assert got.policy.sampling == SamplingParams(
        temperature=0.3,
        top_k=5,
        top_p=0.7,
        min_p=0.1,
        repetition_penalty=1.5,
        presence_penalty=1.0,
        frequency_penalty=-1.0,
        logit_bias=((3, 2.0), (7, -3.0)),
    )
    policy = got.policy
    assert (policy.rule, policy.coupling, policy.bonus) == (Chow(alpha=0.25), "maximal", "none")
    assert (policy.verification, policy.rows) == (Verification.BLOCK, RowFormat.SPARSE)
    assert (policy.seed, policy.logprobs) == (5, 2)
    assert got.patience == SequenceCascadeParams(confidence=Confidence.MINIMUM, threshold=-1.5)
    assert (got.draft_tokens, got.trace) == (3, True)


def test_seeds_count_up_over_the_choices_of_each_prompt(service: ServingContext) -> None:
    """So a prompt in a batch gets the text that it gets alone."""
    call = complete(service, prompt=["a", "b"], n=3, seed=7)
    assert [one.policy.seed for one in call.requests] == [7, 8, 9, 7, 8, 9]
    assert [len(set(call.requests[at : at + 3])) for at in (0, 3)] == [3, 3]


def test_seeds_of_all_sizes_fit(service: ServingContext) -> None:
    assert request(service, seed=-1).policy.seed == MAX_SEED - 1
    assert [one.policy.seed for one in complete(service, seed=MAX_SEED - 1, n=2).requests] == [
        MAX_SEED - 1,
        0,
    ]


def test_a_seed_brings_the_coupling_that_makes_it_mean_something(service: ServingContext) -> None:
    assert request(service, seed=7).policy.coupling is Coupling.GUMBEL
    assert request(service).policy.coupling is Coupling.MAXIMAL
    asked = {"coupling": "maximal"}
    assert request(service, seed=7, cascade=asked).policy.coupling is Coupling.MAXIMAL


def test_without_a_seed_each_call_draws_its_own(service: ServingContext) -> None:
    assert request(service).policy.seed != request(service).policy.seed


def test_gumbel_has_no_block_verification(service: ServingContext) -> None:
    """Asked for together they are refused; a default gives way."""
    asked = {"verification": "block"}
    assert refused(service, seed=7, cascade=asked) == "cascade.verification"
    block = replace(service, defaults=Defaults(verification=Verification.BLOCK))
    assert request(block, seed=7).policy.verification is Verification.TOKEN
    assert request(block).policy.verification is Verification.BLOCK


@pytest.mark.parametrize(
    ("mode", "default", "rule"),
    [
        ("cascade", TokenV3(alpha=0.8), TokenV3(alpha=0.8)),
        ("speculative", TokenV3(alpha=0.8), Lossless()),
        ("speculative", Lossy(alpha=0.2), Lossy(alpha=0.2)),
        ("token_cascade", TokenV3(alpha=0.8), Chow(alpha=0.5)),
        ("token_cascade", Chow(alpha=0.3), Chow(alpha=0.3)),
        ("expert_only", TokenV3(alpha=0.8), Lossless()),
        ("drafter_only", TokenV3(alpha=0.8), Lossless()),
        ("sequence_cascade", TokenV3(alpha=0.8), Lossless()),
    ],
)
def test_a_mode_takes_the_default_rule_where_it_can(
    service: ServingContext, mode: str, default: Any, rule: Any
) -> None:
    got = request(replace(service, defaults=Defaults(rule=default)), cascade={"mode": mode})
    assert (got.mode, got.policy.rule) == (mode, rule)


@pytest.mark.parametrize(
    "mode", ["speculative", "token_cascade", "expert_only", "drafter_only", "sequence_cascade"]
)
def test_a_rule_that_a_mode_cannot_use_is_refused(service: ServingContext, mode: str) -> None:
    asked = {"mode": mode, "rule": {"kind": "token_v3", "alpha": 0.5}}
    assert refused(service, cascade=asked) == "cascade.rule"


def test_a_rule_alone_means_a_cascade(service: ServingContext) -> None:
    alone = replace(service, defaults=Defaults(mode=Mode.EXPERT_ONLY))
    assert request(alone).mode is Mode.EXPERT_ONLY
    assert request(alone, cascade={"rule": {"kind": "lossless"}}).mode is Mode.CASCADE


def test_draft_lengths_are_bounded_and_auto_is_the_routers(service: ServingContext) -> None:
    fixed = replace(service, defaults=Defaults(draft_tokens=5))
    assert request(fixed).draft_tokens == 5
    assert request(fixed, cascade={"draft_tokens": "auto"}).draft_tokens is None
    assert request(fixed, cascade={"draft_tokens": 0}).draft_tokens == 0
    assert refused(fixed, cascade={"draft_tokens": 33}) == "cascade.draft_tokens"


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 9e-6])
def test_the_coldest_temperatures_are_greedy(service: ServingContext, temperature: float) -> None:
    assert request(service, temperature=temperature).policy.sampling.greedy


def test_no_mass_at_all_still_leaves_the_likeliest_token(service: ServingContext) -> None:
    sampling = request(service, top_p=0, top_k=40).policy.sampling
    assert (sampling.top_k, sampling.top_p) == (1, 1.0)
    assert request(service, top_k=-1).policy.sampling.top_k == 0


def test_ends_of_text_stop_unless_they_are_to_be_ignored(service: ServingContext) -> None:
    (end,) = service.tokenizer.stop_ids
    more = replace(service, stop_ids=(2,))
    assert request(more).policy.stop_ids == (end, 2)
    assert request(more, stop_token_ids=[9, end]).policy.stop_ids == (end, 2, 9)
    assert request(more, ignore_eos=True, stop_token_ids=[9]).policy.stop_ids == (9,)


def test_prompts_come_as_text_or_tokens_alone_or_many(service: ServingContext) -> None:
    one, two = service.tokenizer.encode("Buzz"), service.tokenizer.encode("Moon")
    assert complete(service, prompt="Buzz").prompts == (one,)
    assert complete(service, prompt=["Buzz", "Moon"]).prompts == (one, two)
    assert complete(service, prompt=list(one)).prompts == (one,)
    assert complete(service, prompt=[list(one), list(two)]).prompts == (one, two)


@pytest.mark.parametrize("prompt", [[10**6], [[1], [330]], [2**32 - 1]])
def test_tokens_outside_the_vocabulary_are_refused(service: ServingContext, prompt: Any) -> None:
    assert refused(service, prompt=prompt) == "prompt"


@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias"])
def test_so_are_they_elsewhere(service: ServingContext, name: str) -> None:
    value: Any = {10**6: 1.0} if name == "logit_bias" else [10**6]
    assert refused(service, **{name: value}) == name
    negative: Any = {-1: 1.0}
    assert refused(service, logit_bias=negative) == "logit_bias"


@pytest.mark.parametrize(
    ("fields", "limits", "param"),
    [
        ({"n": 3}, Limits(choices=2), "n"),
        ({"prompt": ["a", "b", "c"]}, Limits(prompts=2), "prompt"),
        ({"prompt": ["a", "b"], "n": 2}, Limits(answers=3), "n"),
        ({"stop": ["a", "b", "c"]}, Limits(stop_strings=2), "stop"),
        ({"stop": "abc"}, Limits(stop_characters=2), "stop"),
        ({"logit_bias": {1: 1.0, 2: 1.0}}, Limits(biased_tokens=1), "logit_bias"),
        ({"max_tokens": 9}, Limits(max_tokens=8), "max_tokens"),
    ],
)
def test_limits_are_kept(service: ServingContext, fields: Any, limits: Limits, param: str) -> None:
    assert refused(replace(service, limits=limits), **fields) == param


def test_prompt_and_answer_fit_the_context_together(service: ServingContext) -> None:
    small = replace(service, limits=Limits(context_tokens=10))
    assert request(small, prompt=[5] * 6, max_tokens=4).max_tokens == 4
    for fields, param in [
        ({"prompt": [5] * 6, "max_tokens": 5}, "max_tokens"),
        ({"prompt": [5] * 10}, "prompt"),
        ({"prompt": [5] * 11, "max_tokens": 0}, "prompt"),
        ({"prompt": "Buzz " * 400}, "prompt"),
    ]:
        with pytest.raises(ContextTooLong) as caught:
            complete(small, **fields)
        assert caught.value.param == param


def test_what_is_left_of_the_context_bounds_an_answer_that_names_no_length(
    service: ServingContext,
) -> None:
    small = replace(service, limits=Limits(context_tokens=20))
    assert request(small, prompt=[5] * 15).max_tokens == 5
    assert request(small, prompt=[5] * 2).max_tokens == 16
    prompt = chat(small).requests[0].prompt
    assert chat(small).requests[0].max_tokens == 20 - len(prompt)
    short = replace(small, defaults=Defaults(chat_tokens=2))
    assert chat(short).requests[0].max_tokens == 2


def test_both_names_of_the_length_of_a_chat_must_agree(service: ServingContext) -> None:
    assert chat(service, max_tokens=5).requests[0].max_tokens == 5
    assert chat(service, max_completion_tokens=6).requests[0].max_tokens == 6
    assert chat(service, max_tokens=7, max_completion_tokens=7).requests[0].max_tokens == 7
    with pytest.raises(InvalidRequest):
        chat(service, max_tokens=5, max_completion_tokens=6)


def test_a_model_must_be_one_of_this_server(service: ServingContext) -> None:
    assert complete(service).model == "pair"
    assert complete(service, model="org/pair").model == "org/pair"
    with pytest.raises(ModelNotFound):
        complete(service, model="other")


def test_a_prediction_becomes_a_draft(service: ServingContext) -> None:
    content = [{"type": "text", "text": "on the"}, {"type": "text", "text": "Moon"}]
    got = chat(service, prediction={"type": "content", "content": content}).requests[0]
    assert service.tokenizer.decode(got.prediction) == "on the\nMoon"


def test_roles_and_parts_reach_the_template(service: ServingContext) -> None:
    turns = [
        {"role": "developer", "content": "be"},
        {"role": "system", "content": "brief"},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
            ],
        },
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    (prompt,) = chat(service, messages=turns).prompts
    text = service.tokenizer.decode(prompt)
    assert text == "system: besystem: briefuser: a\nbassistant: tool: 42"


def test_a_conversation_that_the_template_refuses_is_refused(service: ServingContext) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(service, messages=[{"role": "assistant", "content": "hello"}])
    assert caught.value.param == "messages"
    assert "assistant's own" in caught.value.message


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "user", "content": None},
        {"role": "assistant"},
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}
            ],
        },
        {
            "role": "assistant",
            "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": DEEP}}
            ],
        },
    ],
)
def test_turns_that_say_nothing_or_nonsense_are_refused(service: ServingContext, turn: Any) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(service, messages=[turn, {"role": "user", "content": "hi"}])
    assert (caught.value.param or "").startswith("messages")
