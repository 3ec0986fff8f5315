"""Six families of small tasks with known right answers, generated from a seed.

The shipped pair is trained on one part of the prompts and evaluated on the other. The word lists
and templates are the JSON files of this folder; changing them changes the generated items.
"""

from cascade.evaluation.tasks.generate import draw, held_out, split_of, stream
from cascade.evaluation.tasks.item import Item, Level, Scorer, Split, TaskFamily, phrasings

__all__ = [
    "Item",
    "Level",
    "Scorer",
    "Split",
    "TaskFamily",
    "draw",
    "held_out",
    "phrasings",
    "split_of",
    "stream",
]
