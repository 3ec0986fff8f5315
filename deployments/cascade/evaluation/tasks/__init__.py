"""Six families of small tasks with right answers, made by seeded code."""

from cascade.evaluation.tasks.generate import ALL_LEVELS, FAMILIES, held_out, split_of, stream
from cascade.evaluation.tasks.item import Family, Item, Level, Scorer, Split, phrasings
from cascade.evaluation.tasks.scoring import score

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
