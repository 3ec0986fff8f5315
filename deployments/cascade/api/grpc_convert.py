"""Converts public protos to the HTTP API's bodies, and completions to protos.

A gRPC request becomes a body, so that both APIs have the same defaults, limits and checks.
"""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.json_format import MessageToDict
from google.protobuf.timestamp_pb2 import Timestamp
from pydantic import ValidationError

from cascade.api import build_request, responses, tokenization
from cascade.api.body import invalid_request, renamed
from cascade.api.response_parser import MessageDelta
from cascade.api.schema import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody
from cascade.errors import InvalidRequest
from cascade.protocol import convert
from cascade.types import GrammarKind, TokenLogprob
from cascade.v1 import cascade_pb2 as pb

if TYPE_CHECKING:
    from enum import StrEnum

    from cascade.api.build_request import CompletionCall
    from cascade.api.completion import Completion, Usage
    from cascade.api.context import ServingContext
    from cascade.api.output_processor import Delta, TokenText
    from cascade.types import Round

# Fields of the HTTP bodies that have another name in the protos; those of `cascade` have no object.
_PROTO_NAMES = {
    "n": "choice_count",
    "stop": "stop_strings",
    "logprobs": "logprob_count",
    "top_logprobs": "logprob_count",
    "messages": "chat.messages",
    "add_generation_prompt": "chat.add_generation_prompt",
    "continue_final_message": "chat.continue_final_message",
    "chat_template_kwargs": "chat.template_variables",
    "tools": "chat.tools",
    "tool_choice": "chat.tool_choice",
    "parallel_tool_calls": "chat.parallel_tool_calls",
    "reasoning_effort": "chat.reasoning_effort",
    "thinking_token_budget": "chat.thinking_token_budget",
    "include_stop_str_in_output": "include_stop",
    "prompt_logprobs": "prompt_logprob_count",
    "response_format": "grammar",
    "structured_outputs": "grammar",
    "tokens": "token_ids",
    "max_completion_tokens": "max_tokens",
    "confidence": "patience.confidence",
    "draft_tokens": "fixed_draft_length",
    "rows": "row_format",
    "on_expert_loss": "expert_loss",
    "on_drafter_loss": "drafter_loss",
    "logit_bias": "sampling.logit_biases",
    **{name: f"sampling.{name}" for name in convert.SAMPLING_FIELDS},
}
_SAME_NAMES = ("skip_special_tokens", "spaces_between_special_tokens", "truncate_prompt_tokens")
_TOOL_CHOICES = {
    pb.TOOL_CHOICE_AUTO: "auto",
    pb.TOOL_CHOICE_NONE: "none",
    pb.TOOL_CHOICE_REQUIRED: "required",
}
_PROMPTS = {"text": "text", "tokens": "tokens.token_ids", "chat": "chat.messages"}

_GRAMMARS = {
    GrammarKind.JSON_SCHEMA: "json",
    GrammarKind.REGEX: "regex",
    GrammarKind.EBNF: "grammar",
    GrammarKind.STRUCTURAL_TAG: "structural_tag",
}

# `cascade.`, a field, and what is below it.
_PATH = re.compile(r"(?:cascade\.)?(\w+)(.*)")


def call(
    message: pb.Generation, service: ServingContext, *, stream: bool = False
) -> CompletionCall:
    """Return what a message requests.

    Args:
        message: What to generate.
        service: What to serve it with.
        stream: The call streams.

    Raises:
        InvalidRequest: This server cannot do it; `param` names the proto field.
        ModelNotFound: It names a model that is not served.
    """
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("`prompt` is missing: set `text`, `tokens` or `chat`", param="prompt")
    body_type = ChatBody if kind == "chat" else CompletionBody
    try:
        if kind == "chat":
            fields = _chat(message) | {"stream": stream}
            return build_request.chat(ChatBody.model_validate(fields), service)
        fields = _text(message, kind) | {"stream": stream}
        return build_request.completion(CompletionBody.model_validate(fields), service)
    except ValidationError as error:
        raise _with_proto_names(invalid_request(error, body_type), kind) from None
    except InvalidRequest as error:
        raise _with_proto_names(error, kind) from error.__cause__


