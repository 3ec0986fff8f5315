"""Tools and thoughts over OpenAI's client, with a model that writes what the test says."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import xgrammar as xgr
from openai import BadRequestError
from tests.api.test_grpc import served
from tests.support.scripted_generator import ScriptedGenerator
from transformers import PreTrainedTokenizerFast

from cascade.api import grpc_convert
from cascade.api.chat_format import chat_format
from cascade.api.grpc import GenerationServicer
from cascade.engine.tokenizer import Tokenizer
from cascade.errors import InvalidRequest, UnsupportedModel
from cascade.rules import Chow, Lossless
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import Mode, Phase
from cascade.v1 import cascade_pb2 as pb
from cascade.v1 import cascade_pb2_grpc as rpc
from cascade.v1 import tokens_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2
    from openai import AsyncOpenAI

    from cascade.api.context import ServingContext
    from cascade.types import Request

TEMPLATE = """\
{%- if tools %}<tools>{{ tools | tojson }}</tools> Answer with <tool_call>.{% endif -%}
{%- for message in messages -%}
{%- if loop.last and message.role == "assistant" -%}
<|assistant|>{{ message.content }}
{%- else -%}
<|user|>{{ message.role }}: {{ message.content }}
{%- for call in message.tool_calls or [] -%}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor -%}
<|end|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<|assistant|>
{%- if enable_thinking is defined and enable_thinking %}<think>
{% elif enable_thinking is defined %}<think>

</think>

{% endif %}
{%- if reasoning_effort %}{{ reasoning_effort }} {% endif -%}
{%- endif -%}
"""

WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}

CALL = (
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris \\"}", "days": 2}}\n'
    "</tool_call>"
)
ARGUMENTS = {"city": 'Paris "}', "days": 2}
ASK: Any = [{"role": "user", "content": "How is the weather?"}]


def writing(service: ServingContext, text: str, *, template: str = TEMPLATE, **more: Any) -> Any:
    """Return the fields of a service whose model calls tools and always writes a text."""
    known = service.tokenizer
    fast = PreTrainedTokenizerFast(
        tokenizer_object=known._tokenizer.backend_tokenizer,  # pyright: ignore[reportPrivateUsage] - the toy tokenizer itself
        eos_token=known.tokens[known.stop_ids[0]],
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        chat_template=template,
        **more,
    )
    mine = Tokenizer(fast)

    def script(request: Request) -> list[int]:
        del request
        return [*mine.encode(text), *mine.stop_ids]

    generator = ScriptedGenerator(script=script)
    limits = replace(service.limits, context_tokens=2048)
    return {"tokenizer": mine, "generator": generator, "limits": limits}


@pytest.fixture
def caller(
    connect: Callable[..., AsyncOpenAI], service: ServingContext
) -> Callable[..., AsyncOpenAI]:
    """Return a client of a model that calls tools and always writes a given text."""

    def client(text: str, **more: Any) -> AsyncOpenAI:
        return connect(strict=False, **writing(service, text, **more))

    return client


async def chat(client: AsyncOpenAI, **fields: Any) -> Any:
    return await client.chat.completions.create(model="pair", messages=ASK, **fields)


async def test_a_call_comes_with_its_name_and_arguments(caller: Any) -> None:
    response = await chat(caller(f"Let me look. \n{CALL}"), tools=[WEATHER])
    (choice,) = response.choices
    (call,) = choice.message.tool_calls
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "Let me look."
    assert (call.type, call.function.name) == ("function", "get_weather")
    assert json.loads(call.function.arguments) == ARGUMENTS
    assert call.id


async def test_streamed_calls_add_up_to_those_of_the_plain_answer(caller: Any) -> None:
    """With the accumulator of OpenAI's own client."""
    client = caller(f"{CALL}\n{CALL.replace('Paris', 'Rome')}")
    plain = await chat(client, tools=[WEATHER])
    manager = client.chat.completions.stream(model="pair", messages=ASK, tools=[WEATHER])
    async with manager as stream:
        kinds = [event.type async for event in stream]
        streamed = await stream.get_final_completion()
    both = [
        [(one.function.name, one.function.arguments) for one in of.choices[0].message.tool_calls]
        for of in (plain, streamed)
    ]
    assert both[0] == both[1]
    assert len(both[0]) == 2
    assert streamed.choices[0].finish_reason == "tool_calls"
    assert kinds.count("tool_calls.function.arguments.done") == 2
    assert kinds.count("tool_calls.function.arguments.delta") > 4


