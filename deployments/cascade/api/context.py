"""What both APIs serve: the generator, its tokenizer, limits and defaults."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval, Le
from pydantic import BeforeValidator, ConfigDict, Field, TypeAdapter, ValidationError

from cascade.api.bodies import Bodies
from cascade.api.keys import Keys, Quotas
from cascade.errors import StartupError
from cascade.protocol.services import DRAFT_LIMIT
from cascade.rules import Lossless, Rule
from cascade.types import (
    Bonus,
    Confidence,
    Coupling,
    Divergence,
    DrafterLoss,
    ExpertLoss,
    Mode,
    Natural,
    Positive,
    Prices,
    RepetitionPenalty,
    RowFormat,
    Seconds,
    SequenceCascadeParams,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    from cascade.api.playground.evaluation import Evaluation
    from cascade.engine.tokenizer import Tokenizer
    from cascade.structured.checker import GrammarChecker
    from cascade.types import Generator

MAX_SEED = 2**63
COMPLETION_TOKENS = 16  # OpenAI's default for text completions


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one call may ask for; the `limits` branch of the settings."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    context_tokens: Positive = 4096  # prompt and completion together
    prompt_tokens: Positive | None = None  # None: what the context leaves
    max_tokens: Positive | None = None  # of one completion; None: what the context leaves
    choices: Positive = 16  # `n`
    prompts: Positive = 64  # in one call
    answers: Positive = 128  # in one call: prompts times choices
    clamp_max_tokens: bool = False  # to what the context leaves, instead of refusing more
    stop_strings: Positive = 64
    stop_characters: Positive = 1024
    bad_words: Positive = 1024  # of at most `stop_characters` each
    biased_tokens: Positive = 1024
    grammar_characters: Positive = 131072  # of a schema, a regular expression or the like
    tools: Positive = 128
    draft_tokens: Annotated[Positive, Le(DRAFT_LIMIT)] = 32
    divergence_budget: Divergence | None = None  # every answer then has one; None: any or none
    body_bytes: Positive = 2_000_000  # also of a gRPC message
    body_s: Seconds = 30.0  # until a body has arrived
    bodies: Positive = 64  # that a router reads at the same time


@dataclass(frozen=True, slots=True, kw_only=True)
class Cors:
    """Which web pages may call from a browser, as Starlette has it; by default none."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    allow_origins: tuple[str, ...] = ()  # such as https://chat.example.com; "*" is any
    allow_origin_regex: str | None = None
    allow_methods: tuple[str, ...] = ("GET", "POST")
    allow_headers: tuple[str, ...] = ("*",)
    allow_credentials: bool = False  # cookies; keys in `Authorization` do not need it
    max_age: Natural = 600  # seconds that a browser remembers the answer


