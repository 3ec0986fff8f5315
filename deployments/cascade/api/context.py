"""What a door stands on: the generator behind it, its words, limits and defaults."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cascade.rules import Lossless, Rule
from cascade.types import (
    Bonus,
    Coupling,
    ExpertLoss,
    Mode,
    RowFormat,
    SequenceCascadeParams,
    Verification,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from cascade.types import Generator

MAX_SEED = 2**63


class Detokenizer(Protocol):
    """Turns the tokens of one answer into text as they come."""

    def push(self, tokens: Iterable[int]) -> str:
        """Return the text that is now certain; an unfinished character waits for the rest."""
        ...

    def flush(self) -> str:
        """Return what still waits, replacement characters and all."""
        ...


class Tokenizer(Protocol):
    """The words of a pair. `engine.tokenizer.Tokenizer` is one."""

    @property
    def vocabulary(self) -> int:
        """Ids are smaller than this."""
        ...

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """The ids that end a text."""
        ...

    def encode(
        self, text: str, *, add_special: bool = True, limit: int | None = None
    ) -> tuple[int, ...]:
        """Return the ids of `text`; an `InvalidRequest` if it has none, or more than `limit`."""
        ...

    def chat(
        self, messages: Sequence[Mapping[str, Any]], *, limit: int | None = None
    ) -> tuple[int, ...]:
        """Return the ids of a conversation; an `InvalidRequest` if the template refuses it."""
        ...

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ...

    def detokenizer(self) -> Detokenizer:
        """Return a decoder for one answer, without special tokens."""
        ...

    def bytes_of(self, id_: int) -> bytes:
        """Return the bytes that one token stands for."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one call may ask for."""

    context_tokens: int = 4096  # prompt and answer together
    prompt_tokens: int | None = None  # None: what the context leaves
    max_tokens: int | None = None  # of one answer; None: what the context leaves
    choices: int = 16  # `n`
    prompts: int = 64  # in one call
    answers: int = 128  # in one call, all prompts and choices together
    stop_strings: int = 4
    stop_characters: int = 1024
    biased_tokens: int = 1024
    draft_tokens: int = 32
    body_bytes: int = 2 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Defaults:
    """What a request means where it says nothing."""

    mode: Mode = Mode.CASCADE
    rule: Rule = field(default_factory=Lossless)
    draft_tokens: int | None = None  # None lets the router choose
    coupling: Coupling | None = None  # None: gumbel where the request has a seed, else maximal
    bonus: Bonus = Bonus.EXPERT
    verification: Verification = Verification.TOKEN
    rows: RowFormat = RowFormat.AUTO
    row_entries: int = 64
    patience: SequenceCascadeParams = field(default_factory=SequenceCascadeParams)
    chat_tokens: int | None = (
        None  # a chat's `max_completion_tokens`; None: what the context leaves
    )
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    deadline_s: float | None = None
    on_expert_loss: ExpertLoss = ExpertLoss.FAIL


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingContext:
    """All that a door needs. `models[0]` is the name in answers to requests that name none."""

    generator: Generator
    tokenizer: Tokenizer
    models: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    ready: Callable[[], bool] = lambda: True
    stop_ids: tuple[int, ...] = ()  # end an answer, besides the tokenizer's own
    api_keys: frozenset[str] = frozenset()  # empty: anyone may call
    keep_alive_s: float = 10.0  # silence after which a stream says that it lives
    created: int = field(default_factory=lambda: int(time.time()))  # Unix seconds, of the models
    clock: Callable[[], float] = time.time
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED)