async def test_only_the_first_delta_of_a_call_has_its_name(caller: Any) -> None:
    deltas = [
        call
        async for chunk in await chat(caller(CALL), tools=[WEATHER], stream=True)
        for choice in chunk.choices
        for call in choice.delta.tool_calls or ()
    ]
    assert [call.index for call in deltas] == [0] * len(deltas)
    assert [bool(call.id and call.function.name) for call in deltas] == [
        True,
        *[False] * (len(deltas) - 1),
    ]
    assert json.loads("".join(call.function.arguments for call in deltas)) == ARGUMENTS


async def test_without_parallel_calls_there_is_one(caller: Any) -> None:
    response = await chat(caller(CALL + "\n" + CALL), tools=[WEATHER], parallel_tool_calls=False)
    assert len(response.choices[0].message.tool_calls) == 1


@pytest.mark.parametrize("fields", [{}, {"tools": [WEATHER], "tool_choice": "none"}, {"tools": []}])
async def test_where_nothing_may_be_called_a_call_is_text(caller: Any, fields: Any) -> None:
    response = await chat(caller(CALL), **fields)
    (choice,) = response.choices
    assert choice.message.content == CALL
    assert choice.message.tool_calls is None
    assert choice.finish_reason == "stop"


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>\nnot JSON\n</tool_call> and more",
        '<tool_call>\n{"no": "name"}\n</tool_call>',
        '<tool_call>\n{"name": "get_wea',
        "[1] <tool_cal",
    ],
)
async def test_what_is_no_call_stays_text(caller: Any, text: str) -> None:
    response = await chat(caller(text), tools=[WEATHER])
    (choice,) = response.choices
    assert choice.message.content == text
    assert choice.finish_reason == "stop"


async def test_a_call_that_is_cut_off_is_shown_as_far_as_it_goes(caller: Any) -> None:
    client = caller(CALL.replace("Paris", "Paris" * 99))
    response = await chat(client, tools=[WEATHER], max_tokens=150)
    (choice,) = response.choices
    assert choice.finish_reason == "length"
    function = choice.message.tool_calls[0].function
    assert function.name == "get_weather"
    assert function.arguments.startswith('{"city": "ParisParis')


async def test_arguments_in_markup_get_the_types_of_the_schema(caller: Any) -> None:
    """The format of Qwen 3.5."""
    text = (
        "<tool_call>\n<function=get_weather>\n<parameter=city>\nParis\n</parameter>\n"
        "<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>"
    )
    template = TEMPLATE.replace("with <tool_call>", "with <tool_call><function=")
    response = await chat(caller(text, template=template), tools=[WEATHER])
    (call,) = response.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 2}


async def test_a_response_template_of_the_checkpoint_comes_first(caller: Any) -> None:
    form = {
        "start_anchor": "<|assistant|>",
        "fields": {
            "reasoning_content": {"open": "((", "close": "))"},
            "tool_calls": {
                "open_pattern": r"CALL (?P<name>\w+)",
                "close": "END",
                "repeats": True,
                "content": "json",
                "transform": {
                    "type": "function",
                    "function": {"name": "{name}", "arguments": "{content}"},
                },
            },
            "content": {},
        },
    }
    client = caller('((hm)) ok CALL get_weather {"city": "Rome"} END', response_template=form)
    response = await chat(client, tools=[WEATHER])
    message = response.choices[0].message
    assert (message.reasoning_content, message.content) == ("hm", "ok ")
    assert json.loads(message.tool_calls[0].function.arguments) == {"city": "Rome"}


