"""Prompts: text, token ids or a conversation, as the tokens that the models read."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from cascade.api.schema import CompletionBody, Message, plain
from cascade.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Generator, Sequence

    from cascade.api.context import ServingContext


def prompts(body: CompletionBody, service: ServingContext) -> tuple[tuple[int, ...], ...]:
    """Return the prompts of a text completion, each at least one token.

    Raises:
        InvalidRequest: There are too many, or one is too long or has no such tokens.
    """
    listed = _listed(body.prompt)
    if len(listed) > service.limits.prompts:
        raise InvalidRequest(
            f"`prompt` has {len(listed)} prompts; the most is {service.limits.prompts}",
            param="prompt",
        )
    return tuple(_tokens(prompt, service) for prompt in listed)


def conversation(messages: Sequence[Message], service: ServingContext) -> tuple[int, ...]:
    """Return a conversation under the model's chat template.

    Raises:
        InvalidRequest: A message says nothing, or the template refuses the conversation.
    """
    turns = [_turn(message, number) for number, message in enumerate(messages)]
    with _about("messages"):
        return _nonempty(service.tokenizer.chat(turns, limit=most_tokens(service)), "messages")


def most_tokens(service: ServingContext) -> int:
    """Return how many tokens a prompt may have."""
    limits = service.limits
    return min(limits.prompt_tokens or limits.context_tokens, limits.context_tokens)


def check_ids(ids: Sequence[int], param: str, service: ServingContext) -> None:
    """Refuse token ids that the pair does not have; raises InvalidRequest, which names `param`."""
    size = service.tokenizer.vocabulary
    bad = next((token for token in ids if not 0 <= token < size), None)
    if bad is not None:
        raise InvalidRequest(f"`{param}` has token id {bad}; ids are 0 to {size - 1}", param=param)


def _listed(prompt: str | list[str] | list[int] | list[list[int]]) -> Sequence[str | list[int]]:
    """Return the prompts of one call, each text or token ids."""
    if isinstance(prompt, str):
        return [prompt]
    ids = [item for item in prompt if isinstance(item, int)]
    return [ids] if ids else [item for item in prompt if not isinstance(item, int)]


def _tokens(prompt: str | list[int], service: ServingContext) -> tuple[int, ...]:
    if isinstance(prompt, list):
        check_ids(prompt, "prompt", service)
        return tuple(prompt)
    with _about("prompt"):
        return _nonempty(service.tokenizer.encode(prompt, limit=most_tokens(service)), "prompt")


def _nonempty(tokens: Sequence[int], param: str) -> tuple[int, ...]:
    if not tokens:
        raise InvalidRequest(f"`{param}` has no tokens; give at least one", param=param)
    return tuple(tokens)


@contextmanager
def _about(param: str) -> Generator[None]:
    """Name the field in errors of the tokenizer, which knows of texts alone."""
    try:
        yield
    except InvalidRequest as error:
        error.param = error.param or param
        raise


def _turn(message: Message, number: int) -> dict[str, Any]:
    """Return a message in the form that chat templates read."""
    if message.content is None and not message.tool_calls:
        param = f"messages[{number}].content"
        raise InvalidRequest(f"`{param}` is missing; give text", param=param)
    turn: dict[str, Any] = {
        # Templates that know `developer` are few, and it is the newer name of `system`.
        "role": "system" if message.role == "developer" else message.role,
        "content": plain(message.content),
    }
    if message.tool_calls:
        turn["tool_calls"] = [_tool_call(call.model_dump()) for call in message.tool_calls]
    named = {"name": message.name, "tool_call_id": message.tool_call_id}
    return turn | {key: value for key, value in named.items() if value is not None}


def _tool_call(call: dict[str, Any]) -> dict[str, Any]:
    """Return a tool call with its arguments as an object, as chat templates read them."""
    function = call["function"]
    try:
        arguments = from_json(function["arguments"])
    except ValueError as error:
        raise InvalidRequest(
            f"The arguments of a tool call are no JSON: {error}", param="messages"
        ) from error
    return call | {"function": function | {"arguments": arguments}}
