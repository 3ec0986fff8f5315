"""Six families of small tasks with right answers, made by seeded code."""

from cascade.demo.tasks.generate import (
    ALL_LEVELS,
    FAMILIES,
    held_out,
    split_of,
    stream,
)
from cascade.demo.tasks.item import Family, Item, Level, Scorer, Split, phrasings
from cascade.demo.tasks.scoring import score

__all__ = [
    "ALL_LEVELS",
    "FAMILIES",
    "Family",
    "Item",
    "Level",
    "Scorer",
    "Split",
    "held_out",
    "phrasings",
    "score",
    "split_of",
    "stream",
]