def test_a_response_template_that_is_wrong_stops_the_server(service: ServingContext) -> None:
    form = {"start_anchor": "<|assistant|>", "fields": {"content": {"contents": "text"}}}
    with pytest.raises(UnsupportedModel, match=r"`response_template` is invalid.*contents"):
        chat_format(writing(service, "", response_template=form)["tokenizer"])


async def test_functions_are_tools_in_the_old_form(caller: Any) -> None:
    client = caller(CALL)
    fields: Any = {"functions": [WEATHER["function"]]}
    response = await chat(client, **fields)
    (choice,) = response.choices
    assert choice.finish_reason == "function_call"
    assert choice.message.function_call.name == "get_weather"
    assert json.loads(choice.message.function_call.arguments) == ARGUMENTS
    deltas = [
        chunk.choices[0].delta.function_call
        async for chunk in await chat(client, stream=True, **fields)
        if chunk.choices[0].delta.function_call
    ]
    assert json.loads("".join(one.arguments for one in deltas)) == ARGUMENTS


@pytest.mark.parametrize(
    ("text", "variables"),
    [
        ("<think>\nhm, why?\n</think>\n\nBecause.", {}),
        ("hm, why?\n</think>\n\nBecause.", {"enable_thinking": True}),
    ],
)
async def test_thoughts_are_not_content(caller: Any, text: str, variables: Any) -> None:
    """Whether the model begins them, or its template does."""
    client, extra = caller(text), {"chat_template_kwargs": variables}
    message = (await chat(client, extra_body=extra)).choices[0].message
    assert (message.reasoning_content, message.content) == ("hm, why?", "Because.")
    assert message.reasoning == message.reasoning_content
    deltas = [
        chunk.choices[0].delta
        async for chunk in await chat(client, stream=True, extra_body=extra)
        if chunk.choices
    ]
    thoughts = [getattr(one, "reasoning_content", None) or "" for one in deltas]
    assert "".join(thoughts) == "hm, why?"
    assert "".join(one.content or "" for one in deltas) == "Because."


@pytest.mark.parametrize(
    ("asked", "text"),
    [
        ({"response_format": {"type": "json_object"}}, '{"a": 1}'),
        ({"structured_outputs": {"json": {"type": "integer"}}}, "12"),
        ({"structured_outputs": {"regex": "[ab]{3}"}}, "aba"),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "no"),
    ],
)
@pytest.mark.parametrize("begun", [False, True])
async def test_a_model_may_think_before_it_answers_in_a_form(
    caller: Any, asked: dict[str, Any], text: str, *, begun: bool
) -> None:
    """The grammar has thoughts before the answer, which must end if they are begun."""
    client = caller("x")
    variables = {"chat_template_kwargs": {"enable_thinking": True}} if begun else {}
    await chat(client, extra_body=asked | variables)
    matches = matcher_of(client)
    begin = "" if begun else "<think>"
    assert matches(f"{begin}hm, [] why?</think>\n\n{text}")
    assert not matches(f"{begin}hm</think> so {text}")
    assert matches(text) is not begun


def matcher_of(client: Any) -> Callable[[str], bool]:
    """Return what says whether an answer matches the grammar of the client's one request."""
    service = client._client._transport.app.state.service
    (request,) = service.generator.requests
    tokens = TokenTexts.of(service.tokenizer, service.tokenizer.size)
    compiled = GrammarCompiler(tokens).compile(request.policy.grammar)

    def matches(answer: str) -> bool:
        matcher = xgr.GrammarMatcher(compiled, terminate_without_stop_token=True)
        return matcher.accept_string(answer) and matcher.is_completed()

    return matches


JSON_OR_CALL = {
    '{"sunny": true}': True,
    '{"sunny": 1}': False,
    CALL: True,
    f"{CALL}\n{CALL}": True,
    CALL.replace('"city"', '"town"'): False,
    f'{CALL}{{"sunny": true}}': False,
    "It is sunny.": False,
}


