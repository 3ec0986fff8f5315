"""Defaults, limits and combinations of request fields."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from openai.types.chat import ChatCompletionMessage
from pydantic import TypeAdapter
from tests.support.toy_tokenizers import byte_level, wrap

from cascade.api import build_request
from cascade.api.body import parse
from cascade.api.context import MAX_SEED, Defaults, Limits
from cascade.api.schema import ChatBody, CompletionBody
from cascade.errors import ContextTooLong, InvalidRequest, ModelNotFound, StartupError
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
    from cascade.engine.tokenizer import Tokenizer
    from cascade.types import Request


DEEP = "[" * 220

SAMPLING = {
    "temperature": st.floats(0.1, 2),
    "top_p": st.floats(0.1, 1),
    "top_k": st.integers(1, 50),
    "min_p": st.floats(0, 1),
    "repetition_penalty": st.floats(1e-6, 10),
}


def complete(service: ServingContext, **fields: Any) -> CompletionCall:
    return build_request.completion(
        CompletionBody.model_validate({"prompt": "Buzz"} | fields), service
    )


def request(service: ServingContext, **fields: Any) -> Request:
    return complete(service, **fields).requests[0]


def chat(service: ServingContext, **fields: Any) -> CompletionCall:
    messages = [{"role": "user", "content": "Buzz"}]
    return build_request.chat(ChatBody.model_validate({"messages": messages} | fields), service)


def refused_param(service: ServingContext, **fields: Any) -> str | None:
    with pytest.raises(InvalidRequest) as caught:
        complete(service, **fields)
    return caught.value.param


def test_absent_fields_get_the_defaults(service: ServingContext) -> None:
    defaults = Defaults(
        mode=Mode.CASCADE,
        rule=TokenV3(alpha=0.8),
        draft_tokens=4,
        coupling=Coupling.GUMBEL,
        bonus=Bonus.TARGET,
        rows=RowFormat.FULL,
        row_entries=9,
        confidence_threshold=-2.0,
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


def test_every_field_reaches_the_request(service: ServingContext) -> None:
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


def test_the_choices_of_each_prompt_have_consecutive_seeds(service: ServingContext) -> None:
    """So a prompt in a batch gets the same text as alone."""
    call = complete(service, prompt=["a", "b"], n=3, seed=7)
    assert [one.policy.seed for one in call.requests] == [7, 8, 9, 7, 8, 9]
    assert [len(set(call.requests[at : at + 3])) for at in (0, 3)] == [3, 3]


def test_seeds_wrap_around(service: ServingContext) -> None:
    assert request(service, seed=-1).policy.seed == MAX_SEED - 1
    assert [one.policy.seed for one in complete(service, seed=MAX_SEED - 1, n=2).requests] == [
        MAX_SEED - 1,
        0,
    ]


def test_a_seed_implies_gumbel_coupling(service: ServingContext) -> None:
    assert request(service, seed=7).policy.coupling is Coupling.GUMBEL
    assert request(service).policy.coupling is Coupling.MAXIMAL
    options = {"coupling": "maximal"}
    assert request(service, seed=7, cascade=options).policy.coupling is Coupling.MAXIMAL


def test_without_a_seed_each_call_draws_one(service: ServingContext) -> None:
    assert request(service).policy.seed != request(service).policy.seed


def test_block_verification_needs_maximal_coupling(service: ServingContext) -> None:
    """A request for both is refused; a default gives way."""
    options = {"verification": "block"}
    assert refused_param(service, seed=7, cascade=options) == "cascade.verification"
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
def test_a_mode_takes_the_default_rule_if_it_can(
    service: ServingContext, mode: str, default: Any, rule: Any
) -> None:
    got = request(replace(service, defaults=Defaults(rule=default)), cascade={"mode": mode})
    assert (got.mode, got.policy.rule) == (mode, rule)


@pytest.mark.parametrize(
    "mode", ["speculative", "token_cascade", "expert_only", "drafter_only", "sequence_cascade"]
)
def test_a_rule_that_the_mode_cannot_use_is_refused(service: ServingContext, mode: str) -> None:
    options = {"mode": mode, "rule": {"kind": "token_v3", "alpha": 0.5}}
    assert refused_param(service, cascade=options) == "cascade.rule"


def test_a_rule_alone_means_a_cascade(service: ServingContext) -> None:
    alone = replace(service, defaults=Defaults(mode=Mode.EXPERT_ONLY))
    assert request(alone).mode is Mode.EXPERT_ONLY
    assert request(alone, cascade={"rule": {"kind": "lossless"}}).mode is Mode.CASCADE


def budget(service: ServingContext, **options: Any) -> float | None:
    return request(service, cascade=options).policy.divergence_budget


def test_a_divergence_budget_is_that_of_the_request_or_the_default(service: ServingContext) -> None:
    assert budget(service) is None
    assert budget(service, divergence_budget=0.25) == 0.25
    bounded = replace(service, defaults=Defaults(divergence_budget=0.5))
    assert budget(bounded) == 0.5
    assert budget(bounded, divergence_budget=7) == 7
    assert budget(bounded, mode="drafter_only") is None, "no expert could hold it to that"


def test_a_limit_of_divergence_bounds_every_answer(service: ServingContext) -> None:
    limited = replace(service, limits=Limits(divergence_budget=0.5))
    assert budget(limited) == 0.5
    assert budget(limited, divergence_budget=0) == 0
    assert budget(replace(limited, defaults=Defaults(divergence_budget=0.1))) == 0.1
    with pytest.raises(InvalidRequest, match=r"is 0\.6; this server allows at most 0\.5") as found:
        budget(limited, divergence_budget=0.6)
    assert found.value.param == "cascade.divergence_budget"
    with pytest.raises(InvalidRequest, match="this server has a divergence budget"):
        budget(limited, mode="token_cascade")


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"mode": "drafter_only"}, "cascade.mode"),
        ({"mode": "sequence_cascade"}, "cascade.mode"),
        ({"mode": "token_cascade"}, "cascade.mode"),
        ({"on_expert_loss": "drafter"}, "cascade.on_expert_loss"),
    ],
)
def test_a_divergence_budget_that_cannot_hold_is_refused(
    service: ServingContext, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(InvalidRequest, match="the request has a divergence budget") as found:
        budget(service, divergence_budget=0.5, **options)
    assert found.value.param == param


def test_defaults_that_cannot_hold_together_are_refused() -> None:
    with pytest.raises(ValueError, match="on_expert_loss: fail"):
        TypeAdapter(Defaults).validate_python({"divergence_budget": 1, "on_expert_loss": "drafter"})


def test_draft_tokens_has_a_limit_and_auto_means_none(service: ServingContext) -> None:
    fixed = replace(service, defaults=Defaults(draft_tokens=5))
    assert request(fixed).draft_tokens == 5
    assert request(fixed, cascade={"draft_tokens": "auto"}).draft_tokens is None
    assert request(fixed, cascade={"draft_tokens": 0}).draft_tokens == 0
    assert refused_param(fixed, cascade={"draft_tokens": 33}) == "cascade.draft_tokens"


@pytest.mark.parametrize("temperature", [0.0, 1e-300, 9e-6])
def test_temperatures_near_0_are_greedy(service: ServingContext, temperature: float) -> None:
    assert request(service, temperature=temperature).policy.sampling.greedy


def test_top_p_0_is_greedy_and_top_k_minus_1_keeps_all(service: ServingContext) -> None:
    sampling = request(service, top_p=0, top_k=40).policy.sampling
    assert (sampling.top_k, sampling.top_p) == (1, 1.0)
    assert request(service, top_k=-1).policy.sampling.top_k == 0


def test_stop_ids_include_the_models_unless_ignore_eos(service: ServingContext) -> None:
    (end,) = service.tokenizer.stop_ids
    more = replace(service, stop_ids=(2,))
    assert request(more).policy.stop_ids == (end, 2)
    assert request(more, stop_token_ids=[9, end]).policy.stop_ids == (end, 2, 9)
    assert request(more, ignore_eos=True, stop_token_ids=[9]).policy.stop_ids == (9,)


def test_prompts_are_texts_or_token_lists_one_or_many(service: ServingContext) -> None:
    one, two = service.tokenizer.encode("Buzz"), service.tokenizer.encode("Moon")
    assert complete(service, prompt="Buzz").prompts == (one,)
    assert complete(service, prompt=["Buzz", "Moon"]).prompts == (one, two)
    assert complete(service, prompt=list(one)).prompts == (one,)
    assert complete(service, prompt=[list(one), list(two)]).prompts == (one, two)


@pytest.mark.parametrize("prompt", [[10**6], [[1], [330]], [2**32 - 1]])
def test_prompt_tokens_outside_the_vocabulary_are_refused(
    service: ServingContext, prompt: Any
) -> None:
    assert refused_param(service, prompt=prompt) == "prompt"


@pytest.mark.parametrize("name", ["stop_token_ids", "logit_bias"])
def test_other_token_ids_outside_the_vocabulary_are_refused(
    service: ServingContext, name: str
) -> None:
    value: Any = {10**6: 1.0} if name == "logit_bias" else [10**6]
    assert refused_param(service, **{name: value}) == name
    negative: Any = {-1: 1.0}
    assert refused_param(service, logit_bias=negative) == "logit_bias"


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
def test_values_above_the_limits_are_refused(
    service: ServingContext, fields: Any, limits: Limits, param: str
) -> None:
    assert refused_param(replace(service, limits=limits), **fields) == param


def test_prompt_and_completion_must_fit_the_context(service: ServingContext) -> None:
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


def test_the_default_length_is_what_the_context_leaves(service: ServingContext) -> None:
    small = replace(service, limits=Limits(context_tokens=20))
    assert request(small, prompt=[5] * 15).max_tokens == 5
    assert request(small, prompt=[5] * 2).max_tokens == 16
    prompt = chat(small).requests[0].prompt
    assert chat(small).requests[0].max_tokens == 20 - len(prompt)
    short = replace(small, defaults=Defaults(chat_tokens=2))
    assert chat(short).requests[0].max_tokens == 2


def test_both_names_of_a_chats_length_must_agree(service: ServingContext) -> None:
    assert chat(service, max_tokens=5).requests[0].max_tokens == 5
    assert chat(service, max_completion_tokens=6).requests[0].max_tokens == 6
    assert chat(service, max_tokens=7, max_completion_tokens=7).requests[0].max_tokens == 7
    with pytest.raises(InvalidRequest):
        chat(service, max_tokens=5, max_completion_tokens=6)


def test_an_unknown_model_is_refused(service: ServingContext) -> None:
    assert complete(service).model == "pair"
    assert complete(service, model="org/pair").model == "org/pair"
    with pytest.raises(ModelNotFound):
        complete(service, model="other")


def test_a_prediction_is_tokenized(service: ServingContext) -> None:
    content = [{"type": "text", "text": "on the"}, {"type": "text", "text": "Moon"}]
    got = chat(service, prediction={"type": "content", "content": content}).requests[0]
    assert service.tokenizer.decode(got.prediction) == "on the\nMoon"


def test_roles_and_text_parts_reach_the_template(service: ServingContext) -> None:
    messages = [
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
    (prompt,) = chat(service, messages=messages).prompts
    text = service.tokenizer.decode(prompt)
    assert text == "system: besystem: briefuser: a\nbassistant: tool: 42"


def test_a_conversation_that_the_template_rejects_is_refused(service: ServingContext) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(service, messages=[{"role": "assistant", "content": "hello"}])
    assert caught.value.param == "messages"
    assert "assistant's own" in caught.value.message


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": None}, "messages[0].content"),
        ({"role": "system"}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": [{"id": "1"}]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "hi", "image": "x"}, "messages[0].image"),
    ],
)
def test_messages_that_nobody_can_read_are_refused(
    service: ServingContext, message: Any, param: str
) -> None:
    with pytest.raises(InvalidRequest) as caught:
        chat(service, messages=[message, {"role": "user", "content": "hi"}])
    assert caught.value.param == param


CALLS_TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for call in m.tool_calls or [] %}"
    "{{ call.function.name }}({% for key, value in call.function.arguments | items %}"
    "{{ key }}={{ value }},{% endfor %}{{ call.function.arguments | tojson }}){% endfor %};"
    "{% endfor %}"
)


@pytest.fixture(scope="session")
def calling() -> Tokenizer:
    """A tokenizer whose template shows tool calls, and needs objects for their arguments."""
    return wrap(byte_level(), chat_template=CALLS_TEMPLATE)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ('{"a": 1}', '(a=1,{"a": 1})'),
        ({"a": 1}, '(a=1,{"a": 1})'),
        ("", "({})"),
        (" \n", "({})"),
        (None, "({})"),
        ("null", "({})"),
        ("{", "({})"),
        ('{"a": 1, "b": "Par', '(a=1,b=Par,{"a": 1, "b": "Par"})'),
        ('{"a": [1, 2', '(a=[1, 2],{"a": [1, 2]})'),
        ("Paris", '(arguments=Paris,{"arguments": "Paris"})'),
        ("[1, 2]", '(arguments=[1, 2],{"arguments": "[1, 2]"})'),
        ('"Paris"', None),
        ("{'a': 1}", None),
        ("3", None),
        ("NaN", None),
        (DEEP, None),
        ([1], None),
    ],
)
def test_arguments_that_a_model_wrote_can_be_sent_back(
    service: ServingContext, calling: Tokenizer, arguments: Any, shown: str | None
) -> None:
    """Whatever they are: empty, cut off, no object, no JSON."""
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    (prompt,) = chat(replace(service, tokenizer=calling), messages=messages).prompts
    text = calling.decode(prompt)
    assert shown is None or text == f"assistant:f{shown};"
    assert text.startswith("assistant:f(")


@given(arguments=st.text(st.characters(codec="utf-8"), max_size=30) | st.text('{}[]":,a1 \\'))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_text_can_be_arguments(
    service: ServingContext, calling: Tokenizer, arguments: str
) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    messages = [{"role": "assistant", "tool_calls": [call]}]
    assert chat(replace(service, tokenizer=calling), messages=messages).prompts


FUNCTION = {"name": "f", "arguments": "{}"}
HISTORY: list[tuple[dict[str, Any], str]] = [
    (ChatCompletionMessage(role="assistant", content="hi").model_dump(), "assistant:hi;"),
    (ChatCompletionMessage(role="assistant", content=None).model_dump(), "assistant:;"),
    (ChatCompletionMessage(role="assistant", refusal="No.").model_dump(), "assistant:No.;"),
    ({"role": "assistant", "content": ""}, "assistant:;"),
    ({"role": "assistant"}, "assistant:;"),
    ({"role": "assistant", "content": []}, "assistant:;"),
    ({"role": "assistant", "content": "a", "tool_calls": []}, "assistant:a;"),
    ({"role": "assistant", "content": "a", "annotations": []}, "assistant:a;"),
    ({"role": "assistant", "content": "a", "parsed": {"b": 1}, "id": "c"}, "assistant:a;"),
    ({"role": "assistant", "content": "a", "reasoning_content": "b"}, "assistant:a;"),
    (
        {"role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
        "assistant:No.;",
    ),
    (
        {"role": "assistant", "content": [{"type": "text", "text": "a", "annotations": []}]},
        "assistant:a;",
    ),
    ({"role": "assistant", "tool_calls": [{"index": 0, "function": FUNCTION}]}, "assistant:f({});"),
    (
        {"role": "assistant", "tool_calls": [{"id": None, "type": None, "function": FUNCTION}]},
        "assistant:f({});",
    ),
    (
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "custom", "custom": {"name": "f", "input": "x"}}],
        },
        'assistant:f(input=x,{"input": "x"});',
    ),
    ({"role": "assistant", "content": None, "function_call": FUNCTION}, "assistant:f({});"),
    ({"role": "function", "name": "f", "content": "4"}, "tool:4;"),
    ({"role": "tool", "tool_call_id": "1", "content": None}, "tool:;"),
    ({"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "4"}]}, "tool:4;"),
    ({"role": "user", "content": "hi", "name": None, "tool_calls": None, "x": None}, "user:hi;"),
]


@pytest.mark.parametrize(("message", "shown"), HISTORY)
def test_history_can_be_sent_back(
    service: ServingContext, calling: Tokenizer, message: Any, shown: str
) -> None:
    """What `message.model_dump()` of OpenAI's client gives, and what other servers add."""
    data = json.dumps({"messages": [message]}).encode()
    call = build_request.chat(parse(data, ChatBody), replace(service, tokenizer=calling))
    assert calling.decode(call.prompts[0]) == shown


