"""The public protos as the door's own values and back; what they ask for goes the way of HTTP."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Interval
from google.protobuf.duration_pb2 import Duration
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from cascade.api import build_request
from cascade.api.schema import ChatBody, CompletionBody
from cascade.api.validation import refusal
from cascade.errors import InvalidRequest
from cascade.protocol import convert
from cascade.protocol.convert import decode_rule, encode_logprobs
from cascade.types import TokenLogprob
from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from enum import StrEnum

    from cascade.api.build_request import CompletionCall
    from cascade.api.completion import Completion, Usage
    from cascade.api.context import ServingContext
    from cascade.api.output_processor import Delta, TokenText
    from cascade.types import Round, Statistics

_NAMES = {
    "n": "choice_count",
    "stop": "stop_strings",
    "logprobs": "logprob_count",
    "top_logprobs": "logprob_count",
    "messages": "chat",
    "max_completion_tokens": "max_tokens",
    "cascade.draft_tokens": "fixed_draft_length",
    "cascade.rule": "rule",
    "cascade.verification": "verification",
    "temperature": "sampling.temperature",
    "top_p": "sampling.top_p",
    "top_k": "sampling.top_k",
    "min_p": "sampling.min_p",
    "repetition_penalty": "sampling.repetition_penalty",
    "presence_penalty": "sampling.presence_penalty",
    "frequency_penalty": "sampling.frequency_penalty",
    "logit_bias": "sampling.logit_biases",
}

"""Fields of the HTTP bodies that are called otherwise in the protos."""

_SAMPLING = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


class _Text(CompletionBody):
    """A completion with as many alternatives as a chat may have."""

    logprobs: Annotated[int, Interval(ge=0, le=20)] | None = None


def call(message: pb.Generation, service: ServingContext) -> CompletionCall:
    """Return what a message asks for.

    Raises:
        InvalidRequest: It asks for what this server cannot give; `param` names the field.
        ModelNotFound: It names another server's model.
    """
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("`prompt` is missing: set `text`, `tokens` or `chat`", param="prompt")
    try:
        if kind == "chat":
            return build_request.chat(ChatBody.model_validate(_chat(message)), service)
        return build_request.completion(_Text.model_validate(_text(message, kind)), service)
    except ValidationError as error:
        raise _renamed(refusal(error)) from None
    except InvalidRequest as error:
        raise _renamed(error) from error.__cause__


def _renamed(error: InvalidRequest) -> InvalidRequest:
    """Return the error with the field called as the protos call it."""
    name = _NAMES.get(error.param or "")
    if name is None:
        return error
    return type(error)(error.message.replace(f"`{error.param}`", f"`{name}`"), param=name)


def _text(message: pb.Generation, kind: str) -> dict[str, Any]:
    prompt = message.text if kind == "text" else list(message.tokens.token_ids)
    told = _common(message) | {"prompt": prompt, "echo": message.echo}
    return told | _present(message, max_tokens="max_tokens", logprobs="logprob_count")


def _chat(message: pb.Generation) -> dict[str, Any]:
    if message.echo:
        raise InvalidRequest("`echo` goes with `text` and `tokens`, not with `chat`", param="echo")
    turns = [{"role": turn.role, "content": turn.content} for turn in message.chat.messages]
    told = _common(message) | {"messages": turns}
    told |= _present(message, max_completion_tokens="max_tokens", top_logprobs="logprob_count")
    return told | {"logprobs": message.HasField("logprob_count")}


def _common(message: pb.Generation) -> dict[str, Any]:
    """Return the fields that both kinds of body share, by their HTTP names."""
    prediction = {"type": "content", "content": message.prediction}
    return {
        "model": message.model or None,
        "stop": list(message.stop_strings),
        "stop_token_ids": list(message.stop_token_ids),
        "logit_bias": {bias.token_id: bias.bias for bias in message.sampling.logit_biases},
        "prediction": prediction if message.prediction else None,
        "cascade": _options(message),
        **_present(message, n="choice_count", seed="seed"),
        **_present(message.sampling, **{name: name for name in _SAMPLING}),
    }


def _options(message: pb.Generation) -> dict[str, Any]:
    return {
        "mode": _member(convert.MODE, message.mode),
        "rule": decode_rule(message.rule) if message.HasField("rule") else None,
        "draft_tokens": _draft_tokens(message),
        "coupling": _member(convert.COUPLING, message.coupling),
        "bonus": _member(convert.BONUS, message.bonus),
        "verification": _member(convert.VERIFICATION, message.verification),
        "rows": _member(convert.ROW_FORMAT, message.row_format),
        "patience": _patience(message.patience) if message.HasField("patience") else None,
        "on_expert_loss": _member(convert.EXPERT_LOSS, message.expert_loss),
        "trace": message.trace,
    }


def _draft_tokens(message: pb.Generation) -> int | str | None:
    match message.WhichOneof("draft_length"):
        case "fixed_draft_length":
            return message.fixed_draft_length
        case "automatic_draft_length":
            return "auto"
        case None:
            return None


def _patience(message: pb.Patience) -> dict[str, Any]:
    confidence = _member(convert.CONFIDENCE, message.confidence)
    named = {} if confidence is None else {"confidence": confidence}
    return named | _present(message, threshold="threshold")


def _member(enumeration: convert.Enumeration[Any], value: int) -> StrEnum | None:
    """Return our member of an enum's value; what is unspecified is left to the server."""
    return enumeration.decode(value) if value else None


