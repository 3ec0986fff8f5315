"""The grammar that holds a model to its tools: to call one, to call this one, to fit its schema."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import xgrammar as xgr

from cascade.api.chat_format import THOUGHTS
from cascade.api.structured import element_of, structural_tag, thoughts_first
from cascade.errors import InvalidRequest, UnsupportedParameter

if TYPE_CHECKING:
    from cascade.api.chat_format import ChatFormat
    from cascade.api.schema import Tool
    from cascade.api.tools import ToolChoice
    from cascade.types import Grammar
_MAX_WHITESPACE = 8  # in a row, between parts of arguments


def tool_grammar(
    choice: ToolChoice, form: ChatFormat, *, start: str | None, given: Grammar | None = None
) -> Grammar | None:
    """Return what an answer must match; None if it may call what it likes as it likes.

    Args:
        choice: What the request says of tools.
        form: How the model writes calls.
        start: The field of the response template that the prompt ends in.
        given: What an answer that calls nothing must match.

    Raises:
        UnsupportedParameter: The form has no grammar.
        InvalidRequest: A schema cannot be used.
    """
    if choice.must_call:
        return structural_tag(_calls(choice, form, start=start))
    element = element_of(given) if given is not None and choice.tools else None
    if element is not None:
        calls = _calls(replace(choice, must_call=True), replace(form, think=None), start=None)
        either = {"type": "or", "elements": [calls, element]}
        return structural_tag(
            either if form.think is None else thoughts_first(either, form.think, start=start)
        )
    if any(tool.function.strict for tool in choice.tools):
        return structural_tag(_calls(choice, form, start=start))
    return None


def _calls(choice: ToolChoice, form: ChatFormat, *, start: str | None) -> Any:
    """Return the format of xgrammar's structural tags that calls have, with thoughts before."""
    tools: list[Any] = [_described(tool) for tool in choice.tools]
    if choice.name is not None:
        tools = [tool for tool in tools if tool["function"]["name"] == choice.name]
    if form.family is None:
        return _without_text_around(_own_calls(choice, form, tools, start=start))
    thinks = "disabled" if form.think is None else "enabled" if start == THOUGHTS else "auto"
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
    return _without_text_around(found.model_dump(mode="json", exclude_none=True)["format"])


def _described(tool: Tool) -> dict[str, Any]:
    """Return a tool as xgrammar reads it; arguments are always an object."""
    function = tool.function
    parameters = {} if function.strict is False else function.parameters or {}
    described = {"name": function.name, "parameters": {"type": "object"} | parameters}
    return {"type": "function", "function": described}


def _own_calls(
    choice: ToolChoice, form: ChatFormat, tools: list[dict[str, Any]], *, start: str | None
) -> dict[str, Any]:
    """Return the format of a model that writes a call as JSON between two fixed texts."""
    if form.call is None or not form.writes_json:
        raise UnsupportedParameter(
            "Calls cannot be made to fit here: the grammar of this model's calls is not known; send"
            ' `tool_choice: "auto"`, no tool with `strict: true`, and no `response_format`',
            param="tools",
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
    return calls


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
