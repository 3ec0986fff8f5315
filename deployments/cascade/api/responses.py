"""The JSON that OpenAI's clients read: completions, chunks, usage, models and errors.

Our extensions are where a client that does not know them ignores them: `choices[i].cascade`,
`usage.cascade`, and vLLM's `metrics` and llama.cpp's `timings` at the top level. Never inside
`delta`, which the stream helper of OpenAI's client accumulates.
"""

from __future__ import annotations

import json
import math
from abc import ABC, abstractmethod
from dataclasses import asdict
from itertools import accumulate
from operator import itemgetter
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from starlette.responses import Response

from cascade.api.output_processor import Delta
from cascade.api.response_parser import MessageDelta
from cascade.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cascade.api.completion import Completion, Completions, Usage
    from cascade.api.context import ServingContext
    from cascade.api.output_processor import TokenText
    from cascade.engine.tokenizer import Tokenizer
    from cascade.errors import CascadeError
    from cascade.types import Statistics, TokenLogprob

Json: TypeAlias = dict[str, Any]

_IMPOSSIBLE = -9999.0  # stands for -infinity, which JSON cannot express; OpenAI's documented value


class ResponseFormat(ABC):
    """The JSON of one kind of response, for one call."""

    id_prefix: ClassVar[str]
    sends_done: ClassVar[bool] = True  # a stream ends with `[DONE]`

    def __init__(self, service: ServingContext, request_id: str) -> None:
        self._tokenizer = service.tokenizer
        self._id = f"{self.id_prefix}-{request_id}"
        self._created = int(service.clock())

    @abstractmethod
    def response(self, completions: Completions) -> Json:
        """Return the response to a call that has ended."""

    @abstractmethod
    def begin(self, completions: Completions) -> Iterator[Json]:
        """Yield the events of a stream before any completion has tokens."""

    @abstractmethod
    def added(
        self, completions: Completions, completion: Completion, delta: Delta
    ) -> Iterator[Json]:
        """Yield the events that carry a delta; the completion contains it already."""

    @abstractmethod
    def end(self, completions: Completions) -> Iterator[Json]:
        """Yield the events after the last delta."""

    def failed(self, completions: Completions, problem: CascadeError) -> Json:
        """Return the last event of a stream that failed."""
        del completions
        return error(problem)


class ChoicesFormat(ResponseFormat):
    """Completions as `choices`, and a stream of chunks with one choice each."""

    object_name: ClassVar[str]  # the `object` of a response
    chunk_name: ClassVar[str]  # the `object` of a chunk

    @abstractmethod
    def choice(self, completion: Completion) -> Json:
        """Return a finished choice."""

    @abstractmethod
    def opening(self, completion: Completion) -> list[Json]:
        """Return the choices to send before a completion has tokens."""

    @abstractmethod
    def chunks(self, completion: Completion, delta: Delta) -> list[Json]:
        """Return the choices that carry a delta; the completion contains it already."""

    def response(self, completions: Completions) -> Json:
        """Return the response with all finished choices."""
        choices = [self.choice(completion) for completion in completions.all]
        return self._frame(self.object_name, completions, choices) | figures(completions.usage)

    def begin(self, completions: Completions) -> Iterator[Json]:
        """Yield the chunks that introduce the choices."""
        for completion in completions.all:
            for choice in self.opening(completion):
                yield self.chunk(completions, choice)

    def added(
        self, completions: Completions, completion: Completion, delta: Delta
    ) -> Iterator[Json]:
        """Yield the chunks of a delta."""
        for choice in self.chunks(completion, delta):
            yield self.chunk(completions, choice)

    def end(self, completions: Completions) -> Iterator[Json]:
        """Yield the chunk that has the usage and no choice, if it is wanted."""
        if completions.call.include_usage:
            yield self._frame(self.chunk_name, completions, []) | figures(completions.usage)

    def chunk(self, completions: Completions, choice: Json) -> Json:
        """Return a chunk of a stream with one choice."""
        chunk = self._frame(self.chunk_name, completions, [choice])
        if completions.call.include_usage:
            continuous = completions.call.continuous_usage
            chunk["usage"] = usage_object(completions.usage) if continuous else None
        return chunk

    def _frame(self, object_name: str, completions: Completions, choices: list[Json]) -> Json:
        return {
            "id": self._id,
            "object": object_name,
            "created": self._created,
            "model": completions.call.model,
            "choices": choices,
        }


