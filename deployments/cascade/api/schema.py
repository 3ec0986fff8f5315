"""The bodies that OpenAI's clients send: their fields, and the errors of invalid ones.

Fields that cannot change the text are accepted and ignored (`Ignored`). Fields that would change it
and that this server does not implement are accepted only with values that request nothing, such as
`suffix: ""`; see `Neutral`. Unknown fields are refused, unless they are null. What a model wrote
(`Message`, `ToolCall`) is read as it is, so that a client can send back what it received.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, TypeAlias, TypeVar

from annotated_types import Ge, Gt, Interval, Len, Lt
from pydantic import (
    BeforeValidator,
    Field,
    JsonValue,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from cascade.api.body import Body, text_alone
from cascade.rules import Rule  # noqa: TC001 - pydantic reads the annotations
from cascade.types import (
    Bonus,
    Confidence,
    Coupling,
    Divergence,
    DrafterLoss,
    ExpertLoss,
    Mode,
    RepetitionPenalty,
    RowFormat,
    Verification,
)

L = TypeVar("L", bound=list[Any])

Text: TypeAlias = Annotated[str, Len(min_length=1)]
Effort: TypeAlias = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
TokenId: TypeAlias = Annotated[int, Interval(ge=0, lt=2**32)]
Some: TypeAlias = Annotated[L, Len(min_length=1)]


class Options(Body):
    """The `cascade` object: how to generate this request. Absent fields mean the defaults."""

    mode: Mode | None = None
    """Which models generate: one of them, a cascade, or speculative decoding."""
    rule: Annotated[Rule, Field(discriminator="kind")] | None = None
    """When a token is deferred to the expert."""
    phases: Phases | None = None
    """Other rules for thoughts, answer or tool calls."""
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
    on_drafter_loss: DrafterLoss | None = None
    """What happens while no drafter drafts: the expert writes alone, or the text waits for one."""
    divergence_budget: Divergence | None = None
    """Most divergence from the expert, over all tokens; once spent, the expert is followed."""
    trace: bool | None = False
    """Return every round of drafting and verification."""


class Phases(Body):
    """The rules of the parts of an answer, in place of `rule`; an absent part has `rule`."""

    thinking: Annotated[Rule, Field(discriminator="kind")] | None = None
    """Of what the model thinks before it answers."""
    answer: Annotated[Rule, Field(discriminator="kind")] | None = None
    """Of text that is neither thought nor tool call."""
    tool: Annotated[Rule, Field(discriminator="kind")] | None = None
    """Of tool calls."""


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

    type: Annotated[Literal["text"], BeforeValidator(text_alone)]
    text: str


class RefusalPart(Body, extra="ignore"):
    """A part of an earlier answer in which the model refused."""

    type: Annotated[Literal["refusal"], BeforeValidator(text_alone)]
    refusal: str


class Prediction(Body):
    """Text that the completion is expected to contain; it serves as the first draft."""

    type: Literal["content"]
    content: str | list[TextPart]


class TextFormat(Body):
    """Plain text."""

    type: Literal["text"]


class JsonObjectFormat(Body):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Body):
    """A JSON schema as OpenAI wraps it."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, JsonValue] = Field(alias="schema")
    """The schema."""
    strict: bool | None = None
    """If false, objects may have properties that the schema neither names nor forbids."""


