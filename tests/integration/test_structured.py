"""What a body says that its completions must match is what they match, over both APIs."""

from __future__ import annotations

import asyncio
import json
import re
from typing import TYPE_CHECKING, Any

import grpc
import httpx2
import jsonschema
import pytest
from tests.support.rpc_errors import error_info

from cascade.api.grpc import GenerationServicer
from cascade.api.http import create_app
from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc as rpc
from cascade.v1 import tokens_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cascade.local import LocalServer

CITY = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"enum": ["small", "large"]},
        "coast": {"type": "boolean"},
    },
    "required": ["name", "size", "coast"],
    "additionalProperties": False,
}

SPELLINGS: dict[str, tuple[dict[str, Any], str]] = {
    "response_format": (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "c", "schema": CITY}}},
        "schema",
    ),
    "structured json": ({"structured_outputs": {"json": CITY}}, "schema"),
    "guided json as text": ({"guided_json": json.dumps(CITY)}, "schema"),
    "structured regex": ({"structured_outputs": {"regex": "[a-c]{3}-[0-9]{2}"}}, "[a-c]{3}-\\d{2}"),
    "guided regex": ({"guided_regex": "x(yz)*w"}, "x(yz)*w"),
    "choice": (
        {"structured_outputs": {"choice": ["yes", 'n"o\n', "\u00e9t\u00e9"]}},
        'yes|n"o\n|\u00e9t\u00e9',
    ),
    "guided choice": ({"guided_choice": ["left", "right"]}, "left|right"),
    "grammar": ({"structured_outputs": {"grammar": 'root ::= "a" root "b" | "ab"'}}, "a+b+"),
    "guided grammar": ({"guided_grammar": 'root ::= [0-9] "." [0-9]'}, r"\d\.\d"),
}


@pytest.fixture(scope="module")
async def server(shipped_server: LocalServer) -> LocalServer:
    """The pair that ships."""
    assert shipped_server.service.grammars is not None
    await shipped_server.service.grammars.start()
    return shipped_server


@pytest.fixture
async def http(server: LocalServer) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=create_app(server.service))
    async with httpx2.AsyncClient(
        transport=transport, base_url="http://server", timeout=60
    ) as client:
        yield client


async def asked(client: httpx2.AsyncClient, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "Name a city."}]
    body = {"messages": messages, "max_tokens": 120, "seed": 5} | fields
    response = await client.post("/v1/chat/completions", json=body)
    return response.json()


@pytest.mark.parametrize(("fields", "pattern"), SPELLINGS.values(), ids=SPELLINGS)
async def test_every_spelling_is_followed(
    http: httpx2.AsyncClient, fields: dict[str, Any], pattern: str
) -> None:
    """At temperature 1, under a rule that keeps the drafter's tokens."""
    rule = {"rule": {"kind": "token_v3", "alpha": 0.8}}
    answer = await asked(http, **fields, n=2, cascade=rule)
    for choice in answer["choices"]:
        text = choice["message"]["content"]
        if pattern == "schema" and choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(text), CITY)
        elif choice["finish_reason"] == "stop":
            assert re.fullmatch(pattern, text)
    assert any(choice["finish_reason"] == "stop" for choice in answer["choices"])


async def test_a_json_object_is_any_object(http: httpx2.AsyncClient) -> None:
    answer = await asked(http, response_format={"type": "json_object"}, n=2, max_tokens=60)
    finished = [one for one in answer["choices"] if one["finish_reason"] == "stop"]
    assert all(isinstance(json.loads(one["message"]["content"]), dict) for one in finished)
    assert all(one["message"]["content"].lstrip().startswith("{") for one in answer["choices"])