class TextCompletionFormat(ChoicesFormat):
    """`/v1/completions`."""

    id_prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def choice(self, completion: Completion) -> Json:
        """Return a finished choice."""
        choice = self._choice(completion, completion.output, offset=0)
        return choice | _prompt_ids(completion) | _prompt_logprobs(completion, self._tokenizer)

    def opening(self, completion: Completion) -> list[Json]:
        """Return an empty choice if there are several, so that their indices come in order."""
        if len(completion.call.requests) == 1:
            return []
        choice = {"index": completion.index, "text": "", "logprobs": None, "finish_reason": None}
        return [choice | _prompt_ids(completion)]

    def chunks(self, completion: Completion, delta: Delta) -> list[Json]:
        """Return one choice with the text."""
        choice = self._choice(completion, delta, offset=completion.text_length - len(delta.text))
        first = len(completion.tokens) == len(delta.tokens) and not self.opening(completion)
        return [choice | (_prompt_ids(completion) if first else {})]

    def _choice(self, completion: Completion, delta: Delta, *, offset: int) -> Json:
        logprobs = None
        if completion.request.policy.logprobs is not None:
            logprobs = _text_logprobs(delta.tokens, self._tokenizer, offset=offset)
        return {
            "index": completion.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish,
            **extensions(completion, delta, self._tokenizer),
        }


