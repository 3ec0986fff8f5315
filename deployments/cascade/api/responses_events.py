"""The object of `/v1/responses`, and the events that stream it in OpenAI's order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from cascade.api import responses
from cascade.api.response_parser import CallDelta, MessageDelta
from cascade.api.responses import Json, ResponseFormat
from cascade.errors import Overloaded
from cascade.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cascade.api.completion import Completion, Completions
    from cascade.api.context import ServingContext
    from cascade.api.output_processor import Delta
    from cascade.api.responses_body import ResponsesBody
    from cascade.errors import CascadeError

_IDS = {"message": "msg", "reasoning": "rs", "function_call": "fc"}
_PARTS: dict[str, Json] = {
    "message": {"type": "output_text", "text": "", "annotations": [], "logprobs": []},
    "reasoning": {"type": "reasoning_text", "text": ""},
}


class ResponsesFormat(ResponseFormat):
    """`/v1/responses`, for one call."""

    id_prefix: ClassVar[str] = "resp"
    sends_done: ClassVar[bool] = False

    def __init__(self, service: ServingContext, request_id: str, body: ResponsesBody) -> None:
        """Begin a response.

        Args:
            service: What the call is served with.
            request_id: Names the call.
            body: Its body, some fields of which are part of the response.
        """
        super().__init__(service, request_id)
        self._body = body
        self._request_id = request_id
        self._output: list[Json] = []
        self._open: Json | None = None  # the last item, while more of it can come
        self._call = CallDelta(index=-1)  # the call that it is, if it is one
        self._events = 0

    def response(self, completions: Completions) -> Json:
        """Return the response to a call that has ended: what its stream would have added up to."""
        (completion,) = completions.all
        for _ in (*self._say(completion.output), *self.end(completions)):
            pass
        return self._ended(completions)

    def begin(self, completions: Completions) -> Iterator[Json]:
        """Yield the events before the first item."""
        for name in ("created", "in_progress"):
            yield self._event(f"response.{name}", response=self._object(completions))

    def added(
        self, completions: Completions, completion: Completion, delta: Delta
    ) -> Iterator[Json]:
        """Yield the events of what was added."""
        del completions, completion
        yield from self._say(delta)

    def end(self, completions: Completions) -> Iterator[Json]:
        """Yield the events after the last delta; a response has at least one item."""
        if not self._output:
            yield from self._begin_item("message")
        status = _status(completions)
        yield from self._end_item(status)
        yield self._event(f"response.{status}", response=self._ended(completions))

    def failed(self, completions: Completions, problem: CascadeError) -> Json:
        """Return the last event of a stream that failed."""
        code = "rate_limit_exceeded" if isinstance(problem, Overloaded) else "server_error"
        error = {"code": code, "message": problem.message}
        found = self._object(completions) | {"status": "failed", "error": error}
        return self._event("response.failed", response=found)

    def _say(self, delta: Delta) -> Iterator[Json]:
        said = delta.message or MessageDelta(content=delta.text)
        if said.reasoning:
            yield from self._add("reasoning", said.reasoning)
        if said.content:
            yield from self._add("message", said.content)
        for call in said.calls:
            if self._open is None or call.index != self._call.index:
                yield from self._begin_item("function_call", call)
            yield from self._add("function_call", call.arguments)

    def _add(self, kind: str, text: str) -> Iterator[Json]:
        """Yield the events of more text of an item."""
        if self._open is None or self._open["type"] != kind:
            yield from self._begin_item(kind)
        assert self._open is not None, "an item has begun"
        if kind == "function_call":
            self._open["arguments"] += text
            yield self._item_event("function_call_arguments.delta", delta=text)
            return
        (part,) = self._open["content"]
        part["text"] += text
        more: Json = {"logprobs": []} if kind == "message" else {}
        yield self._item_event(f"{part['type']}.delta", content_index=0, delta=text, **more)

    def _begin_item(self, kind: str, call: CallDelta | None = None) -> Iterator[Json]:
        """Yield the events that end the last item and begin one.

        Args:
            kind: Its type.
            call: The first delta of the call that it is.
        """
        yield from self._end_item("completed")
        item: Json = {"id": f"{_IDS[kind]}_{self._request_id}_{len(self._output)}", "type": kind}
        item["status"] = "in_progress"
        if call is not None:
            self._call = call
            item |= {"call_id": call.id, "name": call.name, "arguments": ""}
        else:
            item["content"] = []
            item |= {"role": "assistant"} if kind == "message" else {"summary": []}
        self._open = item
        self._output.append(item)
        index = len(self._output) - 1
        yield self._event("response.output_item.added", output_index=index, item=dict(item))
        if call is None:
            item["content"] = [dict(_PARTS[kind])]
            part = dict(_PARTS[kind])
            yield self._item_event("content_part.added", content_index=0, part=part)

    def _end_item(self, status: Literal["completed", "incomplete"]) -> Iterator[Json]:
        """Yield the events that end the last item, if it is open."""
        item = self._open
        if item is None:
            return
        if item["type"] == "function_call":
            named = {"name": item["name"], "arguments": item["arguments"]}
            yield self._item_event("function_call_arguments.done", **named)
        else:
            (part,) = item["content"]
            more: Json = {"logprobs": []} if item["type"] == "message" else {}
            more |= {"content_index": 0, "text": part["text"]}
            yield self._item_event(f"{part['type']}.done", **more)
            yield self._item_event("content_part.done", content_index=0, part=part)
        item["status"] = status
        index = len(self._output) - 1
        self._open = None
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _item_event(self, name: str, /, **fields: Any) -> Json:
        assert self._open is not None, "an item is open"
        place = {"item_id": self._open["id"], "output_index": len(self._output) - 1}
        return self._event(f"response.{name}", **place, **fields)

    def _event(self, name: str, /, **fields: Any) -> Json:
        self._events += 1
        return {"type": name, "sequence_number": self._events - 1, **fields}

    def _ended(self, completions: Completions) -> Json:
        """Return the response to a call that has ended."""
        (completion,) = completions.all
        status, figures = _status(completions), responses.figures(completions.usage)
        reason = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return self._object(completions) | {
            **figures,
            "status": status,
            "incomplete_details": reason,
            "usage": _usage(figures["usage"]),
            **responses.extensions(completion, completion.output, self._tokenizer),
        }

    def _object(self, completions: Completions) -> Json:
        """Return the response so far."""
        body, sampling = self._body, completions.call.requests[0].policy.sampling
        text = body.text.model_dump(by_alias=True, exclude_none=True) if body.text else {}
        choice = body.tool_choice or "auto"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": completions.call.model,
            "output": list(self._output),
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning and body.reasoning.effort, "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"}} | text,
            "tool_choice": choice if isinstance(choice, str) else choice.model_dump(),
            "tools": [
                {"parameters": None, "strict": None} | tool.model_dump(exclude_none=True)
                for tool in body.tools or ()
            ],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
        }


def _status(completions: Completions) -> Literal["completed", "incomplete"]:
    cut = completions.all[0].output.finish is FinishReason.LENGTH
    return "incomplete" if cut else "completed"


def _usage(usage: Json) -> Json:
    """Return the usage of a chat under its names here."""
    reasoning = usage["completion_tokens_details"]["reasoning_tokens"]
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": usage["prompt_tokens_details"] | {"cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": usage["total_tokens"],
        "cascade": usage["cascade"],
    }