def _with_proto_names(error: InvalidRequest, kind: str) -> InvalidRequest:
    """Return the error with paths of proto fields; `kind` is the prompt that is set."""

    def path(name: str) -> str:
        if (match := _PATH.fullmatch(name)) is None:
            return name
        field, below = match.groups()
        if field == "logit_bias":
            below = ""  # HTTP has token ids there, the protos a list
        return (_PROMPTS[kind] if field == "prompt" else _PROTO_NAMES.get(field, field)) + below

    return renamed(error, path)


def _text(message: pb.Generation, kind: str) -> dict[str, Any]:
    prompt = message.text if kind == "text" else list(message.tokens.token_ids)
    if not prompt:
        raise InvalidRequest("`prompt` is empty; give at least one token", param="prompt")
    body = _common(message) | {"prompt": prompt, "echo": message.echo}
    return body | _present(message, max_tokens="max_tokens", logprobs="logprob_count")


def _chat(message: pb.Generation) -> dict[str, Any]:
    if message.echo:
        raise InvalidRequest("`echo` needs `text` or `tokens`, not `chat`", param="echo")
    body = _common(message) | templated(message.chat) | _tools(message.chat)
    body |= _present(message, max_completion_tokens="max_tokens", top_logprobs="logprob_count")
    return body | {"logprobs": message.HasField("logprob_count")}


def templated(chat: pb.Chat) -> dict[str, Any]:
    """Return a conversation by its HTTP names."""
    return {
        "messages": [_message(one) for one in chat.messages],
        "continue_final_message": chat.continue_final_message,
        "chat_template_kwargs": MessageToDict(chat.template_variables),
        **_present(chat, add_generation_prompt="add_generation_prompt"),
    }


def _message(message: pb.ChatMessage) -> dict[str, Any]:
    """Return a message by its HTTP names."""
    calls = [
        {"id": one.id or None, "function": {"name": one.name, "arguments": one.arguments}}
        for one in message.tool_calls
    ]
    return {
        "role": message.role,
        "content": message.content,
        "tool_calls": calls or None,
        "tool_call_id": message.tool_call_id or None,
        "reasoning_content": message.reasoning or None,
    }


def _tools(chat: pb.Chat) -> dict[str, Any]:
    """Return what a conversation says of tools and thoughts, by its HTTP names."""
    choice = _TOOL_CHOICES.get(chat.tool_choice)
    if chat.function_name and choice is not None:
        raise InvalidRequest(
            f"`function_name` is `{chat.function_name}`, and `tool_choice` is set too; set one",
            param="function_name",
        )
    named = {"type": "function", "function": {"name": chat.function_name}}
    return {
        "tools": [_tool(tool, number) for number, tool in enumerate(chat.tools)] or None,
        "tool_choice": named if chat.function_name else choice,
        "reasoning_effort": chat.reasoning_effort or None,
        **_present(
            chat,
            parallel_tool_calls="parallel_tool_calls",
            thinking_token_budget="thinking_token_budget",  # noqa: S106 - no password
        ),
    }


def _tool(tool: pb.Tool, number: int) -> dict[str, Any]:
    parameters: Any = None
    if tool.parameters:
        try:
            parameters = json.loads(tool.parameters)
        except ValueError as error:
            param = f"chat.tools[{number}].parameters"
            raise InvalidRequest(
                f"`{param}` is no JSON: {error}; send the schema of an object", param=param
            ) from error
    function = {
        "name": tool.name,
        "description": tool.description or None,
        "parameters": parameters,
        "strict": tool.strict or None,
    }
    return {"type": "function", "function": function}


def _common(message: pb.Generation) -> dict[str, Any]:
    """Return the fields that both kinds of body share, by their HTTP names."""
    prediction = {"type": "content", "content": message.prediction}
    return {
        "model": message.model or None,
        "stop": list(message.stop_strings),
        "stop_token_ids": list(message.stop_token_ids),
        "include_stop_str_in_output": message.include_stop,
        "ignore_eos": message.ignore_eos,
        "min_tokens": message.min_tokens,
        "bad_words": list(message.bad_words),
        "allowed_token_ids": list(message.allowed_token_ids) or None,
        "logit_bias": {bias.token_id: bias.bias for bias in message.sampling.logit_biases},
        "prediction": prediction if message.prediction else None,
        "cascade": _options(message),
        **_present(message, n="choice_count", seed="seed", prompt_logprobs="prompt_logprob_count"),
        **_present(message, **{name: name for name in _SAME_NAMES}),
        **_present(message.sampling, **{name: name for name in convert.SAMPLING_FIELDS}),
        **_grammar(message),
    }


