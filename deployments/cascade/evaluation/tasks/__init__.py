"""Six families of small tasks with known right answers, generated from a seed.

The shipped pair is trained on one part of the prompts and evaluated on the other. Two more families
ask for JSON and for tool calls about the same texts. The word lists and templates are the JSON
files of this folder; changing them changes the generated items.
"""

from cascade.evaluation.tasks.generate import draw, held_out, split_of, stream
from cascade.evaluation.tasks.item import Item, Level, Scorer, Split, TaskFamily, phrasings
from cascade.evaluation.tasks.structured import StructuredFamily, StructuredItem
from cascade.evaluation.tasks.structured import held_out as held_out_structured

__all__ = [
    "Item",
    "Level",
    "Scorer",
    "Split",
    "StructuredFamily",
    "StructuredItem",
    "TaskFamily",
    "draw",
    "held_out",
    "held_out_structured",
    "phrasings",
    "split_of",
    "stream",
]
