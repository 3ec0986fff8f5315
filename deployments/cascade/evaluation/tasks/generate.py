"""Seeded streams of items. A checksum of the prompt decides whether an item is train or test."""

from __future__ import annotations

import zlib
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, TypeVar

from cascade.evaluation.tasks import facts, functions, passages, problems, reports, translation
from cascade.evaluation.tasks.item import (
    Item,
    Level,
    Scorer,
    Split,
    TaskFamily,
    TaskQuestion,
    phrasings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence


class _HasPrompt(Protocol):
    @property
    def prompt(self) -> str: ...


Q = TypeVar("Q", bound=_HasPrompt)

_FAMILIES: Mapping[TaskFamily, tuple[Callable[[Random, Level], TaskQuestion], Scorer]] = {
    TaskFamily.PROBLEMS: (problems.draw, Scorer.NUMBER),
    TaskFamily.TRANSLATION: (translation.draw, Scorer.MATCH),
    TaskFamily.REPORTS: (reports.draw, Scorer.BIGRAMS),
    TaskFamily.PASSAGES: (passages.draw, Scorer.MATCH),
    TaskFamily.FACTS: (facts.draw, Scorer.MATCH),
    TaskFamily.FUNCTIONS: (functions.draw, Scorer.PROGRAM),
}

_EQUAL_SHARES: Mapping[TaskFamily, float] = MappingProxyType(dict.fromkeys(TaskFamily, 1.0))

_TEST_EVERY = 10

_MAX_REPEATS = 2000  # draws without a new prompt, after which a family counts as exhausted

# The README asks these; a reader's first answer should not depend on the split.
_ALWAYS_TRAINED = frozenset({"Who is Buzz Aldrin?", "What is the capital of France?"})


def draw(family: TaskFamily, random: Random, level: Level) -> Item:
    """Return a random item.

    Args:
        family: Which kind of task.
        random: The generator whose next numbers decide the item.
        level: How hard it is.
    """
    generate, scorer = _FAMILIES[family]
    prompt, answer, references = generate(random, level)
    return Item(
        family=family,
        level=level,
        prompt=prompt,
        answer=answer,
        references=references or phrasings(answer),
        scorer=scorer,
    )


def split_of(prompt: str) -> Split:
    """Return the split that `prompt` belongs to: about one prompt in ten is test."""
    trained = prompt in _ALWAYS_TRAINED or zlib.crc32(prompt.encode()) % _TEST_EVERY
    return Split.TRAIN if trained else Split.TEST


def stream(
    seed: str,
    *,
    split: Split,
    shares: Mapping[TaskFamily, float] = _EQUAL_SHARES,
    levels: Sequence[Level] = tuple(Level),
) -> Iterator[Item]:
    """Yield items without end.

    Args:
        seed: The same seed yields the same items.
        split: Which prompts to yield.
        shares: The families, each with its relative frequency.
        levels: Which levels to draw from, all equally often.
    """
    families, weights = list(shares), list(shares.values())
    random = Random(seed)  # noqa: S311 - a data set, no secret
    while True:
        family = random.choices(families, weights)[0]
        item = draw(family, random, random.choice(levels))
        if split_of(item.prompt) == split:
            yield item


def held_out(
    family: TaskFamily, *, count: int, seed: int = 0, levels: Sequence[Level] = tuple(Level)
) -> list[Item]:
    """Return test items, no prompt twice.

    Args:
        family: Which kind of task.
        count: How many items.
        seed: The same seed returns the same items.
        levels: Which levels to draw from.

    Raises:
        ValueError: The family has fewer than `count` test prompts.
    """
    items = stream(f"{family}/{seed}", split=Split.TEST, shares={family: 1}, levels=levels)
    return distinct(items, count=count, name=family)


def distinct(items: Iterator[Q], *, count: int, name: str) -> list[Q]:
    """Return the first items with different prompts.

    Args:
        items: Drawn without end.
        count: How many to return.
        name: Of the family.

    Raises:
        ValueError: It has fewer prompts.
    """
    found: dict[str, Q] = {}
    repeats = 0
    for item in items:
        repeats = repeats + 1 if item.prompt in found else 0
        found.setdefault(item.prompt, item)
        if len(found) == count:
            return list(found.values())
        if repeats == _MAX_REPEATS:
            break
    raise ValueError(f"{name} has {len(found)} test prompts, not {count}; ask for fewer")