def _grammar(message: pb.Generation) -> dict[str, Any]:
    """Return what an answer must match, by its HTTP names."""
    if not message.HasField("grammar"):
        return {}
    grammar, param = convert.decode_grammar(message.grammar), "grammar.text"
    if grammar.kind is not GrammarKind.OPEN_JSON_SCHEMA:
        return {"structured_outputs": {_GRAMMARS[grammar.kind]: grammar.text}}
    try:
        schema = json.loads(grammar.text)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"`{param}` is no JSON: {error}", param=param) from error
    if not isinstance(schema, dict):
        raise InvalidRequest(f"`{param}` is no JSON object", param=param)
    strict = {"schema": schema, "strict": False}
    return {"response_format": {"type": "json_schema", "json_schema": strict}}


def _options(message: pb.Generation) -> dict[str, Any]:
    options = {
        "mode": _member(convert.MODE, message.mode),
        "rule": convert.decode_rule(message.rule) if message.HasField("rule") else None,
        "phases": _phases(message.phases) if message.HasField("phases") else None,
        "coupling": _member(convert.COUPLING, message.coupling),
        "bonus": _member(convert.BONUS, message.bonus),
        "verification": _member(convert.VERIFICATION, message.verification),
        "rows": _member(convert.ROW_FORMAT, message.row_format),
        "on_expert_loss": _member(convert.EXPERT_LOSS, message.expert_loss),
        "on_drafter_loss": _member(convert.DRAFTER_LOSS, message.drafter_loss),
        "trace": message.trace,
        **_present(
            message,
            draft_tokens="fixed_draft_length",
            divergence_budget="divergence_budget",
        ),
    }
    if message.HasField("automatic_draft_length"):
        options["draft_tokens"] = "auto"
    if message.HasField("patience"):
        confidence = _member(convert.CONFIDENCE, message.patience.confidence)
        named = {} if confidence is None else {"confidence": confidence}
        options["patience"] = named | _present(message.patience, threshold="threshold")
    return options


def _phases(message: pb.Phases) -> dict[str, Any]:
    return {
        name: convert.decode_rule(getattr(message, name))
        for name in ("thinking", "answer", "tool")
        if message.HasField(name)
    }


def _member(codec: convert.EnumCodec[Any], value: int) -> StrEnum | None:
    """Return the member of an enum's value; None for the unspecified one."""
    return codec.decode(value) if value else None


def _present(message: Any, **names: str) -> dict[str, Any]:
    """Return the optional fields that are set; `names` maps their new names to those here."""
    return {new: getattr(message, name) for new, name in names.items() if message.HasField(name)}


def tokenize(message: pb.TokenizeRequest, service: ServingContext) -> pb.TokenizeResponse:
    """Return the tokens of a prompt; raises as `call` does."""
    kind = message.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequest("`prompt` is missing: set `text` or `chat`", param="prompt")
    prompt: dict[str, Any] = {"prompt": message.text}
    if kind == "chat":
        prompt = templated(message.chat) | {"tools": _tools(message.chat)["tools"]}
    fields = {
        "model": message.model or None,
        "return_token_strs": message.return_token_strings,
        **prompt,
        **_present(message, add_special_tokens="add_special_tokens"),
    }
    try:
        found = tokenization.tokenize(TokenizeBody.model_validate(fields), service)
    except ValidationError as error:
        raise _with_proto_names(invalid_request(error, TokenizeBody), kind) from None
    except InvalidRequest as error:
        raise _with_proto_names(error, kind) from error.__cause__
    return pb.TokenizeResponse(
        token_ids=found["tokens"],
        token_strings=found["token_strs"],
        context_length=found["max_model_len"],
    )


def detokenize(message: pb.DetokenizeRequest, service: ServingContext) -> pb.DetokenizeResponse:
    """Return the text of tokens; raises as `call` does."""
    body = DetokenizeBody(model=message.model or None, tokens=list(message.token_ids))
    try:
        return pb.DetokenizeResponse(text=tokenization.detokenize(body, service)["prompt"])
    except InvalidRequest as error:
        raise _with_proto_names(error, "tokens") from error.__cause__


def timestamp(seconds: float) -> Timestamp:
    """Return Unix seconds as a timestamp."""
    stamp = Timestamp()
    stamp.FromMilliseconds(int(seconds * 1000))
    return stamp


def _duration(seconds: float) -> Duration:
    duration = Duration()
    duration.FromMicroseconds(round(seconds * 1e6))
    return duration


