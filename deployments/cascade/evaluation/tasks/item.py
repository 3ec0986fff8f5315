"""The types that all task families share, and how their JSON data becomes answers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import IntEnum, StrEnum
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class TaskFamily(StrEnum):
    """The six families; each imitates a benchmark of the papers."""

    PROBLEMS = "problems"  # GSM8K
    TRANSLATION = "translation"  # WMT
    REPORTS = "reports"  # XSum
    PASSAGES = "passages"  # SQuAD
    FACTS = "facts"  # TriviaQA
    FUNCTIONS = "functions"  # MBPP


class Scorer(StrEnum):
    """How an answer becomes a number in [0, 1]; see `cascade.evaluation.scoring`."""

    EXACT = "exact"
    MATCH = "match"
    CONTAINS = "contains"
    NUMBER = "number"
    BIGRAMS = "bigrams"
    BLEU = "bleu"
    PROGRAM = "program"
    JSON = "json"
    CALLS = "calls"


class Split(StrEnum):
    """Train and test share no prompt, whatever the seed."""

    TRAIN = "train"
    TEST = "test"


class Level(IntEnum):
    """The intended difficulty, from 1 (a drafter can answer it) to 4 (only an expert can)."""

    EASY = 1
    MIDDLE = 2
    HARD = 3
    HARDEST = 4


class Choice(NamedTuple):
    """Two ways to phrase a part of an answer, both right."""

    short: str
    formal: str


Answer: TypeAlias = tuple[str | Choice, ...]


class TaskQuestion(NamedTuple):
    """What a family generates. Without `references`, every phrasing of the answer is one."""

    prompt: str
    answer: Answer
    references: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One question. Every phrasing of its answer scores 1 under its scorer."""

    family: TaskFamily
    level: Level
    prompt: str
    answer: Answer
    references: tuple[str, ...]
    scorer: Scorer

    @property
    def short(self) -> str:
        """Return the answer in the style that the drafter prefers."""
        return phrasings(self.answer)[0]

    @property
    def formal(self) -> str:
        """Return the answer in the style that the expert prefers."""
        return phrasings(self.answer)[-1]


def phrasings(answer: Answer) -> tuple[str, ...]:
    """Return every text that the choices of `answer` allow, the shortest choices first."""
    options = ((part,) if isinstance(part, str) else part for part in answer)
    return tuple(dict.fromkeys("".join(parts) for parts in product(*options)))


def load_data(name: str) -> Any:
    """Return the parsed JSON file `name` of this folder."""
    return json.loads(files(__package__ or "").joinpath(name).read_text(encoding="utf-8"))


def fill(template: Sequence[str | Sequence[str]], values: Mapping[str, str]) -> Answer:
    """Return a template's parts with `values` filled in; a pair of texts becomes a choice."""
    return tuple(
        part.format(**values)
        if isinstance(part, str)
        else Choice(*(text.format(**values) for text in part))
        for part in template
    )


PERIOD = Choice("", ".")

WORDS: Mapping[str, Sequence[str]] = load_data("words.json")