class JsonSchemaFormat(Body):
    """JSON that a schema describes."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


class StructuralTagFormat(Body, extra="allow"):
    """Text with tags that begin grammars, as xgrammar has it."""

    type: Literal["structural_tag"]


class StructuredOutputs(Body):
    """What the answer must match, as vLLM has it: exactly one of these."""

    json_: dict[str, JsonValue] | str | None = Field(default=None, alias="json")
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    """A regular expression."""
    choice: Some[list[Text]] | None = None
    """Texts, one of which is the answer."""
    grammar: str | None = None
    """A grammar in EBNF; its rule `root` is the answer."""
    json_object: Literal[True] | None = None
    """Any JSON object."""
    structural_tag: str | None = None
    """Text with tags that begin grammars, in JSON as xgrammar has it."""


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


class FunctionTool(Body, extra="ignore"):
    """A function that the model may call."""

    name: Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, JsonValue] | None = None
    """The JSON schema of its arguments, an object; any arguments if absent."""
    strict: bool | None = None
    """Hold the arguments to the schema."""


class Tool(Body, extra="ignore"):
    """What the model may call."""

    type: Literal["function"]
    function: FunctionTool


class FunctionName(Body, extra="ignore"):
    """The name of a function."""

    name: str


class NamedTool(Body, extra="ignore"):
    """The function that the model must call."""

    type: Literal["function"]
    function: FunctionName


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
    reasoning: str | None = None
    """Another name of `reasoning_content`."""
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

    __pydantic_extra__: dict[str, None] = Field(init=False)  # pyright: ignore[reportIncompatibleVariableOverride] - as pydantic documents
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
    repetition_penalty: RepetitionPenalty | None = None
    logit_bias: dict[int, Annotated[float, Interval(ge=-100, le=100)]] | None = None
    """Added to the logits of token ids."""
    seed: Annotated[int, Ge(-(2**63)), Lt(2**63)] | None = None
    """The same seed gives the same text."""
    n: Annotated[int, Ge(1)] | None = None
    """Choices per prompt."""
    stop: Text | list[Text] | None = None
    """Strings that end the completion; they are not part of it."""
    stop_token_ids: list[TokenId] | None = None
    """Token ids that end the completion."""
    include_stop_str_in_output: bool | None = None
    """Keep the stop string, or the text of the stop token, at the end of the completion."""
    ignore_eos: bool | None = None
    """Continue after the model's stop token."""
    min_tokens: Annotated[int, Ge(0)] | None = None
    """Tokens of the completion before which no stop token and no stop string ends it."""
    bad_words: list[Text] | None = None
    """Words and phrases that the completion may not contain."""
    allowed_token_ids: Some[list[TokenId]] | None = None
    """The only tokens that the completion may have."""
    skip_special_tokens: bool | None = None
    """Leave special tokens out of the text; true if absent."""
    spaces_between_special_tokens: bool | None = None
    """Keep spaces that the tokenizer writes between special tokens; true if absent."""
    truncate_prompt_tokens: Annotated[int, Ge(-1)] | None = None
    """Keep this many tokens at the end of a prompt; -1 keeps as many as fit."""
    prompt_logprobs: Annotated[int, Interval(ge=0, le=20)] | None = None
    """Return the expert's log-probability of each prompt token and this many alternatives."""
    return_token_ids: bool | None = None
    """Return the token ids of prompt and completion."""
    response_format: (
        Annotated[
            TextFormat | JsonObjectFormat | JsonSchemaFormat | StructuralTagFormat,
            Field(discriminator="type"),
        ]
        | None
    ) = None
    """What the completion must match."""
    structured_outputs: StructuredOutputs | None = None
    """The same, with regular expressions, choices and grammars."""
    guided_json: dict[str, JsonValue] | str | None = None
    """The old form of `structured_outputs.json`."""
    guided_regex: str | None = None
    """The old form of `structured_outputs.regex`."""
    guided_choice: Some[list[Text]] | None = None
    """The old form of `structured_outputs.choice`."""
    guided_grammar: str | None = None
    """The old form of `structured_outputs.grammar`."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    prediction: Prediction | None = None
    cascade: Options | None = None


class Neutral(Generated):
    """Fields of OpenAI and vLLM whose only accepted values are those that request nothing."""

    audio: None = None
    best_of: int | None = None
    """Only 1 or `n`: every choice is returned."""
    function_call: Literal["none", "auto"] | None = None
    functions: list[JsonValue] | None = None
    """The old name of `tools`."""
    length_penalty: Annotated[float, Interval(ge=1, le=1)] | None = None
    modalities: Annotated[list[Literal["text"]], Len(max_length=1)] | None = None
    moderation: None = None
    reasoning_effort: None = None
    suffix: Literal[""] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    tools: list[JsonValue] | None = None
    """Only none, or with `tool_choice: "none"`; the model does not see them."""
    use_beam_search: Literal[False] | None = None
    verbosity: Literal["medium"] | None = None
    web_search_options: None = None

    @field_validator("best_of")
    @classmethod
    def _all_are_returned(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value not in {None, 1, info.data.get("n")}:
            raise ValueError
        return value


Neutral.unsupported = frozenset(Neutral.model_fields.keys() - Generated.model_fields.keys())


class CompletionBody(Neutral):
    """The body of `/v1/completions`."""

    expected: ClassVar[dict[str, str]] = {
        "prompt": "it must be a string, a list of strings, a list of token ids or a list of such"
        " lists, and none of them empty"
    }
    prompt: Text | Some[list[Text]] | Some[list[TokenId]] | Some[list[Some[list[TokenId]]]]
    """Text, token ids, or a list of either."""
    max_tokens: Annotated[int, Ge(0)] | None = None
    """Most tokens of the completion; 16 if absent."""
    logprobs: Annotated[int, Interval(ge=0, le=20)] | None = None
    """Return each token's log-probability and this many alternatives."""
    echo: bool | None = None
    """Begin the completion with the prompt."""
    add_generation_prompt: Literal[True] | None = None
    """Of chats; accepted where it requests nothing."""
    continue_final_message: Literal[False] | None = None
    """Likewise."""

    @field_validator("tools", "functions")
    @classmethod
    def _none_is_called(
        cls, value: list[JsonValue] | None, info: ValidationInfo
    ) -> list[JsonValue] | None:
        choice = "tool_choice" if info.field_name == "tools" else "function_call"
        if value and info.data.get(choice) != "none":
            raise ValueError
        return value