def _present(message: Any, **names: str) -> dict[str, Any]:
    """Return those of the optional fields that are set, under other names."""
    return {
        ours: getattr(message, theirs) for ours, theirs in names.items() if message.HasField(theirs)
    }


def timestamp(seconds: float) -> Timestamp:
    """Return Unix seconds as a timestamp."""
    stamp = Timestamp()
    stamp.FromMilliseconds(int(seconds * 1000))
    return stamp


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


def choice(answer: Completion, delta: Delta) -> pb.Choice:
    """Return what a delta adds to an answer, or the whole answer as one delta."""
    own = [entry.origin for entry in delta.tokens if entry.origin is not None]
    message = pb.Choice(
        index=answer.index,
        text=delta.text,
        token_ids=[entry.token_id for entry in delta.tokens],
        origins=[convert.ORIGIN.encode(origin) for origin in own],
    )
    if answer.request.policy.logprobs is not None:
        encode_logprobs(map(_logprob, delta.tokens), message.logprobs)
    if delta.finish is not None:
        message.finish_reason = convert.FINISH_REASON.encode(delta.finish)
        message.rounds.extend(map(_round, answer.statistics.trace))
    return message


def _logprob(entry: TokenText) -> TokenLogprob:
    """Return an entry's log-probability; the first token of a prompt has none, which is NaN."""
    return entry.logprob or TokenLogprob(token=entry.token_id, logprob=math.nan)


def _round(row: Round) -> pb.Round:
    return pb.Round(
        position=row.position,
        drafted_count=row.drafted,
        accepted_count=row.accepted,
        deferred_count=row.deferred,
        token_count=row.tokens,
        draft_duration=_duration(row.draft_ms / 1000),
        judge_duration=_duration(row.judge_ms / 1000),
    )


def usage(cost: Usage) -> pb.Usage:
    """Return what a call cost."""
    return pb.Usage(
        prompt_token_count=cost.prompt_tokens,
        completion_token_count=cost.completion_tokens,
        cached_prompt_token_count=cost.cached_tokens,
        **_counts(cost.statistics),
        drafter_duration=_duration(cost.statistics.drafter_s),
        expert_duration=_duration(cost.statistics.expert_s),
    )


def _counts(was: Statistics) -> dict[str, Any]:
    return {
        "round_count": was.rounds,
        "drafted_count": was.drafted,
        "accepted_count": was.accepted,
        "judged_count": was.judged,
        "deferred_count": was.deferred,
        "drafter_token_count": was.drafter_tokens,
        "kept_token_count": was.kept_tokens,
        "expert_token_count": was.expert_tokens,
        "drafter_pass_count": was.drafter_passes,
        "expert_pass_count": was.expert_passes,
        "predicted_accepted_count": was.predicted_accepted,
        "predicted_rejected_count": was.predicted_rejected,
        "sent_bytes": was.sent_bytes,
        "received_bytes": was.received_bytes,
        "failover_count": was.failovers,
        "accepted_lengths": was.accepted_lengths,
        "draft_length_reason": was.draft_length_reason,
        "expert_loss_count": was.expert_losses,
        "branched_round_count": was.branched_rounds,
    }