class ChatCompletionFormat(ChoicesFormat):
    """`/v1/chat/completions`."""

    id_prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def response(self, completions: Completions) -> Json:
        """Return the response with all finished choices."""
        first = completions.all[0]
        prompt = _prompt_ids(first) | _prompt_logprobs(first, self._tokenizer)
        return super().response(completions) | prompt

    def chunk(self, completions: Completions, choice: Json) -> Json:
        """Return a chunk of a stream with one choice."""
        prompt = _prompt_ids(completions.all[0]) if "role" in choice["delta"] else {}
        return super().chunk(completions, choice) | prompt

    def choice(self, completion: Completion) -> Json:
        """Return a finished choice."""
        delta = completion.output
        said = delta.message or MessageDelta(content=delta.text)
        message: Json = {"role": "assistant", "content": said.content, "refusal": None}
        message |= _thoughts(said)
        if said.calls:
            message["content"] = said.content or None
            message |= _calls(completion, said, whole=True)
        return {**self._choice(completion, delta), "message": message}

    def opening(self, completion: Completion) -> list[Json]:
        """Return the role, once per choice."""
        delta = {"role": "assistant", "content": ""}
        index = completion.index
        return [{"index": index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunks(self, completion: Completion, delta: Delta) -> list[Json]:
        """Return what was added; after it, with an empty delta, the finish reason."""
        chunks: list[Json] = []
        if delta.tokens:
            added = self._choice(completion, Delta(tokens=delta.tokens))
            said = delta.message or MessageDelta(content=delta.text)
            parts = _thoughts(said) | (_calls(completion, said) if said.calls else {})
            if said.content or not parts:
                parts["content"] = said.content
            chunks.append({**added, "delta": parts})
        if delta.finish:
            end = self._choice(completion, Delta(finish=delta.finish, stop=delta.stop))
            chunks.append({**end, "delta": {}})
        return chunks

    def _choice(self, completion: Completion, delta: Delta) -> Json:
        logprobs = None
        if completion.request.policy.logprobs is not None and delta.tokens:
            logprobs = _chat_logprobs(delta.tokens, self._tokenizer)
        return {
            "index": completion.index,
            "logprobs": logprobs,
            "finish_reason": _finish_reason(completion, delta),
            **extensions(completion, delta, self._tokenizer),
        }


def _finish_reason(completion: Completion, delta: Delta) -> str | None:
    """Return why a chat ended; requests with `functions` have another word for calls."""
    called = delta.finish is FinishReason.TOOL_CALLS
    return "function_call" if called and _is_legacy(completion) else delta.finish


def _is_legacy(completion: Completion) -> bool:
    reading = completion.call.reading
    return reading is not None and reading.choice.legacy


def _thoughts(said: MessageDelta) -> Json:
    """Return what the model thought, under both names that clients read."""
    if not said.reasoning:
        return {}
    return {"reasoning_content": said.reasoning, "reasoning": said.reasoning}


def _calls(completion: Completion, said: MessageDelta, *, whole: bool = False) -> Json:
    """Return tool calls; `whole` ones have no index, and all others have one."""
    functions = [{} if call.name is None else {"name": call.name} for call in said.calls]
    for function, call in zip(functions, said.calls, strict=True):
        function["arguments"] = call.arguments
    if _is_legacy(completion):
        return {"function_call": functions[0]}
    calls = [
        ({} if whole else {"index": call.index})
        | ({} if call.id is None else {"id": call.id, "type": "function"})
        | {"function": function}
        for call, function in zip(said.calls, functions, strict=True)
    ]
    return {"tool_calls": calls}


def _prompt_ids(completion: Completion) -> Json:
    """Return vLLM's field with the prompt's ids, if the request wants it."""
    if not completion.call.token_ids:
        return {}
    return {"prompt_token_ids": list(completion.request.client_prompt)}


def _prompt_logprobs(completion: Completion, tokenizer: Tokenizer) -> Json:
    """Return vLLM's field: for each token but the first, it and the likeliest ones by their id."""
    known = completion.prompt_logprobs
    if known is None:
        return {}
    return {"prompt_logprobs": [None, *(_by_id(one, tokenizer) for one in known)]}


def _by_id(one: TokenLogprob, tokenizer: Tokenizer) -> Json:
    """Return a token and the likeliest ones; a token that is none of them has no known rank."""
    ranked = {id_: (value, rank) for rank, (id_, value) in enumerate(one.top, 1)}
    return {
        str(id_): {
            "logprob": _finite(value),
            "rank": rank,
            "decoded_token": tokenizer.bytes_of(id_).decode(errors="replace"),
        }
        for id_, (value, rank) in ({one.token: (one.logprob, None)} | ranked).items()
    }


def extensions(completion: Completion, delta: Delta, tokenizer: Tokenizer) -> Json:
    """Return the fields of a choice that OpenAI does not have: token origins and vLLM's fields.

    Args:
        completion: Whose choice it is.
        delta: The part of it that is sent.
        tokenizer: Has the text of tokens that were drafted and rejected.
    """
    own = [token for token in delta.tokens if token.origin is not None]
    cascade: Json = {
        "origins": "".join(token.origin or "" for token in own),
        "tokens": [token.text for token in own],
    }
    if completion.request.policy.logprobs is not None:
        known = [token.logprob for token in own if token.logprob is not None]
        cascade["logprob_origins"] = "".join("d" if one.drafter else "e" for one in known)
        if completion.request.trace:
            cascade["drafts"] = [_draft(token, tokenizer) for token in own]
    if delta.finish:
        statistics = completion.statistics
        cascade["undrafted_rounds"] = statistics.undrafted_rounds
        cascade["divergence"] = divergence(statistics)
        if completion.request.trace:
            cascade["trace"] = [asdict(entry) for entry in statistics.trace]
    extensions: Json = {"cascade": cascade}
    if isinstance(delta.stop, str) or delta.stop in completion.call.stop_ids:
        extensions["stop_reason"] = delta.stop
    if completion.call.token_ids:
        extensions["token_ids"] = [token.token_id for token in own]
    return extensions


def _text_logprobs(tokens: Sequence[TokenText], tokenizer: Tokenizer, *, offset: int) -> Json:
    """Return the `logprobs` of tokens that begin `offset` characters into their choice."""
    lengths = [len(token.text) for token in tokens]
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_logprob(token) for token in tokens],
        "top_logprobs": [_alternatives(token, tokenizer) for token in tokens],
        "text_offset": list(accumulate(lengths[:-1], initial=offset)) if lengths else [],
    }


