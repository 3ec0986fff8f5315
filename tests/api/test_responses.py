"""`/v1/responses`, read by OpenAI's client with strict types."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from openai import BadRequestError
from openai.lib.responses_tool_runner import AsyncRegisteredFunction, AsyncResponsesToolRunner
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseReasoningItem,
)
from tests.api.test_tools import ARGUMENTS, CALL, WEATHER, writing

from cascade.errors import ExpertUnavailable
from cascade.types import GrammarKind

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2
    from openai import AsyncOpenAI
    from tests.support.scripted_generator import ScriptedGenerator

    from cascade.api.context import ServingContext
    from cascade.engine.tokenizer import Tokenizer
    from cascade.types import Request

Writer: TypeAlias = "tuple[AsyncOpenAI, ScriptedGenerator, Tokenizer]"

TOOL: Any = {"type": "function", "strict": False, **WEATHER["function"]}
SEED: Any = {"extra_body": {"seed": 7}}


@pytest.fixture
def writer(connect: Callable[..., AsyncOpenAI], service: ServingContext) -> Callable[..., Writer]:
    """Return a client of a model that always writes a given text, its generator and tokenizer."""

    def client(text: str, **more: Any) -> Writer:
        changes = writing(service, text, **more)
        return connect(**changes), changes["generator"], changes["tokenizer"]

    return client


async def test_a_response_says_what_a_chat_says(client: AsyncOpenAI) -> None:
    chat = await client.chat.completions.create(
        model="pair", messages=[{"role": "user", "content": "hi"}], seed=7
    )
    response = await client.responses.create(model="pair", input="hi", **SEED)
    assert response.output_text == chat.choices[0].message.content
    assert (response.status, response.incomplete_details) == ("completed", None)
    assert response.usage is not None
    assert chat.usage is not None
    assert response.usage.total_tokens == chat.usage.total_tokens
    assert response.usage.model_extra == {"cascade": chat.usage.model_extra["cascade"]}  # pyright: ignore[reportOptionalSubscript] - our extension is there
    assert response.model_extra is not None
    assert len(response.model_extra["cascade"]["origins"]) == response.usage.output_tokens


async def test_an_answer_that_was_cut_off_says_so(client: AsyncOpenAI) -> None:
    response = await client.responses.create(model="pair", input="hi", max_output_tokens=2)
    assert response.status == "incomplete"
    assert response.incomplete_details is not None
    assert response.incomplete_details.reason == "max_output_tokens"
    (message,) = response.output
    assert isinstance(message, ResponseOutputMessage)
    assert message.status == "incomplete"


async def test_events_of_a_text_come_in_openais_order(client: AsyncOpenAI) -> None:
    stream = await client.responses.create(model="pair", input="hi", stream=True, **SEED)
    events: list[Any] = [event async for event in stream]
    kinds = [event.type for event in events]
    deltas = kinds.count("response.output_text.delta")
    assert deltas > 2
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        *["response.output_text.delta"] * deltas,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == [*range(len(events))]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    whole = await client.responses.create(model="pair", input="hi", **SEED)
    assert text == events[-1].response.output_text == whole.output_text
    assert events[2].item.content == []
    assert events[0].response.output == []


@pytest.mark.parametrize("blocks", [(1,), (3, 1, 4, 2), (500,)])
async def test_a_stream_adds_up_to_the_plain_response(writer: Any, blocks: tuple[int, ...]) -> None:
    """Thoughts, text and two calls, with the accumulator of OpenAI's client."""
    client, generator, _ = writer(f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}\n{CALL}")
    generator.blocks = blocks
    asked: Any = {"model": "pair", "input": "How is the weather?", "tools": [TOOL]}
    plain = await client.responses.create(**asked)
    async with client.responses.stream(**asked) as stream:
        kinds = [event.type async for event in stream]
        final = await stream.get_final_response()
    assert [item.type for item in plain.output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert kinds.count("response.output_item.done") == 4
    for response in (plain, final):
        thoughts, message, first, second = response.output
        assert isinstance(thoughts, ResponseReasoningItem)
        assert thoughts.content is not None
        assert thoughts.content[0].text == "Hm."
        assert isinstance(message, ResponseOutputMessage)
        assert response.output_text == "Let me look."
        for call in (first, second):
            assert isinstance(call, ResponseFunctionToolCall)
            assert (call.name, json.loads(call.arguments)) == ("get_weather", ARGUMENTS)
        assert first.call_id != second.call_id
    assert plain.usage == final.usage


async def test_thoughts_are_counted(writer: Any) -> None:
    """From the token that completes their beginning to the end of what ends them."""
    client, _, tokenizer = writer("<think>\nHm.\n</think>\n\nYes.")
    response = await client.responses.create(model="pair", input="?")
    chat = await client.chat.completions.create(
        model="pair", messages=[{"role": "user", "content": "?"}]
    )
    counted = response.usage.output_tokens_details.reasoning_tokens
    assert counted == chat.usage.completion_tokens_details.reasoning_tokens
    assert counted == 1 + len(tokenizer.encode("\nHm.\n</think>"))


async def test_a_response_can_be_sent_back(writer: Any) -> None:
    """The model sees what a chat with the same turns would show it."""
    client, generator, _ = writer(f"<think>\nHm.\n</think>\n\nLet me look.\n{CALL}\n{CALL}")
    first: Response = await client.responses.create(
        model="pair", input="How is the weather?", tools=[TOOL]
    )
    sent = [item.model_dump(exclude_none=True) for item in first.output]
    calls = [item for item in first.output if isinstance(item, ResponseFunctionToolCall)]
    results = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "12 degrees"}
        for call in calls
    ]
    asked: Any = {"role": "user", "content": "How is the weather?"}
    await client.responses.create(
        model="pair",
        instructions="Be brief.",
        input=[asked, *sent, *results, {"role": "user", "content": "And?"}],
        tools=[TOOL],
    )
    chat: list[Any] = [
        {"role": "system", "content": "Be brief."},
        asked,
        {
            "role": "assistant",
            "reasoning_content": "Hm.",
            "content": "Let me look.",
            "tool_calls": [
                {
                    "id": call.call_id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ],
        },
        *({"role": "tool", "tool_call_id": one.call_id, "content": "12 degrees"} for one in calls),
        {"role": "user", "content": "And?"},
    ]
    tool = {"type": "function", "function": {**WEATHER["function"], "strict": False}}
    await client.chat.completions.create(model="pair", messages=chat, tools=[tool])
    by_response, by_chat = generator.requests[-2:]
    assert by_response.prompt == by_chat.prompt


@pytest.mark.parametrize("streams", [False, True])
async def test_openais_tool_runner_calls_and_ends_with_the_answer(
    writer: Any, *, streams: bool
) -> None:
    """With a model that calls until it sees a result."""
    client, generator, tokenizer = writer(CALL)
    asked = tokenizer.encode(CALL)

    def script(request: Request) -> list[int]:
        shown = tokenizer.decode(request.prompt, skip_special=False)
        text = tokenizer.encode("Mild.") if "12 degrees" in shown else asked
        return [*text, *tokenizer.stop_ids]

    async def execute(arguments: dict[str, object]) -> str:
        assert arguments == ARGUMENTS
        return "12 degrees"

    generator.script = script
    runner = AsyncResponsesToolRunner(functions=[AsyncRegisteredFunction(TOOL, execute)])
    response = await runner.run(client, {"model": "pair", "input": "?"}, stream=streams)
    assert response.output_text == "Mild."
    assert len(generator.requests) == 2


async def test_two_turns_of_an_assistant_are_two_messages(writer: Any) -> None:
    client, generator, tokenizer = writer("Yes.")
    turns = [
        {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm."}]},
        {"type": "function_call", "call_id": "a", "name": "get_weather", "arguments": "{}"},
        {"type": "reasoning", "id": "rs_2", "summary": []},
        {"role": "assistant", "content": [{"type": "output_text", "text": "Sunny."}]},
    ]
    asked = {"role": "user", "content": [{"type": "input_text", "text": "?"}]}
    await client.responses.create(model="pair", input=[asked, *turns, asked])
    shown = tokenizer.decode(generator.requests[-1].prompt, skip_special=False)
    assert shown.count("<|user|>assistant: ") == 2


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"type": "json_object"}, {"type": "json_object"}),
        (
            {"type": "json_schema", "name": "n", "schema": {"type": "object"}, "strict": True},
            {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}},
        ),
    ],
)
async def test_a_text_format_is_the_response_format_of_a_chat(
    client: AsyncOpenAI, generator: ScriptedGenerator, given: Any, wanted: Any
) -> None:
    response = await client.responses.create(model="pair", input="hi", text={"format": given})
    asked: Any = [{"role": "user", "content": "hi"}]
    await client.chat.completions.create(model="pair", messages=asked, response_format=wanted)
    mine, chats = (request.policy.grammar for request in generator.requests)
    assert mine == chats
    assert mine is not None
    assert response.text is not None
    assert response.text.format is not None
    assert response.text.format.type == given["type"]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
