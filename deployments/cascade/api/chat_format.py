"""How a model writes what is no plain text of an answer: its thoughts and its tool calls.

A tokenizer may ship it as a response template, as transformers defines them. Many models do not;
their chat templates show which format they have.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from transformers.utils.chat_parsing import ResponseParser
from transformers.utils.chat_parsing.response_templates import load_response_template

from cascade.errors import UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers.utils.chat_parsing.response_templates import (
        ResponseTemplate,
        ResponseTemplateField,
    )

    from cascade.engine.tokenizer import Tokenizer

THOUGHTS, CALLS, CONTENT = "reasoning_content", "tool_calls", "content"

_THOUGHTS = {"open": "<think>", "close": "</think>", "content": "text"}
_HERMES = {
    "open_pattern": r"\s*<tool_call>",
    "close": "</tool_call>",
    "repeats": True,
    "content": "json",
    "transform": {"type": "function", "function": "{content}"},
}
_XML = {
    "open_pattern": r"\s*<tool_call>\s*<function=(?P<name>[^>\n]+)>",
    "close_pattern": r"</function>\s*</tool_call>",
    "repeats": True,
    "content": "xml-inline",
    "content_args": {
        "tag_pattern": r"<parameter=(?P<key>[^>\n]+)>\s*(?P<value>.*?)\s*</parameter>"
    },
    "transform": {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatFormat:
    """How one model writes thoughts and tool calls."""

    template: ResponseTemplate
    family: str | None = None  # xgrammar's name of the format of its tool calls
    visible: frozenset[int] = frozenset()  # special tokens that the template looks for
    think: tuple[str, str] | None = None  # what begins thoughts, and what ends them
    call: tuple[str, str] | None = None  # likewise a tool call

    @property
    def writes_json(self) -> bool:
        """Whether a call is a JSON object with `name` and `arguments`."""
        field = self.template.fields.get(CALLS)
        whole = {"type": "function", "function": "{content}"}
        return field is not None and field.content == "json" and field.transform == whole

    @property
    def calls_tools(self) -> bool:
        """Whether tool calls have a form that is known."""
        return CALLS in self.template.fields

    def parser(self, prefix: str, tools: list[Any] | None) -> ResponseParser:
        """Return a parser of an answer.

        Args:
            prefix: The text before the answer, which may have begun thoughts.
            tools: What may be called; None: what looks like a call is text.
        """
        template = self.template
        if tools is None:
            fields = {name: one for name, one in template.fields.items() if name != CALLS}
            template = replace(template, fields=fields)
        found = template.start_anchor_re.search(prefix)
        return ResponseParser(template, prefix=prefix if found else "", tools=tools)

    def held(self, prefix: str, parser: ResponseParser) -> int:
        """Return how many characters of a prefix its parser holds back: it may yet emit them."""
        own = self.template.truncate_past_last_anchor(prefix)
        if not self.template.start_anchor_re.search(prefix):
            return 0
        events = parser.initial_events
        read = events[-1]["text"] if events and events[-1]["type"] == "region_chunk" else ""
        blank = len(own) - len(own.rstrip())
        return max(0, blank - (len(read) - len(read.rstrip())))


@lru_cache(maxsize=8)
def chat_format(tokenizer: Tokenizer) -> ChatFormat | None:
    """Return how a model writes thoughts and tool calls; None if nothing says so.

    Raises:
        UnsupportedModel: The tokenizer's response template is invalid.
    """
    own, shown = tokenizer.response_template, tokenizer.chat_template
    found = own or _template_of(shown)
    if found is None:
        return None
    try:
        template = load_response_template(found)
    except ValueError as error:
        raise UnsupportedModel(
            f"The tokenizer's `response_template` is invalid: {error}; correct or remove it in"
            " tokenizer_config.json"
        ) from error
    fields = {name: _lenient(field) for name, field in template.fields.items()}
    calls = found["fields"].get(CALLS, {})
    marked = " ".join(
        text for name, field in template.fields.items() if name != CONTENT for text in _texts(field)
    )
    return ChatFormat(
        template=replace(template, fields=fields),
        family=_family(calls),
        visible=frozenset(
            id_ for id_ in tokenizer.special_ids if tokenizer.tokens.get(id_, "\0") in marked
        ),
        think=_markers(template.fields.get(THOUGHTS)),
        call=_markers(template.fields.get(CALLS)),
    )


def _template_of(chat_template: str) -> dict[str, Any] | None:
    """Return the response template of models with such a chat template."""
    fields: dict[str, Any] = {}
    if "</think>" in chat_template:
        fields[THOUGHTS] = _THOUGHTS
    if "<tool_call>" in chat_template and "tools" in chat_template:
        fields[CALLS] = _XML if "<function=" in chat_template else _HERMES
    if not fields:
        return None
    return {
        "defaults": {"role": "assistant"},
        "start_anchor_pattern": r"<\|im_start\|>assistant\n|<\|assistant\|>",
        "fields": fields | {CONTENT: {"content": "text"}},
    }


def _family(calls: Mapping[str, Any]) -> str | None:
    """Return xgrammar's name of a format of tool calls, from its field of a response template."""
    begins = f"{calls.get('open', '')}{calls.get('open_pattern', '')}"
    if "<tool_call>" in begins and "<function=" in begins:
        return "qwen_3_5"
    if "<tool_call>" in begins and calls.get("content") == "json":
        return "qwen_3"
    return "gemma_4" if "<|tool_call>call:" in begins.replace("\\", "") else None


def _lenient(field: ResponseTemplateField) -> ResponseTemplateField:
    """Return a field that hands on as it is what does not parse."""
    if field.content != "json":
        return field
    return replace(field, content_args={**field.content_args, "allow_non_json": True})


def _texts(field: ResponseTemplateField) -> list[str]:
    """Return what a field's delimiters look for, literally or nearly so."""
    patterns = [one.pattern for one in (field.open_re, field.close_re) if one is not None]
    return [_unescaped(pattern) for pattern in patterns]


def _markers(field: ResponseTemplateField | None) -> tuple[str, str] | None:
    """Return the texts that begin and end a field, if both are fixed."""
    patterns = [] if field is None else [field.open_re, field.close_re]
    found: list[str] = []
    for pattern in patterns:
        source = "" if pattern is None else pattern.pattern.removeprefix(r"\s*")
        text = _unescaped(source)
        if source and re.fullmatch(source, text):
            found.append(text)
    return (found[0], found[1]) if len(found) == len(patterns) > 0 else None


def _unescaped(pattern: str) -> str:
    return re.sub(r"\\(\W)", r"\1", pattern)
