"""Tools with the shipped pair, which was not trained on any: the grammar makes its calls valid."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx2
import jsonschema
import pytest
from openai import AsyncOpenAI, BadRequestError, pydantic_function_tool
from pydantic import BaseModel
from transformers import PreTrainedTokenizerFast

from cascade import demo
from cascade.api.chat_format import chat_format
from cascade.api.http import create_app
from cascade.engine.tokenizer import Tokenizer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from cascade.local import LocalServer

ASK: Any = [{"role": "user", "content": "How is the weather in Paris?"}]


def tool(name: str, **properties: Any) -> Any:
    parameters = {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


UNIT = {"enum": ["celsius", "fahrenheit"]}
TOOLS = [
    tool("get_weather", unit=UNIT, days={"type": "integer", "minimum": 1, "maximum": 9}),
    tool("switch", on={"type": "boolean"}),
]
SCHEMAS = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}


@pytest.fixture
def pair(shipped_server: LocalServer) -> LocalServer:
    return shipped_server


@pytest.fixture
async def client(pair: LocalServer) -> AsyncIterator[AsyncOpenAI]:
    app = create_app(replace(pair.service, models=("pair",)))
    transport = httpx2.ASGITransport(app=app)
    async with AsyncOpenAI(
        api_key="any",
        base_url="http://server/v1",
        http_client=httpx2.AsyncClient(transport=transport),
        max_retries=0,
    ) as one:
        yield one


def calls(response: Any) -> list[Any]:
    return response.choices[0].message.tool_calls or []


def assert_valid(found: Any) -> None:
    assert found
    for call in found:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


@pytest.mark.parametrize(
    "options",
    [
        {"draft_tokens": 0},
        {"draft_tokens": 5},
        {"rule": {"kind": "chow", "alpha": 0.5}},
        {"phases": {"tool": {"kind": "lossless"}}, "rule": {"kind": "diff", "alpha": 0.5}},
        {"mode": "drafter_only"},
    ],
)
@pytest.mark.parametrize("temperature", [0, 1])
async def test_a_model_that_must_call_makes_valid_calls(
    client: AsyncOpenAI, temperature: float, options: dict[str, Any]
) -> None:
    """Under every kind of rule, at every temperature."""
    response = await client.chat.completions.create(
        model="pair",
        messages=ASK,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        temperature=temperature,
        max_tokens=300,
        extra_body={"cascade": options},
    )
    (choice,) = response.choices
    assert choice.finish_reason == "tool_calls"
    assert not choice.message.content
    assert len(choice.message.tool_calls or ()) == 1
    assert_valid(choice.message.tool_calls)


async def test_the_function_that_is_named_is_called(client: AsyncOpenAI) -> None:
    """And streamed deltas make it."""
    named: Any = {"type": "function", "function": {"name": "switch"}}
    async with client.chat.completions.stream(
        model="pair", messages=ASK, tools=TOOLS, tool_choice=named, max_tokens=300
    ) as stream:
        final = await stream.get_final_completion()
    (call,) = calls(final)
    assert call.function.name == "switch"
    assert_valid([call])
    assert final.choices[0].finish_reason == "tool_calls"


async def test_the_clients_own_parser_reads_strict_tools(client: AsyncOpenAI) -> None:
    class Switch(BaseModel):
        on: bool

    response = await client.chat.completions.parse(
        model="pair",
        messages=ASK,
        tools=[pydantic_function_tool(Switch)],
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    (call,) = calls(response)
    assert isinstance(call.function.parsed_arguments, Switch)


async def test_a_round_with_a_tools_answer_ends_in_text(client: AsyncOpenAI) -> None:
    """The whole loop of an agent: the call, its result, an answer."""
    first = await client.chat.completions.create(
        model="pair",
        messages=ASK,
        tools=TOOLS,
        tool_choice="required",
        parallel_tool_calls=False,
        max_tokens=300,
    )
    message: Any = first.choices[0].message
    (call,) = calls(first)
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "12 degrees"}
    second = await client.chat.completions.create(
        model="pair",
        messages=[*ASK, message.model_dump(exclude_none=True), result],
        tools=TOOLS,
        tool_choice="none",
        max_tokens=20,
    )
    assert second.choices[0].message.content
    assert second.choices[0].message.tool_calls is None


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": {"a": {"type": "nonsense"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"$ref": "#/$defs/none"}}, "required": ["a"]},
        {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]},
    ],
    ids=["no type", "no definition", "endless"],
)
async def test_a_schema_that_no_call_can_match_is_refused(
    client: AsyncOpenAI, schema: dict[str, Any]
) -> None:
    function: Any = {"name": "f", "parameters": schema, "strict": True}
    with pytest.raises(BadRequestError) as caught:
        await client.chat.completions.create(
            model="pair",
            messages=ASK,
            tools=[{"type": "function", "function": function}],
            tool_choice="required",
            max_tokens=9,
        )
    assert caught.value.param == "tools"


async def test_an_answer_in_a_format_may_be_calls_instead(client: AsyncOpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"sunny": {"type": "boolean"}},
        "required": ["sunny"],
        "additionalProperties": False,
    }
    format_: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    response = await client.chat.completions.create(
        model="pair",
        messages=ASK,
        tools=TOOLS,
        parallel_tool_calls=False,
        response_format=format_,
        n=4,
        max_tokens=300,
    )
    for choice in response.choices:
        if choice.message.tool_calls:
            assert choice.finish_reason == "tool_calls"
            assert_valid(choice.message.tool_calls)
        else:
            jsonschema.validate(json.loads(choice.message.content or ""), schema)


async def test_strict_tools_leave_the_model_free_to_answer(client: AsyncOpenAI) -> None:
    strict: Any = [{**one, "function": {**one["function"], "strict": True}} for one in TOOLS]
    response = await client.chat.completions.create(
        model="pair",
        messages=ASK,
        tools=strict,
        temperature=0,
        max_tokens=30,
    )
    assert response.choices[0].message.content


async def test_a_model_may_answer_where_it_need_not_call(client: AsyncOpenAI) -> None:
    response = await client.chat.completions.create(
        model="pair", messages=ASK, tools=TOOLS, temperature=0, max_tokens=30
    )
    assert response.choices[0].message.content


def test_the_shipped_pair_has_a_form_of_calls() -> None:
    form = chat_format(Tokenizer(PreTrainedTokenizerFast.from_pretrained(demo.EXPERT)))
    assert form is not None
    assert (form.family, form.call) == ("qwen_3", ("<tool_call>", "</tool_call>"))