def _spelled(value: object) -> object:
    """Return `off` as it was written: YAML reads it as false."""
    return "off" if value is False else value


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The values of absent request fields; the `defaults` branch of the settings."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    mode: Mode = Mode.CASCADE
    rule: Annotated[Rule, Field(discriminator="kind")] = field(default_factory=Lossless)
    draft_tokens: Annotated[Natural, Le(DRAFT_LIMIT)] | Literal["auto"] = "auto"
    coupling: Coupling | None = None  # None: gumbel if the request has a seed, else maximal
    bonus: Bonus = Bonus.EXPERT
    verification: Verification = Verification.TOKEN
    rows: RowFormat = RowFormat.AUTO
    row_entries: Positive = 64
    confidence: Confidence = Confidence.MEAN
    confidence_threshold: float = -0.5
    # auto: the six below, if None, are what the expert's generation_config.json says
    generation_config: Annotated[Literal["auto", "off"], BeforeValidator(_spelled)] = "auto"
    chat_tokens: Positive | None = None  # of a chat completion; None: what the context leaves
    temperature: Annotated[float, Interval(ge=0, le=2)] | None = None  # None: 1
    top_p: Annotated[float, Interval(gt=0, le=1)] | None = None  # None: 1
    top_k: Natural | None = None  # None: 0, all tokens
    min_p: Annotated[float, Interval(ge=0, le=1)] | None = None  # None: 0
    repetition_penalty: RepetitionPenalty | None = None  # None: 1
    deadline_s: Seconds | None = None  # of a request; `router.max_generation_s` applies too
    on_expert_loss: ExpertLoss = ExpertLoss.FAIL
    on_drafter_loss: DrafterLoss = DrafterLoss.EXPERT
    divergence_budget: Divergence | None = None  # None: any; in modes in which experts verify

    def __post_init__(self) -> None:
        """Check that the defaults can hold together."""
        if self.divergence_budget is not None and self.on_expert_loss is ExpertLoss.DRAFTER:
            raise ValueError(
                "divergence_budget cannot hold if the drafter finishes answers; leave it out, or "
                "set on_expert_loss: fail"
            )

    def completed(self, checkpoint: Mapping[str, float]) -> Defaults:
        """Return the defaults with what a checkpoint says where these say nothing.

        Args:
            checkpoint: The fields of a generation_config.json that defaults have.

        Raises:
            StartupError: A value that no request may have either.
        """
        names = {name: name.replace("max_new_tokens", "chat_tokens") for name in checkpoint}
        found = {
            name: checkpoint[theirs]
            for theirs, name in names.items()
            if getattr(self, name) is None
        }
        try:
            checked = TypeAdapter(Defaults).validate_python(found)
        except ValidationError as error:
            first = error.errors()[0]
            raise StartupError(
                f"The expert's generation_config.json has {first['input']!r} for `defaults."
                f"{first['loc'][0]}`: {first['msg']}; change it there, set that default, or set "
                "`defaults.generation_config: off`"
            ) from error
        return replace(self, **{name: getattr(checked, name) for name in found})

    @property
    def patience(self) -> SequenceCascadeParams:
        """Return when a sequence cascade keeps the drafter's text."""
        return SequenceCascadeParams(
            confidence=self.confidence, threshold=self.confidence_threshold
        )


def unknown_context(mode: Mode, on_drafter_loss: DrafterLoss) -> int | None:
    """Return none: tiers that say nothing hold what the limits say."""
    del mode, on_drafter_loss


async def no_metrics() -> bytes:
    """Return no metrics, in Prometheus' text format."""
    return b""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingContext:
    """Everything an API needs. Requests without a model get `models[0]`."""

    generator: Generator
    tokenizer: Tokenizer
    models: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    ready: Callable[[], bool] = lambda: True
    warnings: Callable[[], list[str]] = list  # what is wrong though it is ready, a sentence each
    # Tokens that the tiers hold of prompt and completion; None: they have not said yet.
    tier_context: Callable[[Mode, DrafterLoss], int | None] = unknown_context
    stop_ids: tuple[int, ...] = ()  # end a completion, besides the tokenizer's own
    start_ids: tuple[int, ...] = ()  # begin every completion of an encoder-decoder
    source_tokens: int = 0  # most tokens of a prompt that its encoder reads
    bad_words: tuple[tuple[int, ...], ...] = ()  # sequences of tokens that no text has
    text_drafts: bool = False  # drafts are text, which only some rules can judge
    grammars: GrammarChecker | None = None  # None: only the tiers find what is wrong with one
    completion_tokens: int = COMPLETION_TOKENS  # of a text completion that does not say
    prices: Prices = field(default_factory=Prices)
    keys: Keys | None = None  # None: anyone may call
    quotas: Quotas = field(default_factory=Quotas)
    bodies: Bodies = field(default_factory=Bodies)
    cors: Cors = field(default_factory=Cors)
    metrics: Callable[[], Awaitable[bytes]] = no_metrics  # in Prometheus' text format
    evaluation: Evaluation | None = None  # whose curve the playground draws
    keep_alive_s: float = 10.0  # a stream without an event for so long gets a comment
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds, of the models
    clock: Callable[[], float] = time.time
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED)

    @property
    def context_tokens(self) -> int:
        """Return the context of requests that say nothing about their mode."""
        return self.bounded(self.defaults.mode, self.defaults.on_drafter_loss).limits.context_tokens

    def bounded(self, mode: Mode, on_drafter_loss: DrafterLoss) -> ServingContext:
        """Return the service with the context that such a request has on the tiers it needs."""
        tokens = self.tier_context(mode, on_drafter_loss)
        if tokens is None or tokens >= self.limits.context_tokens:
            return self
        return replace(self, limits=replace(self.limits, context_tokens=tokens))