def choice(completion: Completion, delta: Delta) -> pb.Choice:
    """Return what a delta adds to a completion, or the whole completion as one delta."""
    own = [token for token in delta.tokens if token.origin is not None]
    said = delta.message or MessageDelta(content=delta.text)
    message = pb.Choice(
        index=completion.index,
        text=said.content,
        reasoning=said.reasoning,
        tool_calls=[
            pb.ToolCall(
                index=one.index, id=one.id or "", name=one.name or "", arguments=one.arguments
            )
            for one in said.calls
        ],
        token_ids=[token.token_id for token in delta.tokens],
        origins=[convert.ORIGIN.encode(token.origin) for token in own if token.origin],
    )
    if completion.request.policy.logprobs is not None:
        convert.encode_logprobs(map(_logprob, delta.tokens), message.logprobs)
        if completion.request.trace:
            convert.encode_logprobs(map(_draft, own), message.drafts)
    if delta.finish is not None:
        message.finish_reason = convert.FINISH_REASON.encode(delta.finish)
        statistics = completion.statistics
        message.rounds.extend(map(_round, statistics.trace))
        message.undrafted_rounds.update(statistics.undrafted_rounds)
        if (divergence := responses.divergence(statistics)) is not None:
            message.divergence = divergence
    if completion.prompt_logprobs is not None:
        first = TokenLogprob(token=completion.request.prompt[0], logprob=math.nan)
        convert.encode_logprobs((first, *completion.prompt_logprobs), message.prompt_logprobs)
    return message


def _logprob(token: TokenText) -> TokenLogprob:
    """Return a token's log-probability; the first token of a prompt has none, which is NaN."""
    return token.logprob or TokenLogprob(token=token.token_id, logprob=math.nan)


def _draft(token: TokenText) -> TokenLogprob:
    """Return what the drafter proposed at a token's position; NaN if nothing is known of it."""
    return token.draft or TokenLogprob(token=token.token_id, logprob=math.nan)


def _round(entry: Round) -> pb.Round:
    return pb.Round(
        position=entry.position,
        drafted_count=entry.drafted,
        accepted_count=entry.accepted,
        deferred_count=entry.deferred,
        token_count=entry.tokens,
        draft_duration=_duration(entry.draft_ms / 1000),
        judge_duration=_duration(entry.judge_ms / 1000),
        undrafted_cause=entry.undrafted,
        divergence=entry.divergence,
    )


def usage(cost: Usage) -> pb.Usage:
    """Return what a call cost."""
    statistics = cost.statistics
    return pb.Usage(
        prompt_token_count=cost.prompt_tokens,
        completion_token_count=cost.completion_tokens,
        cached_prompt_token_count=cost.cached_tokens,
        reasoning_token_count=cost.reasoning_tokens,
        round_count=statistics.rounds,
        drafted_count=statistics.drafted,
        accepted_count=statistics.accepted,
        judged_count=statistics.judged,
        deferred_count=statistics.deferred,
        drafter_token_count=statistics.drafter_tokens,
        kept_token_count=statistics.kept_tokens,
        expert_token_count=statistics.expert_tokens,
        forced_token_count=statistics.forced_tokens,
        drafter_pass_count=statistics.drafter_passes,
        expert_pass_count=statistics.expert_passes,
        predicted_accepted_count=statistics.predicted_accepted,
        predicted_rejected_count=statistics.predicted_rejected,
        sent_bytes=statistics.sent_bytes,
        received_bytes=statistics.received_bytes,
        failover_count=statistics.failovers,
        accepted_lengths=statistics.accepted_lengths,
        draft_length_reason=statistics.draft_length_reason,
        expert_loss_count=statistics.expert_losses,
        branched_round_count=statistics.branched_rounds,
        lost_mass=statistics.lost_mass,
        divergence=responses.divergence(statistics),
        unmeasured_token_count=statistics.unmeasured_tokens,
        spent_budget_count=statistics.spent_budgets,
        cost=pb.Cost(
            drafter_pass_duration=_duration(statistics.drafter_pass_s),
            expert_pass_duration=_duration(statistics.expert_pass_s),
            drafter_price=cost.price.drafter,
            expert_price=cost.price.expert,
        ),
        undrafted_rounds=statistics.undrafted_rounds,
        drafter_duration=_duration(statistics.drafter_s),
        expert_duration=_duration(statistics.expert_s),
    )
