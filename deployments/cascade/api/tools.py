"""What a chat may call: tools and their choice, also in the old form of functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cascade.api.chat_format import ChatFormat, chat_format
from cascade.api.prompts import check_at_most
from cascade.api.response_parser import ResponseReader
from cascade.api.schema import ChatBody, FunctionName, FunctionTool, NamedTool, Tool
from cascade.errors import InvalidRequest, UnsupportedParameter

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from cascade.api.context import ServingContext


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolChoice:
    """What a request says of tools, in the new form."""

    tools: tuple[Tool, ...] = ()  # none: nothing may be called
    must_call: bool = False
    name: str | None = None  # the one function that it must call
    parallel: bool = True
    legacy: bool = False  # the request has `functions`, and the answer `function_call`

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """Return the tools as chat templates read them."""
        return shown_tools(self.tools)


def shown_tools(tools: Iterable[Tool]) -> list[dict[str, Any]] | None:
    """Return tools as chat templates read them; None: there are none."""
    return [tool.model_dump(exclude_none=True) for tool in tools] or None


def tool_choice(body: ChatBody, service: ServingContext) -> ToolChoice:
    """Return what a request says of tools.

    Raises:
        InvalidRequest: The choice does not fit the tools, or two tools share a name.
        UnsupportedParameter: The model has no form of tools.
    """
    legacy = bool(body.functions)
    if legacy and body.tools:
        raise InvalidRequest(
            "`functions` and `tools` are both set; send `tools`", param="functions"
        )
    field = "functions" if legacy else "tools"
    choice = _old_choice(body.function_call) if legacy else body.tool_choice or "auto"
    tools = [_tool(one) for one in body.functions or ()] if legacy else list(body.tools or ())
    names = [tool.function.name for tool in tools]
    check_at_most(len(tools), service.limits.tools, field, "functions")
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise InvalidRequest(f"`{field}` has two functions `{twice}`; rename one", param=field)
    if not tools:
        if choice in {"none", "auto"}:
            return ToolChoice()
        raise InvalidRequest("`tool_choice` needs `tools`; send some", param="tool_choice")
    if choice == "none":
        return ToolChoice()
    name = choice.function.name if isinstance(choice, NamedTool) else None
    if name is not None and name not in names:
        raise InvalidRequest(
            f"`tool_choice` names `{name}`, but `{field}` has {', '.join(names)}; name one of them",
            param="function_call" if legacy else "tool_choice",
        )
    check_shows_tools(service, field)
    return ToolChoice(
        tools=tuple(tools),
        must_call=choice != "auto",
        name=name,
        parallel=body.parallel_tool_calls is not False and not legacy and name is None,
        legacy=legacy,
    )


def check_shows_tools(service: ServingContext, field: str) -> None:
    """Check that the model sees tools and writes calls in a known form.

    Args:
        service: Has the tokenizer.
        field: The one with the tools.

    Raises:
        UnsupportedParameter: It does not.
    """
    if not service.tokenizer.shows_tools:
        raise UnsupportedParameter(
            f"`{field}` cannot be used: the chat template of this model shows no tools; send"
            ' `tool_choice: "none"`, or serve a model that calls tools',
            param=field,
        )
    form = chat_format(service.tokenizer)
    if form is None or not form.calls_tools:
        raise UnsupportedParameter(
            f"`{field}` cannot be used: how this model writes calls is not known. Known are"
            " `<tool_call>` around JSON (Hermes, Qwen 3) or around `<function=...>` (Qwen 3.5), and"
            " what a `response_template` in tokenizer_config.json says: add one to the tokenizer of"
            ' the expert, or send `tool_choice: "none"`',
            param=field,
        )


def _tool(function: FunctionTool) -> Tool:
    return Tool(type="function", function=function)


def _old_choice(choice: str | FunctionName | None) -> Any:
    if isinstance(choice, FunctionName):
        return NamedTool(type="function", function=choice)
    return choice or "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatReading:
    """How the answers of a chat are read."""

    form: ChatFormat
    choice: ToolChoice
    prefix: str  # the text before the answer

    def reader(self) -> ResponseReader:
        """Return a reader of one answer."""
        return ResponseReader(
            self.form,
            self.prefix,
            tools=self.choice.shown,
            most_calls=None if self.choice.parallel else 1,
        )


def chat_reading(
    choice: ToolChoice, prompt: Sequence[int], service: ServingContext
) -> ChatReading | None:
    """Return how the answers of a chat are read; None if they are text whatever they contain.

    Args:
        choice: What the request says of tools.
        prompt: The conversation.
        service: Has the tokenizer.
    """
    form = chat_format(service.tokenizer)
    if form is None:
        return None
    return ChatReading(
        form=form, choice=choice, prefix=service.tokenizer.decode(prompt, skip_special=False)
    )