async def test_json_that_is_cut_off_says_length(http: httpx2.AsyncClient) -> None:
    answer = await asked(http, guided_json=CITY, max_tokens=4)
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_only_a_schema_that_is_not_strict_lets_other_properties_in(
    http: httpx2.AsyncClient,
) -> None:
    begins = dict[bool, set[str]]()
    for strict in (True, False):
        schema = {"type": "object", "properties": {"only": {"type": "integer"}}}
        wrapped = {"name": "c", "schema": schema, "strict": strict}
        form = {"type": "json_schema", "json_schema": wrapped}
        answer = await asked(http, response_format=form, n=8, max_tokens=20)
        texts = ["".join(one["message"]["content"].split()) for one in answer["choices"]]
        begins[strict] = {text[:7] for text in texts}
    assert begins[True] <= {"{}", '{"only"'}
    assert not begins[False] <= {"{}", '{"only"'}


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown type": ({"guided_json": {"type": "foo"}}, "guided_json"),
    "no JSON": ({"structured_outputs": {"json": "{"}}, "structured_outputs.json"),
    "no regular expression": ({"guided_regex": "(a"}, "guided_regex"),
    "an unknown rule": ({"guided_grammar": "root ::= foo"}, "guided_grammar"),
    "endless": (
        {
            "guided_json": {
                "type": "object",
                "properties": {"next": {"$ref": "#"}},
                "required": ["next"],
            }
        },
        "guided_json",
    ),
    "an endless grammar": ({"guided_grammar": 'root ::= "a" root'}, "guided_grammar"),
    "a megabyte": ({"guided_regex": "a" * 1_000_000}, "guided_regex"),
    "deep": (
        {"structured_outputs": {"json": '{"items":' * 2000 + "{}" + "}" * 2000}},
        "structured_outputs.json",
    ),
    "many properties": (
        {"guided_json": {"properties": {f"p{n}": {"type": "string"} for n in range(4000)}}},
        "guided_json",
    ),
    "two at once": ({"guided_regex": "a", "guided_choice": ["a"]}, "guided_choice"),
    "no end": ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos"),
}


@pytest.mark.parametrize(("fields", "param"), REFUSED.values(), ids=REFUSED)
async def test_what_cannot_be_compiled_is_refused_by_name_and_disturbs_nobody(
    http: httpx2.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    refused, other = await asyncio.gather(
        asked(http, **fields), asked(http, guided_choice=["left", "right"])
    )
    assert refused["error"]["param"] == param
    assert refused["error"]["type"] == "invalid_request_error"
    assert other["choices"][0]["message"]["content"] in {"left", "right"}


async def test_grpc_follows_grammars_and_names_what_is_wrong_with_them(server: LocalServer) -> None:
    grpc_server = grpc.aio.server()
    rpc.add_GenerationServiceServicer_to_server(
        GenerationServicer(lambda: server.service), grpc_server
    )
    port = grpc_server.add_insecure_port("127.0.0.1:0")
    await grpc_server.start()
    kinds = {
        tokens_pb2.GRAMMAR_KIND_REGEX: "x[yz]w",
        tokens_pb2.GRAMMAR_KIND_EBNF: 'root ::= "x" [yz] "w"',
        tokens_pb2.GRAMMAR_KIND_JSON_SCHEMA: '{"enum": [7]}',
        tokens_pb2.GRAMMAR_KIND_OPEN_JSON_SCHEMA: '{"enum": [7]}',
    }
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = rpc.GenerationServiceStub(channel)
        for kind, text in kinds.items():
            grammar = tokens_pb2.Grammar(kind=kind, text=text)
            generation = pb.Generation(text="Say:", max_tokens=30, grammar=grammar)
            response = await stub.Generate(pb.GenerateRequest(generation=generation))
            assert re.fullmatch("x[yz]w|7", response.choices[0].text)
            assert response.usage.forced_token_count >= 1
            grammar.text = "(" if kind == tokens_pb2.GRAMMAR_KIND_REGEX else "{"
            bad = pb.Generation(text="Say:", grammar=grammar)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub.Generate(pb.GenerateRequest(generation=bad))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert error_info(caught.value).metadata["param"] == "grammar.text"
    await grpc_server.stop(None)