async def test_a_tool_that_must_be_called_has_a_grammar(writer: Any, choice: Any) -> None:
    client, generator, _ = writer(CALL)
    response = await client.responses.create(
        model="pair", input="?", tools=[TOOL], tool_choice=choice, parallel_tool_calls=False
    )
    grammar = generator.requests[0].policy.grammar
    assert grammar.kind is GrammarKind.STRUCTURAL_TAG
    assert not response.parallel_tool_calls
    (call,) = response.output
    assert call.name == "get_weather"


async def test_the_fields_of_chats_that_steer_decoding_are_taken(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    extra = {
        "seed": 3,
        "top_k": 4,
        "stop": ["x"],
        "cascade": {"rule": {"kind": "chow", "alpha": 0.5}},
    }
    response = await client.responses.create(
        model="pair", input="hi", temperature=0.5, top_p=0.9, extra_body=extra
    )
    policy = generator.requests[0].policy
    sampling = policy.sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 4)
    assert (policy.seed, policy.rule.kind) == (3, "chow")
    assert (response.temperature, response.top_p) == (0.5, 0.9)


async def test_effort_reaches_the_template(writer: Any) -> None:
    client, generator, _ = writer("Yes.")
    await client.responses.create(model="pair", input="?", reasoning={"effort": "low"})
    await client.chat.completions.create(
        model="pair", messages=[{"role": "user", "content": "?"}], reasoning_effort="low"
    )
    one, other = generator.requests
    assert one.prompt == other.prompt