class Template(Body):
    """How the model's chat template renders a conversation."""

    add_generation_prompt: bool | None = None
    """Begin an answer; true if absent, unless the final message is continued."""
    continue_final_message: bool | None = None
    """Continue the last message instead of answering it."""
    chat_template_kwargs: dict[str, JsonValue] | None = None
    """Further variables of the chat template, such as `enable_thinking`."""


class ChatBody(Template, Neutral):
    """The body of `/v1/chat/completions`."""

    messages: Some[list[Message]]
    max_completion_tokens: Annotated[int, Ge(1)] | None = None
    """Most tokens of the completion; what the context leaves if absent."""
    max_tokens: Annotated[int, Ge(1)] | None = None
    """The old name of `max_completion_tokens`."""
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Interval(ge=0, le=20)] | None = None
    tools: list[Tool] | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - a chat has more
    """What the model may call."""
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - as above
    """Whether it calls something; `auto` if absent, and with `none` it does not see the tools."""
    parallel_tool_calls: bool | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - as above
    """Whether there may be several calls; true if absent."""
    functions: list[FunctionTool] | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - as above
    """The old form of `tools`."""
    function_call: Literal["none", "auto"] | FunctionName | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - as above
    """The old form of `tool_choice`."""
    reasoning_effort: Effort | None = None  # pyright: ignore[reportIncompatibleVariableOverride] - as above
    """A variable of the chat template; `none` also sets its `enable_thinking` to false."""
    thinking_token_budget: Annotated[int, Ge(0)] | None = None
    """Most tokens of thoughts: after them the model is made to answer."""
    thinking_budget: Annotated[int, Ge(0)] | None = None
    """Another name of `thinking_token_budget`."""


class TokenizeBody(Template):
    """The body of `/tokenize`, as vLLM has it: a prompt or messages."""

    model: str | None = None
    prompt: str | None = None
    messages: Some[list[Message]] | None = None
    tools: list[Tool] | None = None
    """What the model may call, with `messages`."""
    add_special_tokens: bool | None = None
    """Add the tokens that the model expects first; if absent, true for a prompt only."""
    return_token_strs: bool | None = None
    """Return each token as the vocabulary writes it."""


class DetokenizeBody(Body):
    """The body of `/detokenize`, as vLLM has it."""

    model: str | None = None
    tokens: list[TokenId]


def texts(content: str | list[TextPart] | list[TextPart | RefusalPart] | None) -> list[str]:
    """Return the text of each part of content."""
    if isinstance(content, str):
        return [content]
    return [part.text if isinstance(part, TextPart) else part.refusal for part in content or ()]


def plain(content: str | list[TextPart] | list[TextPart | RefusalPart] | None) -> str:
    """Return content as one text, with a line per part."""
    return "\n".join(texts(content))
