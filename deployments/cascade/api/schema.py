"""The bodies that OpenAI's clients send: their fields, and the errors of invalid ones.

Fields that cannot change the text are accepted and ignored (`Ignored`). Fields that would change it
and that this server does not implement are accepted only with values that request nothing, such as
`tools: []`; see `UNSUPPORTED`. Unknown fields are refused, unless they are null. What a model wrote
(`Message`, `ToolCall`) is read as it is, so that a client can send back what it received.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias, TypeVar, get_args

from annotated_types import Ge, Gt, Interval, Le, Len, Lt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from cascade.errors import InvalidRequest, UnsupportedParameter
from cascade.rules import Rule
from cascade.types import Bonus, Confidence, Coupling, ExpertLoss, Mode, RowFormat, Verification

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic_core import ErrorDetails

UNSUPPORTED = {
    "audio",
    "best_of",
    "function_call",
    "functions",
    "modalities",
    "moderation",
    "reasoning_effort",
    "response_format",
    "suffix",
    "tool_choice",
    "tools",
    "verbosity",
    "web_search_options",
}
"""Fields whose only accepted values are those that request nothing."""

B = TypeVar("B", bound="Body")
L = TypeVar("L", bound=list[Any])

Text: TypeAlias = Annotated[str, Len(min_length=1)]
TokenId: TypeAlias = Annotated[int, Interval(ge=0, lt=2**32)]
Some: TypeAlias = Annotated[L, Len(min_length=1)]

# Unknown fields of a whole body may be null.
_UNKNOWN = {"extra_forbidden", "none_required", "unexpected_keyword_argument"}

_EXPECTED = {
    "prompt": "it must be a string, a list of strings, a list of token ids or a list of such lists,"
    " and none of them empty"
}

_MAX_VALUE_LENGTH = 80  # characters of a wrong value in an error

_MAX_REASONS = 4  # of one error


class Body(BaseModel):
    """Base of every body and its objects: frozen, without unknown fields or NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Options(Body):
    """The `cascade` object: how to generate this request. Absent fields mean the defaults."""

    mode: Mode | None = None
    """Which models generate: one of them, a cascade, or speculative decoding."""
    rule: Annotated[Rule, Field(discriminator="kind")] | None = None
    """When a token is deferred to the expert."""
    draft_tokens: Annotated[int, Ge(0)] | Literal["auto"] | None = None
    """Tokens the drafter drafts per block; `auto` lets the server choose, 0 is the expert alone."""
    coupling: Coupling | None = None
    """How draft and target share random numbers; `gumbel` by default if the request has a seed."""
    bonus: Bonus | None = None
    """Which token follows a fully accepted block."""
    verification: Verification | None = None
    """Verify a block token by token, or as a whole."""
    rows: RowFormat | None = None
    """How much of its distributions the drafter sends to the expert."""
    patience: PatienceOptions | None = None
    """When a sequence cascade keeps the drafter's text."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds after which the request fails."""
    on_expert_loss: ExpertLoss | None = None
    """What happens if no expert is reachable: an error, or the drafter finishes the text."""
    trace: bool | None = None
    """Return every round of drafting and verification."""


class PatienceOptions(Body):
    """When a sequence cascade keeps the drafter's text."""

    confidence: Confidence | None = Confidence.MEAN
    """How the log-probabilities of the drafter's tokens are aggregated."""
    threshold: float | None = -0.5
    """Least confidence, in nats per token, at which the drafter's text is kept."""


