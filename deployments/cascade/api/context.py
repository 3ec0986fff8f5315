"""What both APIs serve: the generator, its tokenizer, limits and defaults."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from annotated_types import Interval
from pydantic import ConfigDict, Field

from cascade.rules import Lossless, Rule
from cascade.types import (
    Bonus,
    Confidence,
    Coupling,
    DrafterLoss,
    ExpertLoss,
    Mode,
    Natural,
    Positive,
    RowFormat,
    Seconds,
    SequenceCascadeParams,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from cascade.engine.tokenizer import Tokenizer
    from cascade.types import Generator

MAX_SEED = 2**63


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
    stop_strings: Positive = 4
    stop_characters: Positive = 1024
    biased_tokens: Positive = 1024
    draft_tokens: Positive = 32
    body_bytes: Positive = 2_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """The values of absent request fields; the `defaults` branch of the settings."""

    __pydantic_config__: ClassVar[ConfigDict] = {"extra": "forbid"}
    mode: Mode = Mode.CASCADE
    rule: Annotated[Rule, Field(discriminator="kind")] = field(default_factory=Lossless)
    draft_tokens: Natural | Literal["auto"] = "auto"
    coupling: Coupling | None = None  # None: gumbel if the request has a seed, else maximal
    bonus: Bonus = Bonus.EXPERT
    verification: Verification = Verification.TOKEN
    rows: RowFormat = RowFormat.AUTO
    row_entries: Positive = 64
    confidence: Confidence = Confidence.MEAN
    confidence_threshold: float = -0.5
    chat_tokens: Positive | None = None  # of a chat completion; None: what the context leaves
    temperature: Annotated[float, Interval(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Interval(gt=0, le=1)] = 1.0
    top_k: Natural = 0
    deadline_s: Seconds | None = None  # of a request; `router.max_generation_s` applies too
    on_expert_loss: ExpertLoss = ExpertLoss.FAIL
    on_drafter_loss: DrafterLoss = DrafterLoss.EXPERT

    @property
    def patience(self) -> SequenceCascadeParams:
        """Return when a sequence cascade keeps the drafter's text."""
        return SequenceCascadeParams(
            confidence=self.confidence, threshold=self.confidence_threshold
        )


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
    stop_ids: tuple[int, ...] = ()  # end a completion, besides the tokenizer's own
    api_keys: frozenset[str] = frozenset()  # empty: anyone may call
    keep_alive_s: float = 10.0  # a stream without an event for so long gets a comment
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds, of the models
    clock: Callable[[], float] = time.time
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED)