@pytest.mark.parametrize("thinks", [True, False])
@pytest.mark.parametrize("strict", [None, True])
async def test_an_answer_in_a_format_may_be_calls_instead(
    caller: Any, *, strict: bool | None, thinks: bool
) -> None:
    """Frameworks send tools, and the schema of the last answer, in every turn of an agent."""
    template = TEMPLATE if thinks else TEMPLATE.replace("</think>", "").replace("<think>", "")
    client = caller(CALL, template=template)
    schema = {"type": "object", "properties": {"sunny": {"type": "boolean"}}, "required": ["sunny"]}
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": strict}}
    response = await chat(
        client,
        tools=[tool],
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema}},
    )
    assert response.choices[0].finish_reason == "tool_calls"
    matches = matcher_of(client)
    for thoughts in ("", "<think>hm</think>\n\n") if thinks else ("",):
        assert {text: matches(thoughts + text) for text in JSON_OR_CALL} == JSON_OR_CALL


async def test_a_format_means_nothing_where_a_tool_must_be_called(caller: Any) -> None:
    """Instructor sends both; OpenAI's models call the tool."""
    client = caller(CALL)
    response = await chat(
        client, tools=[WEATHER], tool_choice="required", response_format={"type": "json_object"}
    )
    assert response.choices[0].message.tool_calls
    matches = matcher_of(client)
    assert matches(CALL)
    assert not matches("{}")


async def test_a_grammar_and_a_tool_that_must_be_called_exclude_each_other(caller: Any) -> None:
    with pytest.raises(BadRequestError, match="cannot hold at once") as caught:
        await chat(
            caller(CALL),
            tools=[WEATHER],
            tool_choice="required",
            extra_body={"structured_outputs": {"regex": "a"}},
        )
    assert caught.value.param == "structured_outputs.regex"


async def test_thoughts_that_the_template_ends_are_not_awaited(caller: Any) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    message = (await chat(caller("Because."), extra_body=extra)).choices[0].message
    assert message.content == "Because."
    assert not hasattr(message, "reasoning_content")


async def test_an_answer_that_is_continued_shows_only_what_is_new(caller: Any) -> None:
    """The white space that the given part ends in is not shown again."""
    client = caller(f"Paris. {CALL}")
    message: Any = {"role": "assistant", "content": "It is in "}
    response = await client.chat.completions.create(
        model="pair",
        messages=[*ASK, message],
        tools=[WEATHER],
        extra_body={"continue_final_message": True, "add_generation_prompt": False},
    )
    assert response.choices[0].message.content == "Paris."