def test_a_prediction_with_a_token_that_has_no_logits_is_named(service: ServingContext) -> None:
    largest = max(service.tokenizer.encode("Buzz"))
    narrow = replace(service, tokenizer=service.tokenizer.narrowed(largest))
    content = {"type": "content", "content": "Buzz"}
    assert refused_param(narrow, prompt=[5], prediction=content) == "prediction"


@given(data=st.data(), name=st.sampled_from(sorted(SAMPLING)))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_then_the_yaml_then_the_checkpoint_decide(
    service: ServingContext, data: st.DataObject, name: str
) -> None:
    by_request, by_yaml, by_checkpoint = data.draw(
        st.tuples(*[st.none() | SAMPLING[name] for _ in range(3)])
    )
    checkpoint = {} if by_checkpoint is None else {name: by_checkpoint}
    defaults = Defaults(**{name: by_yaml}).completed(checkpoint)

    made = request(replace(service, defaults=defaults), **{name: by_request})

    built_in = getattr(SamplingParams(), name)
    stated = (by_request, by_yaml, by_checkpoint, built_in)
    expected = next(value for value in stated if value is not None)
    assert getattr(made.policy.sampling, name) == expected


def test_a_checkpoint_limits_the_length_of_what_does_not_say_its_own(
    service: ServingContext,
) -> None:
    service = replace(service, defaults=Defaults().completed({"max_new_tokens": 7}))

    assert chat(service).requests[0].max_tokens == 7
    assert chat(service, max_tokens=9).requests[0].max_tokens == 9
    shorter = replace(service, defaults=Defaults(chat_tokens=5).completed({"max_new_tokens": 7}))
    assert chat(shorter).requests[0].max_tokens == 5


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", 2.5), ("temperature", "hot"), ("top_p", 0), ("top_k", -1)),
        *(("min_p", 2), ("repetition_penalty", 1e-38), ("max_new_tokens", 0)),
    ],
)
def test_a_checkpoint_may_say_no_more_than_a_request(name: str, value: object) -> None:
    found: Any = {name: value}

    with pytest.raises(StartupError, match=r"generation_config.json has .* or set"):
        Defaults().completed(found)


def test_off_is_what_yaml_reads_as_false() -> None:
    assert TypeAdapter(Defaults).validate_python({"generation_config": False}) == Defaults(
        generation_config="off"
    )


def test_words_that_no_answer_may_have_come_before_those_of_the_request(
    service: ServingContext,
) -> None:
    service = replace(service, bad_words=((5,), (9, 3)))

    made = request(service, bad_words=["Moon"]).policy.constraints

    alone, inside = (service.tokenizer.encode(text) for text in ("Moon", " Moon"))
    assert made.bad_words == ((5,), (9, 3), alone, *([inside] if len(inside) == len(alone) else []))
