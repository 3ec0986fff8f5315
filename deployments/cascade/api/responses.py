"""What OpenAI's clients read, as JSON values: answers, chunks, usage, models and errors.

Extensions stand where a client that does not know them steps over them: `choices[i].cascade`,
`usage.cascade`, and at the top level vLLM's `metrics` and llama.cpp's `timings`. Never inside
`delta`, which the stream helper of OpenAI's client accumulates.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from cascade.api.output_processor import Delta

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.api.completion import Completion, Completions, Usage
    from cascade.api.context import ServingContext, Tokenizer
    from cascade.api.output_processor import TokenText
    from cascade.errors import CascadeError
    from cascade.types import Statistics

_IMPOSSIBLE = -9999.0  # JavaScript cannot read -Infinity; OpenAI documents this number


def text_logprobs(
    entries: Sequence[TokenText], tokenizer: Tokenizer, *, offset: int
) -> dict[str, list[Any]]:
    """Return the `logprobs` of a text completion whose first entry is `offset` characters in."""
    lengths = [len(entry.text) for entry in entries]
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [_own(entry) for entry in entries],
        "top_logprobs": [_alternatives(entry, tokenizer) for entry in entries],
        "text_offset": list(accumulate(lengths[:-1], initial=offset)) if lengths else [],
    }


def chat_logprobs(entries: Sequence[TokenText], tokenizer: Tokenizer) -> dict[str, Any]:
    """Return the `logprobs` of a chat completion; the bytes of all tokens decode to the text."""
    content = [
        _chat_token(entry.text.encode(), _own(entry))
        | {"top_logprobs": [_chat_token(*one) for one in _tops(entry, tokenizer)]}
        for entry in entries
    ]
    return {"content": content, "refusal": None}


def _own(entry: TokenText) -> float | None:
    return None if entry.logprob is None else _finite(entry.logprob.logprob)


def _alternatives(entry: TokenText, tokenizer: Tokenizer) -> dict[str, float] | None:
    """Return the likeliest texts, and the token itself among them whether it is likely or not."""
    if entry.logprob is None:
        return None
    tops = {_name(data): logprob for data, logprob in _tops(entry, tokenizer)}
    return tops | {entry.text: _finite(entry.logprob.logprob)}


def _tops(entry: TokenText, tokenizer: Tokenizer) -> list[tuple[bytes, float]]:
    """Return the likeliest tokens as bytes; the token itself has those it has in the text."""
    if entry.logprob is None:
        return []
    return [
        (
            entry.text.encode() if token == entry.token_id else tokenizer.bytes_of(token),
            _finite(value),
        )
        for token, value in entry.logprob.top
    ]


def _name(data: bytes) -> str:
    """Return a token's text; where it is part of a character, its bytes as OpenAI writes them."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _chat_token(data: bytes, logprob: float | None) -> dict[str, Any]:
    return {"token": _name(data), "logprob": logprob, "bytes": list(data)}


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else _IMPOSSIBLE


Json: TypeAlias = dict[str, Any]


class ResponseFormat(Protocol):
    """How one kind of completion looks."""

    @property
    def prefix(self) -> str:
        """Begins every id."""
        ...

    @property
    def names(self) -> tuple[str, str]:
        """The `object` of an answer and of a chunk."""
        ...

    def choice(self, answer: Completion) -> Json:
        """Return a finished choice."""
        ...

    def opening(self, answer: Completion) -> list[Json]:
        """Return what introduces a choice before it has tokens."""
        ...

    def chunks(self, answer: Completion, delta: Delta) -> list[Json]:
        """Return what a delta adds to its choice; the answer has it already."""
        ...


class TextCompletionFormat:
    """`/v1/completions`."""

    prefix = "cmpl"
    names = ("text_completion", "text_completion")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def choice(self, answer: Completion) -> Json:
        """Return a finished choice."""
        choice = self._choice(answer, answer.output, offset=0)
        if answer.call.token_ids:
            choice["prompt_token_ids"] = list(answer.request.prompt)
        return choice

    def opening(self, answer: Completion) -> list[Json]:
        """Return an empty choice where there are several: they come in order for the first time."""
        if len(answer.call.requests) == 1:
            return []
        return [{"index": answer.index, "text": "", "logprobs": None, "finish_reason": None}]

    def chunks(self, answer: Completion, delta: Delta) -> list[Json]:
        """Return what a delta adds."""
        return [self._choice(answer, delta, offset=answer.text_length - len(delta.text))]

    def _choice(self, answer: Completion, delta: Delta, *, offset: int) -> Json:
        asked = answer.request.policy.logprobs is not None
        logprobs = text_logprobs(delta.tokens, self._tokenizer, offset=offset) if asked else None
        return {
            "index": answer.index,
            "text": delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish,
            **_extensions(answer, delta),
        }


