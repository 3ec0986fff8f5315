"""What every task family yields: a prompt, two right answers, and how to score a third."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from random import Random
from typing import TypeAlias


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question. Both `short` and `formal` score 1 under its scorer."""

    family: Family
    level: Level
    prompt: str
    short: str
    formal: str
    references: tuple[str, ...]
    scorer: Scorer


Draw: TypeAlias = Callable[[Random, Level], Item]
