"""The body of `/v1/responses`, OpenAI's newer form of chats, and the chat that it stands for.

Nothing is stored: every request brings its whole conversation in `input`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from annotated_types import Ge
from pydantic import BeforeValidator, Field, JsonValue, ValidationError

from cascade.api import build_request
from cascade.api.body import Body, invalid_request, renamed, text_alone
from cascade.api.schema import (
    ChatBody,
    Effort,
    FunctionTool,
    Generated,
    JsonObjectFormat,
    JsonSchema,
    Some,
    Template,
    Text,
    TextFormat,
)
from cascade.errors import InvalidRequest

if TYPE_CHECKING:
    from cascade.api.build_request import CompletionCall
    from cascade.api.context import ServingContext

_NOT_STORED = (
    "this server stores no responses; send the earlier items of the conversation in `input`"
)

# Fields of a chat that have another name here.
_NAMES = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}

# What an item of each type must have; a message, which may leave out its type, is one of them.
_NEEDED = {
    "message": ("role", "content"),
    "function_call": ("call_id", "name", "arguments"),
    "function_call_output": ("call_id", "output"),
    "reasoning": (),
}


class Part(Body, extra="ignore"):
    """A part of an item that is text."""

    type: Annotated[
        Literal["input_text", "output_text", "text", "reasoning_text", "summary_text", "refusal"],
        BeforeValidator(text_alone),
    ]
    text: str = ""
    refusal: str = ""


class Item(Body, extra="ignore"):
    """A message, a call, its result or thoughts. Those of a response can be sent back."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    role: Literal["user", "assistant", "system", "developer"] | None = None
    content: str | list[Part] | None = None
    """Of a message, or of thoughts."""
    summary: list[Part] | None = None
    """Of thoughts; it stands for them if there is no `content`."""
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | list[Part] | None = None


class SchemaFormat(JsonSchema):
    """JSON that a schema describes."""

    type: Literal["json_schema"]


class TextConfig(Body):
    """What the text of the response is."""

    format: (
        Annotated[TextFormat | JsonObjectFormat | SchemaFormat, Field(discriminator="type")] | None
    ) = None
    verbosity: Literal["medium"] | None = None


class Reasoning(Body, extra="ignore"):
    """How the model thinks."""

    effort: Effort | None = None
    """A variable of the chat template, as `reasoning_effort` of chats."""


class ResponsesTool(FunctionTool):
    """A function that the model may call."""

    type: Literal["function"]


class ResponsesToolName(Body, extra="ignore"):
    """The function that the model must call."""

    type: Literal["function"]
    name: str