def _chat_logprobs(tokens: Sequence[TokenText], tokenizer: Tokenizer) -> Json:
    """Return the `logprobs` of a chat completion; the bytes of all tokens decode to the text."""
    content = [
        _chat_token(token.text.encode(), _logprob(token))
        | {"top_logprobs": [_chat_token(*one) for one in _top(token, tokenizer)]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


def _logprob(token: TokenText) -> float | None:
    return None if token.logprob is None else _finite(token.logprob.logprob)


def _alternatives(token: TokenText, tokenizer: Tokenizer) -> dict[str, float] | None:
    """Return the likeliest tokens by their text, and always the token itself.

    Of several tokens with one text it is the likeliest.
    """
    if token.logprob is None:
        return None
    own = (token.text.encode(), _finite(token.logprob.logprob))
    named: dict[str, float] = {}
    for data, logprob in sorted((*_top(token, tokenizer), own), key=itemgetter(1), reverse=True):
        named.setdefault(_text_or_bytes(data), logprob)
    return named


def _top(token: TokenText, tokenizer: Tokenizer) -> list[tuple[bytes, float]]:
    """Return the bytes of the likeliest tokens; those of the token itself are of its text."""
    if token.logprob is None:
        return []
    return [
        (_bytes_beside(token, id_, tokenizer), _finite(value)) for id_, value in token.logprob.top
    ]


def _draft(token: TokenText, tokenizer: Tokenizer) -> Json | None:
    """Return what the drafter proposed at a token's position, as `logprobs` have it."""
    draft = token.draft
    if draft is None:
        return None
    (own, *top) = [
        _chat_token(_bytes_beside(token, id_, tokenizer), _finite(value))
        for id_, value in ((draft.token, draft.logprob), *draft.top)
    ]
    return {**own, "top_logprobs": top}


def _bytes_beside(token: TokenText, id_: int, tokenizer: Tokenizer) -> bytes:
    """Return the bytes of a token that could stand at another's place, or is the same."""
    return token.text.encode() if id_ == token.token_id else tokenizer.bytes_of(id_)


def _text_or_bytes(data: bytes) -> str:
    """Return a token's text; of a part of a character, its bytes as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _chat_token(data: bytes, logprob: float | None) -> Json:
    return {"token": _text_or_bytes(data), "logprob": logprob, "bytes": list(data)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE


def divergence(statistics: Statistics) -> float | None:
    """Return that of answers; None if it is not known of every token."""
    return None if statistics.unmeasured_tokens else statistics.divergence


def usage_object(usage: Usage) -> Json:
    """Return the usage; rejected draft tokens are not among the completion tokens."""
    statistics = usage.statistics
    cascade = asdict(statistics)
    for name in ("trace", "drafter_pass_s", "expert_pass_s"):
        del cascade[name]
    cascade["divergence"] = divergence(statistics)
    cascade["cost"] = {
        "drafter": {
            "seconds": statistics.drafter_pass_s,
            "passes": statistics.drafter_passes,
            "price": usage.price.drafter,
        },
        "expert": {
            "seconds": statistics.expert_pass_s,
            "passes": statistics.expert_passes,
            "price": usage.price.expert,
        },
        "bytes": statistics.sent_bytes + statistics.received_bytes,
        "price": usage.price.total,
    }
    cascade["deferral_rate"] = _ratio(statistics.deferred, statistics.judged)
    cascade["mean_accepted_length"] = _ratio(statistics.accepted, statistics.rounds)
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.rejected,
            "reasoning_tokens": usage.reasoning_tokens,
        },
        "cascade": cascade,
    }


def figures(usage: Usage) -> Json:
    """Return the usage, and the figures of speculative decoding as vLLM and llama.cpp name them."""
    statistics = usage.statistics
    histogram = statistics.accepted_lengths or [0]
    steps, accepted = sum(histogram), sum(at * count for at, count in enumerate(histogram))
    trace = [entry for entry in statistics.trace if entry.drafted]
    per_step = {
        "per_step_accepted": [entry.accepted for entry in trace],
        "per_step_drafted": [entry.drafted for entry in trace],
    }
    speculative = {
        "mean_acceptance_length": 1 + _ratio(accepted, steps),
        "draft_acceptance_rate": _ratio(accepted, statistics.drafted),
        "acceptance_histogram": histogram,
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": statistics.drafted,
        "num_spec_tokens": len(histogram) - 1,
        **(per_step if trace else {}),
    }
    return {
        "usage": usage_object(usage),
        "metrics": {"speculative_decoding": speculative},
        "timings": {"draft_n": statistics.drafted, "draft_n_accepted": statistics.accepted},
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def model(name: str, service: ServingContext) -> Json:
    """Return the object of a served model."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "cascade",
        "max_model_len": service.context_tokens,
    }


class JsonResponse(Response):
    """A response in JSON."""

    media_type = "application/json"

    def render(self, content: Json) -> bytes:
        """Return the body."""
        return encode(content)


def encode(value: Json) -> bytes:
    """Return JSON that is one line for every client.

    Python's `splitlines`, and so httpx, ends a line at three characters that JSON allows.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "\x85\u2028\u2029":
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text.encode()


def error(problem: CascadeError) -> Json:
    """Return an error object."""
    names = ("message", "type", "param", "code")
    return {"error": {name: getattr(problem, name) for name in names}}