class ChatCompletionFormat:
    """`/v1/chat/completions`."""

    prefix = "chatcmpl"
    names = ("chat.completion", "chat.completion.chunk")

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def choice(self, answer: Completion) -> Json:
        """Return a finished choice."""
        delta = answer.output
        message = {"role": "assistant", "content": delta.text, "refusal": None}
        return {**self._frame(answer, delta), "message": message}

    def opening(self, answer: Completion) -> list[Json]:
        """Return the role, once a choice."""
        delta = {"role": "assistant", "content": ""}
        return [{"index": answer.index, "delta": delta, "logprobs": None, "finish_reason": None}]

    def chunks(self, answer: Completion, delta: Delta) -> list[Json]:
        """Return the text; and after it, with an empty delta, why the answer ended."""
        chunks: list[Json] = []
        if delta.tokens:
            text = Delta(tokens=delta.tokens)
            chunks.append({**self._frame(answer, text), "delta": {"content": delta.text}})
        if delta.finish:
            chunks.append(
                {**self._frame(answer, Delta(finish=delta.finish, stop=delta.stop)), "delta": {}}
            )
        return chunks

    def _frame(self, answer: Completion, delta: Delta) -> Json:
        asked = answer.request.policy.logprobs is not None and delta.tokens
        return {
            "index": answer.index,
            "logprobs": chat_logprobs(delta.tokens, self._tokenizer) if asked else None,
            "finish_reason": delta.finish,
            **_extensions(answer, delta),
        }


def _extensions(answer: Completion, delta: Delta) -> Json:
    """Return what a choice says beyond OpenAI: who wrote each token, and vLLM's extras."""
    own = [entry for entry in delta.tokens if entry.origin is not None]
    cascade: Json = {
        "origins": "".join(entry.origin or "" for entry in own),
        "tokens": [entry.text for entry in own],
    }
    if delta.finish and answer.request.trace:
        cascade["trace"] = [asdict(row) for row in answer.statistics.trace]
    extensions: Json = {"cascade": cascade}
    if isinstance(delta.stop, str) or delta.stop in answer.call.stop_ids:
        extensions["stop_reason"] = delta.stop
    if answer.call.token_ids:
        extensions["token_ids"] = [entry.token_id for entry in own]
    return extensions


def completion(answers: Completions, shape: ResponseFormat, *, id_: str, created: int) -> Json:
    """Return whole answers."""
    usage = answers.usage
    return {
        "id": id_,
        "object": shape.names[0],
        "created": created,
        "model": answers.call.model,
        "choices": [shape.choice(answer) for answer in answers.all],
        "usage": usage_object(usage),
        **measures(usage),
    }


def usage_object(usage: Usage) -> Json:
    """Return the usage. Dropped drafts are not among the completion tokens."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "completion_tokens_details": {
            "accepted_prediction_tokens": usage.accepted,
            "rejected_prediction_tokens": usage.rejected,
        },
        "cascade": _statistics(usage.statistics),
    }


def _statistics(statistics: Statistics) -> Json:
    fields = asdict(statistics)
    del fields["trace"]
    return fields | {
        "deferral_rate": _ratio(statistics.deferred, statistics.judged),
        "mean_accepted_length": _ratio(statistics.accepted, statistics.rounds),
    }


def measures(usage: Usage) -> Json:
    """Return the figures of drafting as tools that know vLLM and llama.cpp read them."""
    statistics = usage.statistics
    histogram = statistics.accepted_lengths or [0]
    steps, accepted = sum(histogram), sum(at * count for at, count in enumerate(histogram))
    trace = [row for row in statistics.trace if row.drafted]
    steps_told = {
        "per_step_accepted": [row.accepted for row in trace],
        "per_step_drafted": [row.drafted for row in trace],
    }
    speculative = {
        "mean_acceptance_length": 1 + _ratio(accepted, steps),
        "draft_acceptance_rate": _ratio(accepted, statistics.drafted),
        "acceptance_histogram": histogram,
        "num_spec_steps": steps,
        "num_accepted_draft_tokens": accepted,
        "num_draft_tokens": statistics.drafted,
        "num_spec_tokens": len(histogram) - 1,
        **(steps_told if trace else {}),
    }
    return {
        "metrics": {"speculative_decoding": speculative},
        "timings": {"draft_n": statistics.drafted, "draft_n_accepted": statistics.accepted},
    }


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def model(name: str, service: ServingContext) -> Json:
    """Return a model."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "cascade",
        "max_model_len": service.limits.context_tokens,
    }


def error(problem: CascadeError) -> Json:
    """Return an error."""
    fields = {
        "message": problem.message,
        "type": problem.type,
        "param": problem.param,
        "code": problem.code,
    }
    return {"error": fields}
