"""Turns prompts and conversations into token ids."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from cascade.api.schema import CompletionBody, Message, plain
from cascade.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from cascade.api.context import ServingContext


def prompts(body: CompletionBody, service: ServingContext) -> list[tuple[int, ...]]:
    """Return the prompts of a text completion, each with at least one token.

    Raises:
        InvalidRequest: There are too many, one is too long, or a token id does not exist.
    """
    prompt = body.prompt
    listed: Sequence[str | Sequence[int]]
    if isinstance(prompt, str):
        listed = [prompt]
    else:
        ids = [item for item in prompt if isinstance(item, int)]
        listed = [ids] if ids else [item for item in prompt if not isinstance(item, int)]
    check_at_most(len(listed), service.limits.prompts, "prompt", "prompts")
    return [_tokenize(one, service) for one in listed]


def conversation(messages: Sequence[Message], service: ServingContext) -> tuple[int, ...]:
    """Return a conversation in the model's chat template.

    Raises:
        InvalidRequest: A message is empty, or the template rejects the conversation.
    """
    rendered = [_template_message(message, number) for number, message in enumerate(messages)]
    with _naming("messages"):
        limit = max_prompt_tokens(service)
        return _nonempty(service.tokenizer.chat(rendered, limit=limit), "messages")


def max_prompt_tokens(service: ServingContext) -> int:
    """Return how many tokens a prompt may have."""
    limits = service.limits
    return min(limits.prompt_tokens or limits.context_tokens, limits.context_tokens)


def check_ids(ids: Sequence[int], param: str, service: ServingContext) -> None:
    """Check that the models know these token ids; raises InvalidRequest, which names `param`."""
    size = service.tokenizer.vocabulary
    bad = next((token for token in ids if not 0 <= token < size), None)
    if bad is not None:
        raise InvalidRequest(f"`{param}` has token id {bad}; ids are 0 to {size - 1}", param=param)


def check_at_most(value: int, limit: int, param: str, unit: str = "") -> None:
    """Check a number of the request against a limit of this server.

    Args:
        value: The value of `param`, or how many of `unit` it has.
        limit: The largest value allowed.
        param: The field, for the error.
        unit: What is counted.

    Raises:
        InvalidRequest: The value is above the limit.
    """
    if value > limit:
        got = f"has {value} {unit}" if unit else f"is {value}"
        raise InvalidRequest(f"`{param}` {got}; this server allows at most {limit}", param=param)


def _tokenize(prompt: str | Sequence[int], service: ServingContext) -> tuple[int, ...]:
    if not isinstance(prompt, str):
        check_ids(prompt, "prompt", service)
        return tuple(prompt)
    with _naming("prompt"):
        limit = max_prompt_tokens(service)
        return _nonempty(service.tokenizer.encode(prompt, limit=limit), "prompt")


def _nonempty(tokens: tuple[int, ...], param: str) -> tuple[int, ...]:
    if not tokens:
        raise InvalidRequest(f"`{param}` has no tokens; give at least one", param=param)
    return tokens


@contextmanager
def _naming(param: str) -> Generator[None]:
    """Add the field's name to the tokenizer's errors."""
    try:
        yield
    except InvalidRequest as error:
        error.param = error.param or param
        raise


def _template_message(message: Message, number: int) -> dict[str, Any]:
    """Return a message in the form that chat templates read."""
    if message.content is None and not message.tool_calls:
        param = f"messages[{number}].content"
        raise InvalidRequest(f"`{param}` is missing; give text", param=param)
    rendered: dict[str, Any] = {
        # Few templates know `developer`, the newer name of `system`.
        "role": "system" if message.role == "developer" else message.role,
        "content": plain(message.content),
    }
    if message.tool_calls:
        rendered["tool_calls"] = [_tool_call(call.model_dump()) for call in message.tool_calls]
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return rendered | {key: value for key, value in named.items() if value is not None}


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object instead of text."""
    function = call["function"]
    try:
        arguments = from_json(function["arguments"])
    except ValueError as error:
        raise InvalidRequest(
            f"The arguments of a tool call are no JSON: {error}", param="messages"
        ) from error
    return call | {"function": function | {"arguments": arguments}}
