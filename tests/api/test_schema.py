"""Invalid bodies get an error that names the field."""

from __future__ import annotations

import json
from dataclasses import fields
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from cascade.api import schema
from cascade.api.schema import ChatBody, CompletionBody, parse
from cascade.errors import InvalidRequest, UnsupportedParameter
from cascade.rules import Rule

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
        ('"prompt": "x", "logprobs": 6', "logprobs"),
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


@pytest.mark.parametrize("kind", get_args(Rule))
@pytest.mark.parametrize(
    "alpha", ["NaN", "Infinity", "-Infinity", '"0.5"', "true", "null", "7e300"]
)
def test_every_rule_parameter_must_be_a_number_in_its_range(kind: type[Rule], alpha: str) -> None:
    unbounded = {"opt", "chow_log", "diff_log", "opt_log", "bild"}
    name = kind_of(kind)
    for parameter in {"alpha", "weight", "epsilon", "delta"} & {
        field.name for field in fields(kind)
    }:
        if alpha == "7e300" and name in unbounded:
            continue
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
        ("response_format", '{"type": "json_object"}'),
        ("tools", '[{"type": "function"}]'),
        ("tool_choice", '"required"'),
        ("functions", '[{"name": "f"}]'),
        ("function_call", '{"name": "f"}'),
        ("modalities", '["text", "audio"]'),
        ("audio", '{"voice": "x"}'),
        ("web_search_options", "{}"),
        ("reasoning_effort", '"low"'),
        ("something_new", "1"),
    ],
)
def test_a_chat_with_an_unsupported_parameter_is_refused(name: str, value: str) -> None:
    with pytest.raises(UnsupportedParameter) as caught:
        parse(f'{{"messages": [{MESSAGE}], "{name}": {value}}}'.encode(), ChatBody)
    assert caught.value.param == name


def test_unsupported_parameters_are_accepted_if_they_request_nothing() -> None:
    """Clients and frameworks send them by default."""
    idle: dict[str, Any] = {
        "response_format": {"type": "text"},
        "tools": [],
        "tool_choice": "none",
        "functions": [],
        "modalities": ["text"],
        "audio": None,
        "user": "me",
        "metadata": {"a": "b"},
        "store": True,
        "service_tier": "auto",
        "safety_identifier": "x",
        "prompt_cache_key": "y",
        "stop": None,
    }
    body = {"messages": [{"role": "user", "content": "hi"}]} | idle
    assert parse(json.dumps(body).encode(), ChatBody).stop is None
    trivial = b'{"prompt": "x", "best_of": 1, "suffix": "", "logit_bias": null, "n": null}'
    assert parse(trivial, CompletionBody).n is None


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
