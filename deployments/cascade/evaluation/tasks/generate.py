"""Seeded streams of items; train and test are disjoint by the digest of the prompt."""

from __future__ import annotations

import zlib
from random import Random
from types import MappingProxyType
from typing import TYPE_CHECKING

from cascade.evaluation.tasks import facts, functions, passages, problems, reports, translation
from cascade.evaluation.tasks.item import Draw, Family, Item, Level, Split

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

FAMILIES: Mapping[Family, Draw] = {
    Family.PROBLEMS: problems.draw,
    Family.TRANSLATION: translation.draw,
    Family.REPORTS: reports.draw,
    Family.PASSAGES: passages.draw,
    Family.FACTS: facts.draw,
    Family.FUNCTIONS: functions.draw,
}

ALL_LEVELS = tuple(Level)

EQUAL_SHARES: Mapping[Family, float] = MappingProxyType(dict.fromkeys(Family, 1.0))

_TEST_EVERY = 10

_PATIENCE = 2000  # draws without a new prompt, after which a family counts as exhausted

# The README asks these; a reader's first answer should not hang on the luck of the split.
_ALWAYS_TRAINED = frozenset({"Who is Buzz Aldrin?", "What is the capital of France?"})


def split_of(prompt: str) -> Split:
    """Return the split that `prompt` belongs to: about one prompt in ten is test."""
    if prompt in _ALWAYS_TRAINED:
        return Split.TRAIN
    return Split.TRAIN if zlib.crc32(prompt.encode()) % _TEST_EVERY else Split.TEST


def stream(
    seed: str,
    *,
    split: Split,
    shares: Mapping[Family, float] = EQUAL_SHARES,
    levels: Sequence[Level] = ALL_LEVELS,
) -> Iterator[Item]:
    """Yield items of `split` without end, of each family its share."""
    families, weights = list(shares), list(shares.values())
    random = Random(seed)  # noqa: S311 - a data set, no secret
    while True:
        draw = FAMILIES[random.choices(families, weights)[0]]
        item = draw(random, random.choice(levels))
        if split_of(item.prompt) == split:
            yield item


def held_out(
    family: Family,
    *,
    count: int,
    seed: int = 0,
    levels: Sequence[Level] = ALL_LEVELS,
) -> list[Item]:
    """Return `count` test items of `family`, no prompt twice, the same ones for the same seed."""
    seen: dict[str, Item] = {}
    fruitless = 0
    for item in stream(f"{family}/{seed}", split=Split.TEST, shares={family: 1}, levels=levels):
        fruitless = fruitless + 1 if item.prompt in seen else 0
        seen.setdefault(item.prompt, item)
        if len(seen) == count:
            return list(seen.values())
        if fruitless == _PATIENCE:
            break
    raise ValueError(f"{family} has {len(seen)} test prompts, not {count}; ask for fewer")
