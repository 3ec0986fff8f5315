"""Turns prompts and conversations into token ids."""

from __future__ import annotations

from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from pydantic_core import from_json

from cascade.api.schema import ChatBody, CompletionBody, Message, Template, ToolCall, texts
from cascade.errors import ContextTooLong, InvalidRequest, ModelNotFound, UnsupportedParameter

if TYPE_CHECKING:
    from collections.abc import Generator, Mapping, Sequence

    from cascade.api.context import ServingContext


# Few templates know `developer` and `function`, the newer and the older name of these roles.
_ROLES = {"developer": "system", "function": "tool"}


def prompts(body: CompletionBody, service: ServingContext) -> Sequence[str | Sequence[int]]:
    """Return the prompts of a text completion; raises InvalidRequest if there are too many."""
    prompt = body.prompt
    listed: Sequence[str | Sequence[int]]
    if isinstance(prompt, str):
        listed = [prompt]
    else:
        ids = [item for item in prompt if isinstance(item, int)]
        listed = [ids] if ids else [item for item in prompt if not isinstance(item, int)]
    check_at_most(len(listed), service.limits.prompts, "prompt", "prompts")
    return listed


def conversation(
    messages: Sequence[Message],
    template: Template,
    service: ServingContext,
    *,
    keep: int | None = None,
    tools: Sequence[Mapping[str, Any]] | None = None,
) -> tuple[int, ...]:
    """Return a conversation in the model's chat template.

    Args:
        messages: Oldest first.
        template: How to render them.
        service: Has the tokenizer and the limits.
        keep: Tokens to keep at the end; None refuses what does not fit.
        tools: What the model may call.

    Raises:
        InvalidRequest: A message is empty, or the template rejects the conversation.
        UnsupportedParameter: A message has an unknown field.
    """
    with _fitting("messages", service):
        limit = max_prompt_tokens(service) if keep is None else None
        arguments = template_arguments(messages, template)
        tokens = service.tokenizer.chat(**arguments, tools=tools, limit=limit)
    return _nonempty(_kept(tokens, keep), "messages")


def template_arguments(messages: Sequence[Message], template: Template) -> dict[str, Any]:
    """Return the arguments of `Tokenizer.render`; parameters and errors are `conversation`'s."""
    continued = bool(template.continue_final_message)
    if continued and template.add_generation_prompt:
        raise InvalidRequest(
            "`continue_final_message` and `add_generation_prompt` are both true; set one: the"
            " completion either continues the last message or begins a new one",
            param="add_generation_prompt",
        )
    variables = dict(template.chat_template_kwargs or {})
    if isinstance(template, ChatBody) and template.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", template.reasoning_effort)
        if template.reasoning_effort == "none":
            variables.setdefault("enable_thinking", False)
    return {
        "messages": [_template_message(message, i) for i, message in enumerate(messages)],
        "add_generation_prompt": template.add_generation_prompt is not False,
        "continue_last": continued,
        "variables": variables,
    }


def max_prompt_tokens(service: ServingContext) -> int:
    """Return how many tokens a prompt may have."""
    limits = service.limits
    most = service.source_tokens if service.start_ids else limits.context_tokens
    return min(limits.prompt_tokens or most, most)


def too_long(what: str, service: ServingContext, *, param: str) -> ContextTooLong:
    """Return the error for a prompt that does not fit, in the words that OpenAI's clients look for.

    Args:
        what: What was given.
        service: Has the limits.
        param: The field of the prompt.
    """
    context, prompt = service.limits.context_tokens, max_prompt_tokens(service)
    of_it = "" if prompt == context else f", and that of a prompt {prompt}"
    if service.start_ids:
        context, of_it = prompt, " of prompt, which its encoder reads"
    return ContextTooLong(
        f"This model's maximum context length is {context} tokens{of_it}. However, {what}."
        f" Reduce the length of the `{param}`",
        param=param,
    )


def check_model(name: str | None, service: ServingContext) -> None:
    """Check that a model is served here, if one is named; raises ModelNotFound."""
    if name is not None and name not in service.models:
        served = ", ".join(service.models)
        raise ModelNotFound(f"No model `{name}` here; this server has {served}", param="model")


