"""The bodies that OpenAI's clients send, as types: what they may say and nothing else.

Fields that cannot change the text are accepted and dropped (`Ignored`). Fields that would change it
and that this server does not implement are accepted only where they say nothing, like `tools: []`;
see `UNSUPPORTED`. Everything unknown is refused.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from annotated_types import Ge, Gt, Interval, Le, Len, Lt
from pydantic import BaseModel, ConfigDict, Field, JsonValue

from cascade.rules import Rule  # noqa: TC001 - pydantic reads annotations
from cascade.types import Bonus, Confidence, Coupling, ExpertLoss, Mode, RowFormat, Verification

UNSUPPORTED = frozenset(
    {
        "audio",
        "best_of",
        "function_call",
        "functions",
        "modalities",
        "response_format",
        "suffix",
        "tool_choice",
        "tools",
        "web_search_options",
    }
)

"""Declared fields whose only accepted values are those that ask for nothing."""

L = TypeVar("L", bound=list[Any])

Text: TypeAlias = Annotated[str, Len(min_length=1)]

TokenId: TypeAlias = Annotated[int, Interval(ge=0, lt=2**32)]

Some: TypeAlias = Annotated[L, Len(min_length=1)]

Nothing: TypeAlias = Annotated[list[JsonValue], Len(max_length=0)]


class Body(BaseModel):
    """The manners of every body: frozen, no surprises, no NaN."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Options(Body):
    """The `cascade` object: how this one answer is to be made. Absent fields mean the server's."""

    mode: Mode | None = None
    """Who writes: one model alone, a cascade, or speculation."""
    rule: Annotated[Rule, Field(discriminator="kind")] | None = None
    """When a token is given to the expert."""
    draft_tokens: Annotated[int, Ge(0)] | Literal["auto"] | None = None
    """Tokens the drafter writes ahead; `auto` lets the server choose, 0 is the expert alone."""
    coupling: Coupling | None = None
    """How draft and target share their randomness; `gumbel` where the request has a seed."""
    bonus: Bonus | None = None
    """What follows a wholly accepted block."""
    verification: Verification | None = None
    """Judge a block token by token, or as a whole."""
    rows: RowFormat | None = None
    """What the drafter sends of its distribution."""
    patience: PatienceOptions | None = None
    """When a sequence cascade keeps the drafter's answer."""
    deadline_s: Annotated[float, Gt(0)] | None = None
    """Seconds after which the answer ends with an error."""
    on_expert_loss: ExpertLoss | None = None
    """What becomes of the answer if no expert is left: an error, or the drafter ends it."""
    trace: bool = False
    """Report every round in the answer."""


class PatienceOptions(Body):
    """When a sequence cascade keeps the drafter's answer."""

    confidence: Confidence = Confidence.MEAN
    """What is read of the log-probabilities of the drafter's tokens."""
    threshold: float = -0.5
    """Least confidence, in nats per token, at which the drafter's answer stands."""


class StreamOptions(Body):
    """What a stream carries besides text."""

    include_usage: bool | None = None
    """End with a chunk that has the usage and no choices."""
    continuous_usage_stats: bool | None = None
    """Carry the usage so far in every chunk; needs `include_usage`."""
    include_obfuscation: bool | None = None
    """Accepted; this server pads nothing."""


class TextPart(Body):
    """A piece of text."""

    type: Literal["text"]
    text: str


class Prediction(Body):
    """Text that the answer is expected to contain; it serves as the first draft."""

    type: Literal["content"]
    content: str | list[TextPart]


class TextFormat(Body):
    """Plain text, the one format there is."""

    type: Literal["text"]


class FunctionCall(Body):
    """What an assistant once called."""

    name: str
    arguments: str


class ToolCall(Body):
    """A call that an earlier turn of the conversation made."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class Message(Body):
    """One turn of a conversation."""

    role: Literal["developer", "system", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_call_id: str | None = None
    tool_calls: list[ToolCall] | None = None
    refusal: str | None = None
    annotations: JsonValue = None
    audio: None = None
    function_call: None = None


class Ignored(Body):
    """Fields that cannot change the text."""

    metadata: JsonValue = None
    parallel_tool_calls: JsonValue = None
    prompt_cache_key: JsonValue = None
    prompt_cache_retention: JsonValue = None
    safety_identifier: JsonValue = None
    service_tier: JsonValue = None
    store: JsonValue = None
    user: JsonValue = None


class Generated(Ignored):
    """What both kinds of completion have in common."""

    model: str | None = None
    """The name of a served model; the first one if absent."""
    temperature: Annotated[float, Interval(ge=0, le=2)] | None = None
    """0 is greedy; 1 if absent."""
    top_p: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Sample from the likeliest tokens that have this mass together."""
    top_k: Annotated[int, Ge(-1)] | None = None
    """Sample from this many likeliest tokens; 0 and -1 mean all."""
    min_p: Annotated[float, Interval(ge=0, le=1)] | None = None
    """Drop tokens less likely than this part of the likeliest."""
    presence_penalty: Annotated[float, Interval(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Interval(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Gt(0), Le(10)] | None = None
    logit_bias: dict[int, Annotated[float, Interval(ge=-100, le=100)]] | None = None
    """Added to the logits of token ids."""
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    """The same seed gives the same text."""
    n: Annotated[int, Ge(1)] | None = None
    """Answers per prompt."""
    stop: Text | list[Text] | None = None
    """Up to four strings at which the answer ends; they are not part of it."""
    stop_token_ids: list[TokenId] | None = None
    """Token ids at which the answer ends."""
    ignore_eos: bool | None = None
    """Write on past the end of the text."""
    return_token_ids: bool | None = None
    """Report the token ids of prompt and answer."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prediction: Prediction | None = None
    cascade: Options | None = None


class CompletionBody(Generated):
    """The body of `/v1/completions`."""

    prompt: Text | Some[list[Text]] | Some[list[TokenId]] | Some[list[Some[list[TokenId]]]]
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Ge(0)] | None = None
    """The longest answer in tokens; 16 if absent."""
    logprobs: Annotated[int, Interval(ge=0, le=5)] | None = None
    """Report each token's log-probability and this many alternatives."""
    echo: bool | None = None
    """Begin the answer with the prompt."""
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None


class ChatBody(Generated):
    """The body of `/v1/chat/completions`."""

    messages: Some[list[Message]]
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    """The longest answer in tokens; what the context leaves if absent."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    """The old name of `max_completion_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Interval(ge=0, le=20)] | None = None
    response_format: TextFormat | None = None
    tools: Nothing | None = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Nothing | None = None
    function_call: Literal["none", "auto"] | None = None
    modalities: Annotated[list[Literal["text"]], Len(max_length=1)] | None = None
    audio: None = None
    web_search_options: None = None


def plain(content: str | list[TextPart] | None) -> str:
    """Return content as one text; parts stand on lines of their own."""
    if content is None:
        return ""
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def fields() -> frozenset[str]:
    """Return every name that may stand in a body, of all its objects."""
    models: list[type[Any]] = [Body]
    for model in models:
        models.extend(model.__subclasses__())
    return frozenset(name for model in models for name in model.model_fields)
