"""What every task family yields: a prompt, its right answers, and how to score another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from itertools import product
from random import Random
from typing import NamedTuple, TypeAlias


class Family(StrEnum):
    """The six families; each mirrors a benchmark of the papers."""

    PROBLEMS = "problems"  # GSM8K
    TRANSLATION = "translation"  # WMT
    REPORTS = "reports"  # XSum
    PASSAGES = "passages"  # SQuAD
    FACTS = "facts"  # TriviaQA
    FUNCTIONS = "functions"  # MBPP


class Scorer(StrEnum):
    """How an answer becomes a number in [0, 1]; see `scoring.score`."""

    NUMBER = "number"  # the last number of the answer is the reference
    MATCH = "match"  # equal to a reference but for case, articles and punctuation
    BIGRAMS = "bigrams"  # ROUGE-2 against the nearest reference
    PROGRAM = "program"  # the share of the references, Python assertions, that hold


class Split(StrEnum):
    """Train and test share no prompt, whatever the seed."""

    TRAIN = "train"
    TEST = "test"


class Level(IntEnum):
    """How hard an item is meant to be: 1 for a drafter, 4 for an expert alone."""

    EASY = 1
    MIDDLE = 2
    HARD = 3
    HARDEST = 4


class Choice(NamedTuple):
    """Two ways to go on with an answer, both right."""

    short: str
    formal: str


Answer: TypeAlias = tuple[str | Choice, ...]


def phrasings(answer: Answer) -> tuple[str, ...]:
    """Return every text that the choices of `answer` allow, the shortest choices first."""
    ways = ((part,) if isinstance(part, str) else part for part in answer)
    return tuple(dict.fromkeys("".join(parts) for parts in product(*ways)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question. Every phrasing of its answer scores 1 under its scorer."""

    family: Family
    level: Level
    prompt: str
    answer: Answer
    references: tuple[str, ...]
    scorer: Scorer

    @property
    def short(self) -> str:
        """Return the answer in the style that the drafter leans to."""
        return phrasings(self.answer)[0]

    @property
    def formal(self) -> str:
        """Return the answer in the style that the expert leans to."""
        return phrasings(self.answer)[-1]


Draw: TypeAlias = Callable[[Random, Level], Item]
