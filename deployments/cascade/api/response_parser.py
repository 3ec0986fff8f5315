"""Splits the text of a chat answer, as it comes, into thoughts, content and tool calls."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from uuid import uuid4

from cascade.api.chat_format import CALLS, THOUGHTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.api.chat_format import ChatFormat

# What comes before the arguments of a call that is JSON: its name.
_HEAD = re.compile(
    r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\S)'
)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallDelta:
    """What was added to a tool call; its first delta has id and name."""

    index: int
    id: str | None = None
    name: str | None = None
    arguments: str = ""  # text of a JSON object, or a part of it


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageDelta:
    """What was added to a message, or a whole message."""

    content: str = ""
    reasoning: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __add__(self, other: MessageDelta) -> MessageDelta:
        """Return both as one; the deltas of a call are joined."""
        calls = {call.index: call for call in self.calls}
        for call in other.calls:
            first = calls.get(call.index)
            whole = call.arguments if first is None else first.arguments + call.arguments
            calls[call.index] = replace(first or call, arguments=whole)
        return MessageDelta(
            content=self.content + other.content,
            reasoning=self.reasoning + other.reasoning,
            calls=tuple(calls.values()),
        )


class JsonValue:
    """Finds where a JSON object or array ends, in text that comes in parts."""

    def __init__(self) -> None:
        self.ended = False
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str) -> str:
        """Return the part of the text that belongs to the value."""
        for at, char in enumerate(text):
            if self.ended:
                return text[:at]
            self._read(char)
        return text

    def _read(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._quoted:
            self._escaped, self._quoted = char == "\\", char != '"'
        elif char == '"':
            self._quoted = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self.ended = self._depth <= 0


@dataclass(slots=True, kw_only=True)
class _OpenCall:
    """The call being written: its raw text, and how much of it was sent."""

    index: int
    text: str = ""
    arguments: JsonValue | None = None  # None: not sent yet
    read: int = 0  # characters of the text
    id: str = field(default_factory=lambda: f"call_{uuid4().hex[:24]}")


class ResponseReader:
    """Reads one answer. What is cut off or malformed is passed on as the model wrote it.

    Text without thoughts and calls is passed on unchanged. Around them, white space is dropped.
    """

    def __init__(
        self,
        form: ChatFormat,
        prefix: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        most_calls: int | None = None,
    ) -> None:
        """Begin an answer.

        Args:
            form: How the model writes.
            prefix: The text before the answer, in the chat template.
            tools: What may be called; None: what looks like a call is text.
            most_calls: Later calls are dropped.
        """
        self._parser = form.parser(prefix, tools)
        self._markers = form.call or ("", "")
        self.can_think = THOUGHTS in form.template.fields
        self._broken = False  # the rest is passed on unparsed
        self._most_calls = most_calls
        self._call: _OpenCall | None = None
        self.region: str | None = None  # the field of the template that the text is in
        self._trims = False  # white space that comes next
        self._blank = ""  # white space of thoughts, held back until more thoughts follow
        self.num_calls = 0
        self._held = form.held(prefix, self._parser)
        for event in self._parser.initial_events:
            if event["type"] == "region_open":
                self._enter(event["field"])
            elif event["type"] == "region_close":
                self._leave()
            elif event["text"].strip():
                self._trims = False

    @property
    def thinks(self) -> bool:
        """Whether the text is in thoughts."""
        return self.region == THOUGHTS

    def push(self, text: str) -> MessageDelta:
        """Return what the text adds to the message."""
        if self._broken or not text:
            return MessageDelta(content=text)
        try:
            events = self._parser.feed(text)
        except (KeyError, ValueError):
            return self._give_up(text)
        return self._message(events, ended=True)

    def finish(self) -> MessageDelta:
        """Return what the end of the answer adds."""
        if self._broken:
            return MessageDelta()
        try:
            _, events = self._parser.finalize()
        except (KeyError, ValueError):
            return self._give_up("")
        return self._message(events, ended=False)

    def _give_up(self, text: str) -> MessageDelta:
        self._broken = True
        call, self._call = self._call, None
        before = "" if call is None or call.arguments else self._markers[0] + call.text
        return MessageDelta(content=before + text)

    def _message(self, events: Sequence[dict[str, Any]], *, ended: bool) -> MessageDelta:
        """Return what events say; without `ended` the text was cut off."""
        message = MessageDelta()
        for event in events:
            match event["type"]:
                case "region_open":
                    self._enter(event["field"])
                case "region_chunk":
                    message += self._chunk(event["field"], event["text"])
                case _:
                    rest = MessageDelta()
                    if event["field"] == CALLS:
                        rest = self._end_calls(event["value"], ended=ended)
                    self._leave()
                    self._trims = self._trims and not rest.content
                    message += rest
        return message

    def _enter(self, region: str) -> None:
        marked = region in {CALLS, THOUGHTS}
        if marked:
            self._held = 0
        self._trims = marked or self._trims
        self.region, self._blank = region, ""
        if region == CALLS:
            self._call = _OpenCall(index=self.num_calls)

    def _leave(self) -> None:
        if self.region in {CALLS, THOUGHTS}:
            self._trims = True
        self.region, self._blank, self._call = None, "", None

    def _chunk(self, region: str, text: str) -> MessageDelta:
        if region == CALLS:
            return self._add_to_call(text)
        text, self._held = text[self._held :], max(0, self._held - len(text))
        if self._trims:
            text = text.lstrip()
            self._trims = not text
        if region != THOUGHTS:
            return MessageDelta(content=text)
        text = self._blank + text
        shown = text.rstrip()
        self._blank = text[len(shown) :]
        return MessageDelta(reasoning=shown)

    def _add_to_call(self, text: str) -> MessageDelta:
        """Return the arguments as far as they are written, once the name is."""
        call = self._call
        assert call is not None, "a call is open"
        call.text += text
        delta = CallDelta(index=call.index)
        if self._drops(call.index):
            return MessageDelta()
        if call.arguments is None:
            head = _HEAD.match(call.text)
            if head is None or call.text[head.end()] not in "{[":
                return MessageDelta()
            delta = replace(delta, id=call.id, name=json.loads(head[1]))
            call.arguments, call.read = JsonValue(), head.end()
        added = call.arguments.push(call.text[call.read :])
        call.read = len(call.text)
        if not added and delta.name is None:
            return MessageDelta()
        return MessageDelta(calls=(replace(delta, arguments=added),))

    def _end_calls(self, value: Any, *, ended: bool) -> MessageDelta:
        """Return what the end of a region with calls adds: those that were not sent yet."""
        call = self._call
        assert call is not None, "a call is open"
        if call.arguments is not None:
            self.num_calls += 1
            return MessageDelta()
        values: list[Any] = value if isinstance(value, list) else [value]
        functions: list[Any] = [one.get("function") for one in values]
        if self._drops(call.index):
            return MessageDelta()
        if not functions or not all(isinstance(one, dict) and "name" in one for one in functions):
            begin, end = self._markers
            return MessageDelta(content=begin + call.text + end * ended)
        calls: list[CallDelta] = []
        for function in functions:
            if not self._drops(self.num_calls):
                calls.append(_whole(function, index=self.num_calls))
                self.num_calls += 1
        return MessageDelta(calls=tuple(calls))

    def _drops(self, index: int) -> bool:
        return self._most_calls is not None and index >= self._most_calls


def _whole(function: dict[str, Any], *, index: int) -> CallDelta:
    arguments = function.get("arguments", function.get("parameters"))
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments or {}, ensure_ascii=False)
    name = str(function["name"])
    return CallDelta(index=index, id=_OpenCall(index=index).id, name=name, arguments=arguments)