async def test_the_template_gets_tools_history_and_effort(caller: Any) -> None:
    client = caller("ok")
    call = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    response = await client.chat.completions.create(
        model="pair",
        messages=[
            *ASK,
            {"role": "assistant", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "call_1", "content": "sunny"},
        ],
        tools=[WEATHER],
        reasoning_effort="low",
        extra_body={"return_token_ids": True},
    )
    tokenizer = client._client._transport.app.state.service.tokenizer
    prompt = tokenizer.decode(response.prompt_token_ids, skip_special=False)
    assert '"name": "get_weather"' in prompt
    assert "user: sunny" in prompt or "tool: sunny" in prompt
    assert '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' in prompt
    assert prompt.endswith("low ")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tool_choice": "required"}, "`tool_choice` needs `tools`"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "names `g`, but `tools` has get_weather",
        ),
        ({"tools": [WEATHER, WEATHER]}, "two functions `get_weather`"),
        ({"tools": [WEATHER], "functions": [WEATHER["function"]]}, "send `tools`"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            r"tools\[0\].function.name",
        ),
        ({"tools": [{"type": "search"}]}, "'function'"),
    ],
)
async def test_a_wrong_choice_is_explained(caller: Any, fields: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        await chat(caller("x"), **fields)


async def test_a_model_without_tools_refuses_them(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match="shows no tools"):
        await chat(client, tools=[WEATHER])


@pytest.mark.parametrize("marker", ["[TOOL_CALLS]", "<|python_tag|>", "<|channel|>commentary"])
async def test_another_form_of_calls_is_used_once_a_response_template_says_it(
    caller: Any, marker: str
) -> None:
    """Mistral's, Llama's, Harmony's: until then the refusal says what to do."""
    template = TEMPLATE.replace("<tool_call>", marker).replace("</tool_call>", "")
    with pytest.raises(BadRequestError, match="add one to the tokenizer of the expert") as caught:
        await chat(caller("x", template=template), tools=[WEATHER])
    assert caught.value.param == "tools"
    response_template = {
        "defaults": {"role": "assistant"},
        "start_anchor": "<|assistant|>",
        "fields": {
            "tool_calls": {
                "open": marker,
                "close": "\n",
                "content": "json",
                "transform": {"type": "function", "function": "{content}"},
            },
            "content": {"content": "text"},
        },
    }
    written = marker + '{"name": "get_weather", "arguments": {"city": "Rome"}}\n'
    client = caller(written, template=template, response_template=response_template)
    response = await chat(client, tools=[WEATHER])
    (call,) = response.choices[0].message.tool_calls
    assert json.loads(call.function.arguments) == {"city": "Rome"}


async def test_tools_are_tokenized_as_the_model_sees_them(
    raw: Callable[..., httpx2.AsyncClient], service: ServingContext
) -> None:
    """Over HTTP and gRPC."""
    fields = writing(service, "x")
    http = raw(**fields)
    asked = {"messages": ASK, "tools": [WEATHER]}
    await http.post("/v1/chat/completions", json=asked | {"max_tokens": 1})
    tokenized = (await http.post("/tokenize", json=asked)).json()
    (request,) = fields["generator"].requests
    assert tuple(tokenized["tokens"]) == request.prompt
    function = WEATHER["function"]
    tool = pb.Tool(name=function["name"], parameters=json.dumps(function["parameters"]))
    message = pb.ChatMessage(role="user", content=ASK[0]["content"])
    request = pb.TokenizeRequest(chat=pb.Chat(messages=[message], tools=[tool]))
    found = grpc_convert.tokenize(request, replace(service, **fields))
    assert list(found.token_ids) == tokenized["tokens"]
    refused = await raw().post("/tokenize", json=asked)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tools")


async def test_grpc_says_the_same_of_tools_and_thoughts(service: ServingContext) -> None:
    """Tools, choice, history, effort and budget go in; thoughts, text and calls come out."""
    fields = writing(service, f"<think>\nhm\n</think>\n\nSo: {CALL}")
    function = WEATHER["function"]
    tools = [pb.Tool(name=function["name"], parameters=json.dumps(function["parameters"]))]
    history = pb.ToolCall(id="call_1", name="f", arguments='{"a": 1}')
    chat = pb.Chat(
        messages=[
            pb.ChatMessage(role="user", content="How is the weather?"),
            pb.ChatMessage(role="assistant", tool_calls=[history]),
            pb.ChatMessage(role="tool", content="sunny", tool_call_id="call_1"),
        ],
        tools=tools,
        tool_choice=pb.TOOL_CHOICE_AUTO,
        reasoning_effort="low",
        thinking_token_budget=9,
    )
    phases = pb.Phases(tool=tokens_pb2.Rule(lossless=tokens_pb2.Lossless()))
    chow = tokens_pb2.Rule(chow=tokens_pb2.Chow(alpha=0.5))
    generation = pb.Generation(chat=chat, rule=chow, phases=phases)
    context = replace(service, **fields)
    async with served(GenerationServicer(lambda: context)) as channel:
        stub = rpc.GenerationServiceStub(channel)
        response = await stub.Generate(pb.GenerateRequest(generation=generation))
        streamed = [
            choice
            async for part in stub.GenerateStream(pb.GenerateStreamRequest(generation=generation))
            for choice in part.choices
        ]
    (choice,) = response.choices
    assert (choice.reasoning, choice.text) == ("hm", "So:")
    thoughts = fields["tokenizer"].encode("\nhm\n</think>")
    assert response.usage.reasoning_token_count == 1 + len(thoughts)
    assert choice.finish_reason == pb.FINISH_REASON_TOOL_CALLS
    (call,) = choice.tool_calls
    assert (call.name, json.loads(call.arguments)) == ("get_weather", ARGUMENTS)
    parts = [one for each in streamed for one in each.tool_calls]
    assert json.loads("".join(one.arguments for one in parts)) == ARGUMENTS
    assert "".join(each.reasoning for each in streamed) == "hm"
    request = fields["generator"].requests[0]
    prompt = fields["tokenizer"].decode(request.prompt, skip_special=False)
    assert '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>' in prompt
    assert prompt.endswith("low ")
    found = request.policy.phases
    assert (found.thinking_tokens, found.rules) == (9, ((Phase.TOOL, Lossless()),))
    assert len(found.switches) == 4


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"tools": [pb.Tool(name="f", parameters="{")]},
            r"`chat.tools\[0\].parameters` is no JSON",
        ),
        ({"tool_choice": pb.TOOL_CHOICE_REQUIRED}, "`chat.tool_choice` needs `chat.tools`"),
        (
            {"tool_choice": pb.TOOL_CHOICE_AUTO, "function_name": "f"},
            "`function_name` is `f`, and `chat.tool_choice` is set too",
        ),
    ],
)
def test_grpc_explains_a_wrong_choice(
    service: ServingContext, fields: dict[str, Any], message: str
) -> None:
    context = replace(service, **writing(service, "x"))
    hello = pb.ChatMessage(role="user", content="hi")
    with pytest.raises(InvalidRequest, match=message):
        grpc_convert.call(pb.Generation(chat=pb.Chat(messages=[hello], **fields)), context)


