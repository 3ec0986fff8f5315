"""What a door stands on: the generator behind it, its words, limits and defaults."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from cascade.decoding.generation import Patience
from cascade.decoding.rules import Lossless, Rule
from cascade.decoding.session import Bonus, Coupling, Mode, RowFormat, Verification

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cascade.decoding.generation import Generator

MAX_SEED = 2**63


class Detokenizer(Protocol):
    """Turns tokens into text as they come."""

    def push(self, tokens: Sequence[int]) -> str:
        """Return the text that is now certain; an unfinished character waits for the rest."""
        ...

    def flush(self) -> str:
        """Return what still waits, replacement characters and all."""
        ...


class Tokenizer(Protocol):
    """The words of a pair."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token ids; every id is smaller."""
        ...

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        ...

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Return the ids of `text`, with the ids that open a sequence if `special`."""
        ...

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, without special tokens."""
        ...

    def apply_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the ids of a conversation, ready for the assistant's turn.

        Raises:
            ValueError: The chat template refuses the messages, or there is none.
        """
        ...

    def stream(self) -> Detokenizer:
        """Return an empty detokenizer."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The most that one call may ask for."""

    context_tokens: int = 4096  # prompt and answer together
    prompt_tokens: int | None = None  # None: what the context leaves
    max_tokens: int | None = None  # of one answer; None: what the context leaves
    choices: int = 16  # `n`
    prompts: int = 64  # in one call
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
    coupling: Coupling = Coupling.MAXIMAL
    bonus: Bonus = Bonus.EXPERT
    verification: Verification = Verification.TOKEN
    rows: RowFormat = RowFormat.AUTO
    row_entries: int = 64
    patience: Patience = field(default_factory=Patience)
    chat_tokens: int | None = (
        None  # a chat's `max_completion_tokens`; None: what the context leaves
    )
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """All that a door needs. `models[0]` is the name in answers to requests that name none."""

    generator: Generator
    tokenizer: Tokenizer
    models: tuple[str, ...]
    limits: Limits = field(default_factory=Limits)
    defaults: Defaults = field(default_factory=Defaults)
    ready: Callable[[], bool] = lambda: True
    api_keys: frozenset[str] = frozenset()  # empty: anyone may call
    keep_alive_s: float = 10.0  # silence after which a stream says that it lives
    created: int = 0  # Unix seconds, of the models
    clock: Callable[[], float] = time.time
    draw_seed: Callable[[], int] = lambda: secrets.randbelow(MAX_SEED)