class ResponsesBody(Template, Generated):
    """The body of `/v1/responses`."""

    expected: ClassVar[dict[str, str]] = {
        "previous_response_id": _NOT_STORED,
        "conversation": _NOT_STORED,
        "prompt": "this server stores no prompts; send `instructions` and `input`",
        "background": "this server answers at once; leave it out",
        "response_format": "leave it out, and send `text.format`",
        "include": "log-probabilities come with `/v1/chat/completions`; leave it out",
        "truncation": "an input that does not fit is refused here; leave it out, or send"
        " `truncate_prompt_tokens: -1`",
    }
    input: Text | Some[list[Item]]
    """Text of the user, or the items of the conversation."""
    instructions: str | None = None
    """A system message before the input."""
    max_output_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens of thoughts and answer; what the context leaves if absent."""
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    tools: list[ResponsesTool] | None = None
    """What the model may call."""
    tool_choice: Literal["none", "auto", "required"] | ResponsesToolName | None = None
    parallel_tool_calls: bool | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - it changes the text here
    """Whether there may be several calls; true if absent."""
    background: Literal[False] | None = None
    context_management: None = None
    conversation: None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = None
    """Accepted and ignored: thoughts are not encrypted."""
    max_tool_calls: JsonValue = None
    """Accepted and ignored: it counts calls of tools that a server runs."""
    n: Literal[1] | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - a response is one answer
    previous_response_id: None = None
    prompt: None = None
    prompt_logprobs: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - responses have no place for them
    response_format: None = None  # pyright: ignore[reportIncompatibleVariableOverride] - `text.format` here
    return_token_ids: Literal[False] | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - responses have no place for them
    top_logprobs: Literal[0] | None = None
    truncation: Literal["disabled"] | None = None


# Chats have these under the same name.
_SHARED = (Generated.model_fields.keys() | Template.model_fields.keys()) - {"stream_options"}


def response_call(body: ResponsesBody, service: ServingContext) -> CompletionCall:
    """Return what a body requests.

    Raises:
        InvalidRequest: This server cannot do it; `param` names the field.
        ModelNotFound: It names a model that is not served.
    """
    fields = {name: getattr(body, name) for name in body.model_fields_set & _SHARED}
    fields |= {"messages": _messages(body), "max_completion_tokens": body.max_output_tokens}
    if body.tools:
        tools = (tool.model_dump(exclude={"type"}, exclude_none=True) for tool in body.tools)
        fields["tools"] = [{"type": "function", "function": tool} for tool in tools]
    fields["tool_choice"] = body.tool_choice
    if isinstance(body.tool_choice, ResponsesToolName):
        fields["tool_choice"] = {"type": "function", "function": {"name": body.tool_choice.name}}
    if body.text is not None and body.text.format is not None:
        given = body.text.format.model_dump(by_alias=True, exclude_none=True)
        kind = given.pop("type")
        fields["response_format"] = {"type": kind} | ({kind: given} if given else {})
    if body.reasoning is not None:
        fields["reasoning_effort"] = body.reasoning.effort
    try:
        call = build_request.chat(ChatBody.model_validate(fields), service)
    except ValidationError as error:
        raise renamed(invalid_request(error, ChatBody), _path) from None
    except InvalidRequest as error:
        raise renamed(error, _path) from error.__cause__
    return replace(call, grammar_param=_path(call.grammar_param))


def _path(name: str) -> str:
    """Return the path of a chat's field as it is here."""
    old = next((old for old in _NAMES if name.startswith(old)), "")
    return _NAMES.get(old, "") + name.removeprefix(old)


def _messages(body: ResponsesBody) -> list[dict[str, Any]]:
    """Return the conversation as a chat has it: with one message for each turn of the assistant."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for number, item in enumerate(body.input):
        for name in _NEEDED[item.type]:
            if getattr(item, name) is None:
                param = f"input[{number}].{name}"
                raise InvalidRequest(f"`{param}` is missing", param=param)
        if item.type == "function_call_output":
            content = _text(item.output)
            messages.append({"role": "tool", "tool_call_id": item.call_id, "content": content})
        elif item.type == "message" and item.role != "assistant":
            messages.append({"role": item.role, "content": _text(item.content)})
        else:
            _add(messages, item)
    return messages


def _add(messages: list[dict[str, Any]], item: Item) -> None:
    """Add what an assistant said to its message, or begin one if it cannot be part of the last."""
    name = {"message": "content", "reasoning": "reasoning_content"}.get(item.type, "tool_calls")
    last = messages[-1] if messages else {}
    order = ("reasoning_content", "content", "tool_calls")
    begun = order[order.index(name) + (name == "tool_calls") :]
    if last.get("role") != "assistant" or any(one in last for one in begun):
        messages.append(last := {"role": "assistant"})
    if item.type == "function_call":
        function = {"name": item.name, "arguments": item.arguments}
        call = {"id": item.call_id, "type": "function", "function": function}
        last.setdefault(name, []).append(call)
    else:
        last[name] = _text(item.content or item.summary)


def _text(content: str | list[Part] | None) -> str:
    if isinstance(content, str):
        return content
    return "\n".join(part.refusal or part.text for part in content or ())