async def test_phases_and_budget_reach_the_tiers(caller: Any) -> None:
    """In tokens: where a phase begins, what ends it, its rule."""
    client = caller("x")
    extra = {
        "thinking_budget": 5,
        "cascade": {"phases": {"thinking": {"kind": "chow", "alpha": 0.3}}},
        "chat_template_kwargs": {"enable_thinking": True},
    }
    await chat(client, extra_body=extra)
    service = client._client._transport.app.state.service
    (request,) = service.generator.requests
    phases = request.policy.phases
    assert request.mode is Mode.CASCADE
    assert phases.start is Phase.THINKING
    assert phases.rules == ((Phase.THINKING, Chow(alpha=0.3)),)
    ends = [one.tokens for one in phases.switches if one.phase is Phase.THINKING]
    assert [service.tokenizer.decode(one) for one in ends] == ["</think>"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"thinking_budget": 1, "thinking_token_budget": 2}, "send one"),
        ({"thinking_token_budget": -1}, "thinking_token_budget"),
        ({"cascade": {"phases": {"tool": {"kind": "lossless"}}, "bonus": "target"}}, "bonus"),
        (
            {"cascade": {"phases": {"tool": {"kind": "lossless"}}, "mode": "drafter_only"}},
            "needs mode `cascade`",
        ),
        ({"cascade": {"phases": {"toll": {"kind": "lossless"}}}}, "thinking, answer"),
    ],
)
async def test_phases_that_cannot_be_are_explained(caller: Any, fields: Any, message: str) -> None:
    with pytest.raises(BadRequestError, match=message):
        await chat(caller("x"), extra_body=fields)


async def test_a_model_without_thoughts_has_no_budget(client: AsyncOpenAI) -> None:
    with pytest.raises(BadRequestError, match="how this model marks its `thinking` phase"):
        await chat(client, extra_body={"thinking_token_budget": 3})