def check_ids(ids: Sequence[int], param: str, service: ServingContext) -> None:
    """Check that the models know these token ids; raises InvalidRequest, which names `param`."""
    size = service.tokenizer.vocabulary
    bad = next((token for token in ids if not 0 <= token < size), None)
    if bad is not None:
        raise InvalidRequest(f"`{param}` has token id {bad}; ids are 0 to {size - 1}", param=param)


def check_at_most(value: float, limit: float, param: str, unit: str = "") -> None:
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


def tokenize(
    prompt: str | Sequence[int], service: ServingContext, *, keep: int | None = None
) -> tuple[int, ...]:
    """Return the tokens of a prompt, at least one.

    Args:
        prompt: Text or token ids.
        service: Has the tokenizer and the limits.
        keep: Tokens to keep at the end; None refuses what does not fit.

    Raises:
        InvalidRequest: It is too long, or a token id does not exist.
    """
    if not isinstance(prompt, str):
        check_ids(prompt, "prompt", service)
        return _kept(tuple(prompt), keep)
    with _fitting("prompt", service):
        limit = max_prompt_tokens(service) if keep is None else None
        return _nonempty(_kept(service.tokenizer.encode(prompt, limit=limit), keep), "prompt")


def _kept(tokens: tuple[int, ...], keep: int | None) -> tuple[int, ...]:
    return tokens if keep is None else tokens[-keep:]


def _nonempty(tokens: tuple[int, ...], param: str) -> tuple[int, ...]:
    if not tokens:
        raise InvalidRequest(f"`{param}` has no tokens; give at least one", param=param)
    return tokens


@contextmanager
def _fitting(param: str, service: ServingContext) -> Generator[None]:
    """Add the field and the limits to the tokenizer's errors."""
    try:
        with naming(param):
            yield
    except ContextTooLong as error:
        what = error.message[0].lower() + error.message[1:]
        raise too_long(what, service, param=param) from error


@contextmanager
def naming(param: str) -> Generator[None]:
    """Add the field's name to the tokenizer's errors."""
    try:
        yield
    except InvalidRequest as error:
        error.param = error.param or param
        raise


def _template_message(message: Message, number: int) -> dict[str, Any]:
    """Return a message in the form that chat templates read: content as text, or as parts."""
    written = message.role in {"assistant", "tool", "function"}
    unknown = {name for name, value in (message.model_extra or {}).items() if value is not None}
    if unknown and message.role != "assistant":
        param = f"messages[{number}].{min(unknown)}"
        raise UnsupportedParameter(f"`{param}` is unknown here; leave it out", param=param)
    if message.content is None and not written:
        param = f"messages[{number}].content"
        raise InvalidRequest(f"`{param}` is missing; give text", param=param)
    content: str | list[dict[str, str]] = message.refusal or ""
    if isinstance(message.content, str):
        content = message.content
    elif message.content is not None:
        content = [{"type": "text", "text": text} for text in texts(message.content)]
    calls = list(message.tool_calls or ())
    if message.function_call is not None:
        calls.append(ToolCall(function=message.function_call))
    rendered: dict[str, Any] = {
        "role": _ROLES.get(message.role, message.role),
        "content": content,
        "name": message.name,
        "tool_call_id": message.tool_call_id,
        "reasoning_content": message.reasoning_content or message.reasoning,
        "tool_calls": [_tool_call(call, f"messages[{number}]") for call in calls] or None,
    }
    return {key: value for key, value in rendered.items() if value is not None}


def _tool_call(call: ToolCall, param: str) -> dict[str, Any]:
    """Return a call with its arguments as an object, whatever the model wrote."""
    if call.custom is not None:
        function = {"name": call.custom.name, "arguments": {"input": call.custom.input}}
    elif call.function is not None:
        arguments = _arguments(call.function.arguments)
        function = {"name": call.function.name, "arguments": arguments}
    else:
        param = f"{param}.tool_calls"
        raise InvalidRequest(f"`{param}` has a call without `function`", param=param)
    return {"type": "function", "function": function} | ({"id": call.id} if call.id else {})


def _arguments(written: Any) -> dict[str, Any]:
    """Return the arguments of a call; what is cut off ends where it does."""
    arguments = written
    if isinstance(written, str):
        if not written.strip():
            return {}
        with suppress(ValueError):
            arguments = from_json(written, allow_partial="trailing-strings")
    if arguments is None or isinstance(arguments, dict):
        return arguments or {}
    return {"arguments": written}
