"""The grammar that holds a model to its tools: to call one, to call this one, to fit its schema."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import xgrammar as xgr

from cascade.api.chat_format import THOUGHTS
from cascade.api.structured import thoughts_first
from cascade.errors import InvalidRequest, UnsupportedParameter
from cascade.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from cascade.api.chat_format import ChatFormat
    from cascade.api.schema import Tool
    from cascade.api.tools import ToolChoice

_MAX_WHITESPACE = 8  # in a row, between parts of arguments


def tool_grammar(choice: ToolChoice, form: ChatFormat, *, start: str | None) -> Grammar | None:
    """Return what an answer must match; None if it may call what it likes as it likes.

    Args:
        choice: What the request says of tools.
        form: How the model writes calls.
        start: The field of the response template that the prompt ends in.

    Raises:
        UnsupportedParameter: The form has no grammar.
        InvalidRequest: A schema cannot be used.
    """
    if not (choice.must_call or any(tool.function.strict for tool in choice.tools)):
        return None
    tools: list[Any] = [_described(tool) for tool in choice.tools]
    if choice.name is not None:
        tools = [tool for tool in tools if tool["function"]["name"] == choice.name]
    thinks = "disabled" if form.think is None else "enabled" if start == THOUGHTS else "auto"
    if form.family is None:
        tag = _own_tag(choice, form, tools, start=start)
    else:
        try:
            found = xgr.get_model_structural_tag(
                form.family,
                tools=tools,
                tool_choice="required" if choice.must_call else "auto",
                reasoning=thinks,
                max_whitespace_cnt=_MAX_WHITESPACE,
                parallel_tool_calls=choice.parallel,
            )
        except ValueError as error:
            raise InvalidRequest(f"`tools` cannot be used: {error}", param="tools") from error
        tag = found.model_dump(mode="json", exclude_none=True)
    text = json.dumps(_without_text_around(tag), ensure_ascii=False)
    return Grammar(kind=GrammarKind.STRUCTURAL_TAG, text=text)


def _described(tool: Tool) -> dict[str, Any]:
    """Return a tool as xgrammar reads it; arguments are always an object."""
    function = tool.function
    parameters = {} if function.strict is False else function.parameters or {}
    described = {"name": function.name, "parameters": {"type": "object"} | parameters}
    return {"type": "function", "function": described}


def _own_tag(
    choice: ToolChoice, form: ChatFormat, tools: list[dict[str, Any]], *, start: str | None
) -> dict[str, Any]:
    """Return the tag of a model that writes a call as JSON between two fixed texts."""
    if form.call is None or not form.writes_json:
        raise UnsupportedParameter(
            "Calls cannot be made to fit here: the grammar of this model's calls is not known; send"
            ' `tool_choice: "auto"` and no tool with `strict: true`',
            param="tool_choice" if choice.must_call else "tools",
        )
    begin, end = form.call
    tags = [
        {
            "type": "tag",
            "begin": f'{begin}\n{{"name": {json.dumps(tool["function"]["name"])}, "arguments": ',
            "content": {
                "type": "json_schema",
                "json_schema": tool["function"]["parameters"],
                "max_whitespace_cnt": _MAX_WHITESPACE,
            },
            "end": f"}}\n{end}",
        }
        for tool in tools
    ]
    calls: dict[str, Any] = {
        "type": "triggered_tags",
        "triggers": [begin],
        "tags": tags,
        "at_least_one": choice.must_call,
        "stop_after_first": not choice.parallel,
    }
    if form.think is not None:
        calls = thoughts_first(calls, form.think, start=start)
    return {"type": "structural_tag", "format": calls}


def _without_text_around(tag: Any) -> Any:
    """Return the tag with nothing but calls where there must be one: text after it has no end."""
    if isinstance(tag, list):
        return [_without_text_around(one) for one in tag]
    if not isinstance(tag, dict) or tag.get("type") == "json_schema":
        return tag
    if tag.get("type") == "triggered_tags" and tag["at_least_one"]:
        kept = {name: tag[name] for name in ("tags", "at_least_one", "stop_after_first")}
        return {"type": "tags_with_separator", "separator": "\n", **kept}
    return {name: _without_text_around(value) for name, value in tag.items()}