async def test_what_cannot_change_the_text_is_taken_and_ignored(client: AsyncOpenAI) -> None:
    """What clients and agent frameworks send without being asked."""
    response = await client.responses.create(
        model="pair",
        input=[{"type": "message", "role": "user", "content": "hi", "phase": "commentary"}],
        include=["reasoning.encrypted_content"],
        store=True,
        metadata={"a": "b"},
        user="me",
        service_tier="auto",
        prompt_cache_key="key",
        safety_identifier="me",
        truncation="disabled",
        max_tool_calls=3,
        stream_options=None,
        reasoning={"summary": "auto"},
        extra_body={"previous_response_id": None, "background": False, "prompt": None},
    )
    assert response.metadata == {"a": "b"}
    assert response.model_extra is not None
    assert response.model_extra["store"] is False


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id", "stores no responses"),
        ({"conversation": "conv_1"}, "conversation", "stores no responses"),
        ({"prompt": {"id": "p"}}, "prompt", "`instructions` and `input`"),
        ({"background": True}, "background", "leave it out"),
        ({"truncation": "auto"}, "truncation", "truncate_prompt_tokens"),
        ({"include": ["message.output_text.logprobs"]}, "include", "/v1/chat/completions"),
        ({"n": 2}, "n", "must be 1"),
        ({"messages": []}, "messages", "unknown"),
        ({"top_pp": 1}, "top_pp", "`top_p`"),
        ({"max_output_tokens": 0}, "max_output_tokens", "greater than or equal to 1"),
        ({"max_output_tokens": 9999}, "max_output_tokens", "context"),
        ({"input": "Buzz " * 600}, "input", "Reduce the length of the `input`"),
        ({"input": []}, "input", "at least 1"),
        ({"input": ""}, "input", "at least 1"),
        ({"input": [{"role": "user"}]}, "input[0].content", "is missing"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id", "is missing"),
        (
            {"input": [{"type": "item_reference", "id": "x"}]},
            "input[0].type",
            "wanted one of message",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0].type",
            "'input_image' is no text, and this server gives models text alone",
        ),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type", "'function'"),
        ({"tools": [TOOL]}, "tools", "shows no tools"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.schema", "is missing"),
        ({"model": "other"}, "model", "this server has"),
        ({"reasoning": {"effort": "huge"}}, "reasoning.effort", "high"),
    ],
)
async def test_what_cannot_be_done_is_refused_by_its_name(
    http: httpx2.AsyncClient, fields: dict[str, Any], param: str, says: str
) -> None:
    refused = await http.post("/v1/responses", json={"input": "hi"} | fields)
    error = refused.json()["error"]
    assert refused.status_code in {400, 404}
    assert error["param"] == param
    assert says in error["message"]


async def test_a_schema_that_cannot_be_used_is_named_as_it_was_sent(
    connect: Callable[..., AsyncOpenAI], service: ServingContext
) -> None:
    limits = replace(service.limits, grammar_characters=10)
    format_: Any = {"type": "json_schema", "name": "n", "schema": {"type": "object", "a": "bcdef"}}
    with pytest.raises(BadRequestError) as caught:
        await connect(limits=limits).responses.create(
            model="pair", input="hi", text={"format": format_}
        )
    assert caught.value.param == "text.format.schema"


async def test_a_stream_that_fails_ends_with_the_failure(
    client: AsyncOpenAI, generator: ScriptedGenerator
) -> None:
    async def pause(request: Request, position: int) -> None:
        del request
        if position > 3:
            raise ExpertUnavailable("no expert")

    generator.pause = pause
    stream = await client.responses.create(model="pair", input="hi", stream=True)
    events: list[Any] = [event async for event in stream]
    assert events[-1].type == "response.failed"
    assert events[-1].response.status == "failed"
    assert events[-1].response.error.message == "no expert"
    assert events[-1].response.error.code == "server_error"


async def test_an_answer_without_text_has_an_empty_message(writer: Any) -> None:
    client, *_ = writer("")
    response = await client.responses.create(model="pair", input="?")
    assert response.output_text == ""
    assert [item.type for item in response.output] == ["message"]