class StreamOptions(Body):
    """What a stream contains besides text."""

    include_usage: bool | None = None
    """Send a last chunk with the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """Send the usage so far in every chunk; needs `include_usage`."""
    include_obfuscation: bool | None = None
    """Accepted and ignored."""


class TextPart(Body, extra="ignore"):
    """A part of a message that is text."""

    type: Literal["text"]
    text: str


class RefusalPart(Body, extra="ignore"):
    """A part of an earlier answer in which the model refused."""

    type: Literal["refusal"]
    refusal: str


class Prediction(Body):
    """Text that the completion is expected to contain; it serves as the first draft."""

    type: Literal["content"]
    content: str | list[TextPart]


class TextFormat(Body):
    """Plain text, the only format."""

    type: Literal["text"]


class FunctionCall(Body, extra="ignore"):
    """A function that the assistant called."""

    name: str
    arguments: JsonValue = None
    """JSON text, as the model wrote it: perhaps empty or cut off."""


class CustomCall(Body, extra="ignore"):
    """A tool that the assistant called with text."""

    name: str
    input: str = ""


class ToolCall(Body, extra="ignore"):
    """A call in an earlier message of the conversation."""

    id: str | None = None
    type: Literal["function", "custom"] | None = None
    function: FunctionCall | None = None
    custom: CustomCall | None = None


class Message(Body, extra="allow"):
    """One message of a conversation. An assistant's may have other fields, which are ignored."""

    role: Literal["developer", "system", "user", "assistant", "tool", "function"]
    content: str | list[TextPart | RefusalPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    reasoning_content: str | None = None
    """What the assistant thought before it answered; its template decides whether it is shown."""
    annotations: JsonValue = None
    audio: None = None
    function_call: FunctionCall | None = None
    """The old form of `tool_calls`."""


class Ignored(Body):
    """Fields that cannot change the text."""

    metadata: JsonValue = None
    parallel_tool_calls: JsonValue = None
    prompt_cache_key: JsonValue = None
    prompt_cache_options: JsonValue = None
    prompt_cache_retention: JsonValue = None
    safety_identifier: JsonValue = None
    service_tier: JsonValue = None
    store: JsonValue = None
    user: JsonValue = None


class Generated(Ignored, extra="allow"):
    """What both kinds of completion have in common."""

    __pydantic_extra__: dict[str, None]  # pyright: ignore[reportIncompatibleVariableOverride] - as pydantic documents
    model: str | None = None
    """The name of a served model; the first one if absent."""
    temperature: Annotated[float, Interval(ge=0, le=2)] | None = None
    """0 is greedy; 1 if absent."""
    top_p: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Sample from the likeliest tokens whose probabilities add up to this."""
    top_k: Annotated[int, Ge(-1)] | None = None
    """Sample from this many likeliest tokens; 0 and -1 mean all."""
    min_p: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Drop tokens less likely than this fraction of the likeliest."""
    presence_penalty: Annotated[float, Interval(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Interval(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Gt(0), Le(10)] | None = None
    logit_bias: dict[int, Annotated[float, Interval(ge=-100, le=100)]] | None = None
    """Added to the logits of token ids."""
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    """The same seed gives the same text."""
    n: Annotated[int, Ge(1)] | None = None
    """Choices per prompt."""
    stop: Text | list[Text] | None = None
    """Up to four strings that end the completion; they are not part of it."""
    stop_token_ids: list[TokenId] | None = None
    """Token ids that end the completion."""
    ignore_eos: bool | None = None
    """Continue after the model's stop token."""
    return_token_ids: bool | None = None
    """Return the token ids of prompt and completion."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prediction: Prediction | None = None
    cascade: Options | None = None


class CompletionBody(Generated):
    """The body of `/v1/completions`."""

    prompt: Text | Some[list[Text]] | Some[list[TokenId]] | Some[list[Some[list[TokenId]]]]
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Ge(0)] | None = None
    """Most tokens of the completion; 16 if absent."""
    logprobs: Annotated[int, Interval(ge=0, le=5)] | None = None
    """Return each token's log-probability and this many alternatives."""
    echo: bool | None = None
    """Begin the completion with the prompt."""
    best_of: int | None = None
    """Only 1 or `n`: every choice is returned."""
    suffix: Literal[""] | None = None

    @field_validator("best_of")
    @classmethod
    def _all_are_returned(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in {None, 1, info.data.get("n")}:
            raise ValueError
        return value


class ChatBody(Generated):
    """The body of `/v1/chat/completions`."""

    messages: Some[list[Message]]
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens of the completion; what the context leaves if absent."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    """The old name of `max_completion_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Interval(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: list[JsonValue] | None = None
    """Only none, or with `tool_choice: "none"`; the model does not see them."""
    function_call: Literal["none", "auto"] | None = None
    functions: list[JsonValue] | None = None
    """The old name of `tools`."""
    modalities: Annotated[list[Literal["text"]], Len(max_length=1)] | None = None
    verbosity: Literal["medium"] | None = None
    audio: None = None
    moderation: None = None
    reasoning_effort: None = None
    web_search_options: None = None

    @field_validator("tools", "functions")
    @classmethod
    def _none_is_called(
        cls, value: list[JsonValue] | None, info: ValidationInfo
    ) -> list[JsonValue] | None:
        choice = "tool_choice" if info.field_name == "tools" else "function_call"
        if value and info.data.get(choice) != "none":
            raise ValueError
        return value


def texts(content: str | list[TextPart] | list[TextPart | RefusalPart] | None) -> list[str]:
    """Return the text of each part of content."""
    if isinstance(content, str):
        return [content]
    return [part.text if isinstance(part, TextPart) else part.refusal for part in content or ()]


def plain(content: str | list[TextPart] | list[TextPart | RefusalPart] | None) -> str:
    """Return content as one text, with a line per part."""
    return "\n".join(texts(content))


def parse(data: bytes, kind: type[B]) -> B:
    """Return the body.

    Raises:
        InvalidRequest: The bytes are not a JSON object of this kind; `param` names the first
            wrong field.
        UnsupportedParameter: A field is unknown, or requests what this server does not implement.
    """
    try:
        return kind.model_validate_json(data, strict=True)
    except ValidationError as error:
        raise invalid_request(error) from None


def invalid_request(error: ValidationError) -> InvalidRequest:
    """Return our error for the first wrong field that pydantic found."""
    details = error.errors(include_url=False, include_context=False)
    if not details[0]["loc"]:
        return InvalidRequest(f"The body is invalid: {details[0]['msg']}")
    detail = _deepest(details)
    field = str(detail["loc"][0])
    if field in UNSUPPORTED:
        return UnsupportedParameter(f"`{field}` is not supported here; leave it out", param=field)
    if detail["type"] in _UNKNOWN and len(detail["loc"]) == 1:
        return UnsupportedParameter(f"`{field}` is unknown here; leave it out", param=field)
    param = _param(detail)
    if detail["type"] == "missing":
        return InvalidRequest(f"`{param}` is missing", param=param)
    reasons = dict.fromkeys(other["msg"] for other in details if _param(other) == param)
    expected = _EXPECTED.get(param) or "; or ".join(list(reasons)[:_MAX_REASONS])
    value = repr(detail["input"])
    if len(value) > _MAX_VALUE_LENGTH:
        value = f"{value[:_MAX_VALUE_LENGTH]}..."
    return InvalidRequest(f"`{param}` is {value}: {expected}", param=param)


def _deepest(details: Sequence[ErrorDetails]) -> ErrorDetails:
    """Return the innermost error of the first wrong field: its union member came closest."""
    field = details[0]["loc"][0]
    if field in _EXPECTED:
        return {**details[0], "loc": (field,)}
    return max((one for one in details if one["loc"][0] == field), key=lambda one: len(one["loc"]))


def _param(detail: ErrorDetails) -> str:
    """Return the path of a field as OpenAI writes it: `messages[0].content`."""
    *path, last = detail["loc"]
    parts = [part for part in path if isinstance(part, int) or part in _FIELDS]
    if detail["type"] in _UNKNOWN or isinstance(last, int) or last in _FIELDS:
        parts.append(last)
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")


def _fields() -> frozenset[str]:
    """Return the name of every field of a body, its objects and the rules."""
    models: list[type[Body]] = [Body]
    for model in models:
        models.extend(model.__subclasses__())
    rules = (field.name for rule in get_args(Rule) for field in dataclasses.fields(rule))
    return frozenset((*rules, *(name for model in models for name in model.model_fields)))


_FIELDS = _fields()
