"""Invalid bodies get an error that names the field."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from openai.types.chat.completion_create_params import CompletionCreateParamsBase
from openai.types.completion_create_params import CompletionCreateParamsBase as TextParamsBase
from pydantic import TypeAdapter

from cascade.api import build_request, grpc_convert, schema
from cascade.api.body import parse
from cascade.api.schema import (
    ChatBody,
    CompletionBody,
    Options,
    PatienceOptions,
    StreamOptions,
)
from cascade.errors import InvalidRequest, UnsupportedParameter
from cascade.rules import Rule
from cascade.types import Bonus, Confidence, Coupling, ExpertLoss, Mode, RowFormat, Verification
from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from cascade.api.context import ServingContext

MESSAGE = '{"role": "user", "content": "hi"}'


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ('"prompt": [1, "a"]', "prompt"),
        ('"prompt": {"a": 1}', "prompt"),
        ('"prompt": ""', "prompt"),
        ('"prompt": []', "prompt"),
        ('"prompt": ["a", ""]', "prompt"),
        ('"prompt": [[]]', "prompt"),
        ('"prompt": [[1], []]', "prompt"),
        ('"prompt": [1.5]', "prompt"),
        ('"prompt": [true]', "prompt"),
        ('"prompt": null', "prompt"),
        ('"max_tokens": 3', "prompt"),
        ('"prompt": "x", "max_tokens": "3"', "max_tokens"),
        ('"prompt": "x", "max_tokens": -1', "max_tokens"),
        ('"prompt": "x", "temperature": NaN', "temperature"),
        ('"prompt": "x", "temperature": Infinity', "temperature"),
        ('"prompt": "x", "temperature": 1e999', "temperature"),
        ('"prompt": "x", "temperature": 2.1', "temperature"),
        ('"prompt": "x", "temperature": true', "temperature"),
        ('"prompt": "x", "top_p": -0.1', "top_p"),
        ('"prompt": "x", "n": 0', "n"),
        ('"prompt": "x", "logprobs": 21', "logprobs"),
        ('"prompt": "x", "seed": 9223372036854775808', "seed"),
        ('"prompt": "x", "stop": ["a", ""]', "stop[1]"),
        ('"prompt": "x", "stop": ""', "stop"),
        ('"prompt": "x", "logit_bias": {"a": 1}', "logit_bias"),
        ('"prompt": "x", "logit_bias": {"1": 101}', "logit_bias"),
        ('"prompt": "x", "cascade": {"mode": "magic"}', "cascade.mode"),
        ('"prompt": "x", "cascade": {"speed": 1}', "cascade.speed"),
        ('"prompt": "x", "cascade": {"draft_tokens": "few"}', "cascade.draft_tokens"),
        ('"prompt": "x", "cascade": {"draft_tokens": -1}', "cascade.draft_tokens"),
        ('"prompt": "x", "cascade": {"rule": {"kind": "magic"}}', "cascade.rule"),
        ('"prompt": "x", "cascade": {"rule": {"alpha": 0.5}}', "cascade.rule"),
        ('"prompt": "x", "cascade": {"rule": "chow"}', "cascade.rule"),
        ('"prompt": "x", "cascade": {"rule": {"kind": "chow"}}', "cascade.rule.alpha"),
        ('"prompt": "x", "cascade": {"patience": {"nerve": 1}}', "cascade.patience.nerve"),
    ],
)
def test_an_invalid_completion_names_its_field(fields: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(f"{{{fields}}}".encode(), CompletionBody)
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ('"messages": []', "messages"),
        ('"messages": "hi"', "messages"),
        ('"messages": [{"role": "wizard", "content": "hi"}]', "messages[0].role"),
        (f'"messages": [{MESSAGE}, {{"content": "hi"}}]', "messages[1].role"),
        (
            '"messages": [{"role": "user", "content": [{"type": "image_url", "text": ""}]}]',
            "messages[0].content[0].type",
        ),
        (f'"messages": [{MESSAGE}], "top_logprobs": 21', "top_logprobs"),
        (f'"messages": [{MESSAGE}], "max_completion_tokens": 0', "max_completion_tokens"),
    ],
)
def test_an_invalid_chat_names_its_field(fields: str, param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(f"{{{fields}}}".encode(), ChatBody)
    assert caught.value.param == param


def kind_of(rule: type[Rule]) -> str:
    return next(str(field.default) for field in fields(rule) if field.name == "kind")


VALUES: dict[str, tuple[str, list[str]]] = {  # where a name stands, and the names that may
    "mode": ('"cascade": {"mode": "NAME"}', list(Mode)),
    "rule": (
        '"cascade": {"rule": {"kind": "NAME", "alpha": 0.5}}',
        [kind_of(rule) for rule in get_args(Rule)],
    ),
    "beta": (
        '"cascade": {"rule": {"kind": "lossy", "alpha": 0, "beta": "NAME"}}',
        ["one", "solved"],
    ),
    "coupling": ('"cascade": {"coupling": "NAME"}', list(Coupling)),
    "bonus": ('"cascade": {"bonus": "NAME"}', list(Bonus)),
    "verification": ('"cascade": {"verification": "NAME"}', list(Verification)),
    "rows": ('"cascade": {"rows": "NAME"}', list(RowFormat)),
    "loss": ('"cascade": {"on_expert_loss": "NAME"}', list(ExpertLoss)),
    "confidence": ('"cascade": {"patience": {"confidence": "NAME"}}', list(Confidence)),
    "field": ('"NAME": 1', [*CompletionBody.model_fields]),
    "option": ('"cascade": {"NAME": 1}', [*Options.model_fields]),
    "patience": ('"cascade": {"patience": {"NAME": 1}}', [*PatienceOptions.model_fields]),
    "parameter": ('"cascade": {"rule": {"kind": "typical", "NAME": 1}}', ["epsilon", "delta"]),
    "stream": ('"stream_options": {"NAME": true}', [*StreamOptions.model_fields]),
}
LIBRARY_WORDS = re.compile("Input |input tag|Extra inputs|keyword argument|Value error|Field req")


@given(st.data(), st.sampled_from(sorted(VALUES)))
def test_a_mistyped_name_is_answered_with_the_nearest_in_our_words(
    data: st.DataObject, place: str
) -> None:
    """A letter is missing or doubled, or the name is in capitals."""
    template, names = VALUES[place]
    name = data.draw(st.sampled_from([one for one in names if len(one) > 3]))
    at = data.draw(st.integers(0, len(name) - 1))
    wrong = data.draw(
        st.sampled_from(
            [name[:at] + name[at + 1 :], name[:at] + name[at] + name[at:], name.upper()]
        )
    )
    assume(wrong not in names)
    with pytest.raises(InvalidRequest) as caught:
        parse(f'{{"prompt": "x", {template.replace("NAME", wrong)}}}'.encode(), CompletionBody)
    message = caught.value.message
    meant = re.search(r"did you mean `(\w+)`\?", message)
    assert meant is not None, message
    assert meant[1] in get_close_matches(wrong.lower(), names)
    assert not LIBRARY_WORDS.search(message)


def test_grpc_answers_a_mistyped_role_with_the_nearest(service: ServingContext) -> None:
    chat = pb.Chat(messages=[pb.ChatMessage(role="usr", content="hi")])
    with pytest.raises(InvalidRequest, match="did you mean `user`"):
        grpc_convert.call(pb.Generation(chat=chat), service)


def test_a_missing_field_whose_name_is_mistyped_is_the_mistyped_one() -> None:
    with pytest.raises(InvalidRequest, match="did you mean `messages`") as caught:
        parse(f'{{"messagess": [{MESSAGE}]}}'.encode(), ChatBody)
    assert caught.value.param == "messagess"


@pytest.mark.parametrize("kind", get_args(Rule))
@pytest.mark.parametrize(
    "alpha", ["NaN", "Infinity", "-Infinity", '"0.5"', "true", "null", "7e300"]
)
def test_every_rule_parameter_must_be_a_number_in_its_range(kind: type[Rule], alpha: str) -> None:
    name = kind_of(kind)
    for parameter in {"alpha", "weight", "epsilon", "delta"} & {
        field.name for field in fields(kind)
    }:
        rule = f'{{"kind": "{name}", "{parameter}": {alpha}}}'
        body = f'{{"prompt": "x", "cascade": {{"rule": {rule}}}}}'
        with pytest.raises(InvalidRequest) as caught:
            parse(body.encode(), CompletionBody)
        assert (caught.value.param or "").startswith("cascade.rule")


@pytest.mark.parametrize("name", ["best_of", "suffix"])
def test_a_completion_with_an_unsupported_parameter_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse(f'{{"prompt": "x", "{name}": 2}}'.encode(), CompletionBody)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("modalities", '["text", "audio"]'),
        ("audio", '{"voice": "x"}'),
        ("web_search_options", "{}"),
        ("use_beam_search", "true"),
        ("moderation", '{"model": "m"}'),
        ("verbosity", '"low"'),
        ("something_new", "1"),
    ],
)
def test_a_chat_with_an_unsupported_parameter_is_refused(name: str, value: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse(f'{{"messages": [{MESSAGE}], "{name}": {value}}}'.encode(), ChatBody)
    assert caught.value.param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tools", '[{"type": "function"}]'),
        ("tool_choice", '"required"'),
        ("functions", '[{"name": "f"}], "function_call": "auto"'),
        ("function_call", '{"name": "f"}'),
        ("reasoning_effort", '"low"'),
    ],
)
def test_what_only_chats_have_is_refused_in_a_completion(name: str, value: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse(f'{{"prompt": "x", "{name}": {value}}}'.encode(), CompletionBody)
    assert caught.value.param == name


CALLABLE = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
NEUTRAL: list[dict[str, Any]] = [
    {"add_generation_prompt": True},
    {"best_of": 1},
    {"best_of": 2, "n": 2},
    {"cascade": None},
    {"cascade": dict.fromkeys(schema.Options.model_fields)},
    {"cascade": {"patience": dict.fromkeys(schema.PatienceOptions.model_fields)}},
    {"continue_final_message": False},
    {"frequency_penalty": 0},
    {"function_call": "none"},
    {"functions": []},
    {"functions": [{"name": "f"}], "function_call": "none"},
    {"include_stop_str_in_output": False},
    {"length_penalty": 1},
    {"length_penalty": 1.0},
    {"logit_bias": {}},
    {"metadata": {}},
    {"metadata": {"a": "b"}},
    {"min_tokens": 0},
    {"modalities": []},
    {"modalities": ["text"]},
    {"n": 1},
    {"parallel_tool_calls": False},
    {"parallel_tool_calls": True},
    {"prediction": None},
    {"presence_penalty": 0},
    {"prompt_cache_key": "x"},
    {"prompt_cache_options": {"mode": "implicit"}},
    {"prompt_cache_retention": "in_memory"},
    {"response_format": {"type": "text"}},
    {"safety_identifier": "x"},
    {"service_tier": "auto"},
    {"skip_special_tokens": True},
    {"spaces_between_special_tokens": True},
    {"stop": []},
    {"store": False},
    {"store": True},
    {"stream": False},
    {"stream": True, "stream_options": dict.fromkeys(schema.StreamOptions.model_fields)},
    {"suffix": ""},
    {"temperature": 1},
    {"tool_choice": "auto"},
    {"tool_choice": "none"},
    {"tools": []},
    {"tools": [], "tool_choice": "auto"},
    {"tools": CALLABLE, "tool_choice": "none"},
    {"top_p": 1},
    {"use_beam_search": False},
    {"user": "me"},
    {"verbosity": "medium"},
]
NEUTRAL_IN_CHATS: list[dict[str, Any]] = [
    *NEUTRAL,
    {"logprobs": False},
    {"logprobs": False, "top_logprobs": 0},
    {"top_logprobs": 0},
]
NEUTRAL_IN_COMPLETIONS: list[dict[str, Any]] = [*NEUTRAL, {"echo": False}]


def names(params: Any) -> set[str]:
    """Return every parameter that the installed client knows, its newest too."""
    return set(params.__annotations__) - {"messages", "prompt"}


@pytest.mark.parametrize("name", sorted(names(CompletionCreateParamsBase) | {"something_new"}))
def test_a_null_parameter_of_a_chat_is_as_if_absent(service: ServingContext, name: str) -> None:
    body = chat_body(name, None)
    assert build_request.chat(body, service) == build_request.chat(chat_body("n", 1), service)


@pytest.mark.parametrize("name", sorted(names(TextParamsBase) | {"something_new"}))
def test_a_null_parameter_of_a_completion_is_as_if_absent(
    service: ServingContext, name: str
) -> None:
    body = parse(json.dumps({"prompt": "x", name: None, "seed": 5}).encode(), CompletionBody)
    assert build_request.completion(body, service)


def chat_body(name: str, value: Any) -> ChatBody:
    fields = {"messages": [{"role": "user", "content": "hi"}], "seed": 5, name: value}
    return parse(json.dumps(fields | {"seed": 5}).encode(), ChatBody)


@pytest.mark.parametrize("fields", NEUTRAL_IN_CHATS, ids=str)
def test_a_chat_may_have_values_that_request_nothing(
    service: ServingContext, fields: dict[str, Any]
) -> None:
    """Clients and frameworks send them by default."""
    body = {"messages": [{"role": "user", "content": "hi"}]} | fields
    call = build_request.chat(parse(json.dumps(body).encode(), ChatBody), service)
    assert service.tokenizer.decode(call.prompts[0]) == "user: hi"


@pytest.mark.parametrize("fields", NEUTRAL_IN_COMPLETIONS, ids=str)
def test_a_completion_may_have_values_that_request_nothing(
    service: ServingContext, fields: dict[str, Any]
) -> None:
    body = parse(json.dumps({"prompt": "x"} | fields).encode(), CompletionBody)
    assert build_request.completion(body, service)


def test_every_parameter_of_the_client_has_a_neutral_value_or_is_used() -> None:
    """A new version of the client may know more: decide what they mean."""
    for params, body, neutral in (
        (CompletionCreateParamsBase, ChatBody, NEUTRAL_IN_CHATS),
        (TextParamsBase, CompletionBody, NEUTRAL_IN_COMPLETIONS),
    ):
        assert names(params) <= {*body.model_fields, *(key for one in neutral for key in one)}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b'{"prompt": "\xff"}',
        b'{"prompt": "\\ud800"}',
        b"\xef\xbb\xbf{}",
        b"[" * 100_000,
        b'{"a":' * 100_000,
    ],
)
def test_bytes_that_are_no_json_object_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(data, CompletionBody)
    assert caught.value.param is None


@given(st.binary(max_size=40))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(InvalidRequest):
        parse(data, CompletionBody)


def test_a_long_value_is_cut_in_the_error() -> None:
    with pytest.raises(InvalidRequest) as caught:
        parse(b'{"prompt": "x", "max_tokens": "' + b"9" * 10_000 + b'"}', CompletionBody)
    assert len(caught.value.message) < 300


def test_every_rule_can_be_requested() -> None:
    """The body's rules are those of `cascade.rules`."""
    described = TypeAdapter(schema.Options).json_schema()
    kinds = described["properties"]["rule"]["anyOf"][0]["discriminator"]["mapping"]
    assert set(kinds) == set(map(kind_of, get_args(Rule)))
