"""Closed-book questions about people, countries, elements and books, in the style of TriviaQA.

A model knows these facts from its weights or not at all: train and test share the facts and differ
in the wording.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.evaluation.tasks.item import Level, TaskQuestion, fill, load_data

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random

Rows: TypeAlias = "Sequence[Mapping[str, str]]"

_DATA: dict[str, Any] = load_data("facts.json")

# Each table begins with the names of its columns. Countries and elements: best known first.
_TABLES: dict[str, Rows] = {
    name: [dict(zip(columns, row, strict=True)) for row in rows]
    for name, (columns, *rows) in _DATA["tables"].items()
}

_ELEMENTS: Rows = [
    {**element, "number": str(number)} for number, element in enumerate(_TABLES["elements"], 1)
]


def _third(table: str, level: Level) -> Rows:
    """Return the third of a table that belongs to `level`, one of the first three."""
    rows = _TABLES[table]
    return rows[(level - 1) * len(rows) // 3 : level * len(rows) // 3]


# The kinds of question at each level: a template and the rows that may fill it.
_KINDS: Mapping[Level, Sequence[tuple[str, Rows]]] = {
    Level.EASY: (
        ("capital", _third("countries", Level.EASY)),
        ("person", _TABLES["people"]),
        ("planet", _TABLES["planets"]),
    ),
    Level.MIDDLE: (
        ("capital", _third("countries", Level.MIDDLE)),
        ("person", _TABLES["people"]),
        ("symbol", _third("elements", Level.MIDDLE)),
        ("continent", _TABLES["countries"]),
    ),
    Level.HARD: (
        ("capital", _third("countries", Level.HARD)),
        ("currency", _TABLES["countries"]),
        ("symbol", _third("elements", Level.HARD)),
        ("atomic_number", _ELEMENTS),
    ),
    Level.HARDEST: (
        ("capital", _TABLES["rare_countries"]),
        ("symbol", _TABLES["rare_elements"]),
        ("author", _TABLES["books"]),
        ("deed", _TABLES["people"]),
        ("next_element", [{**one, "next": two["element"]} for one, two in pairwise(_ELEMENTS)]),
    ),
}


def draw(random: Random, level: Level) -> TaskQuestion:
    """Return a question; a higher level asks about rarer things."""
    kind, rows = random.choice(_KINDS[level])
    row = random.choice(rows)
    return TaskQuestion(_question(random, kind, row), fill(_DATA["templates"][kind]["answer"], row))


def ask(random: Random, kind: str) -> tuple[Mapping[str, str], str]:
    """Return a country or an element, and a question of some kind about it."""
    row = random.choice(_ELEMENTS if kind == "atomic_number" else _TABLES["countries"])
    return row, _question(random, kind, row)


def _question(random: Random, kind: str, row: Mapping[str, str]) -> str:
    wrapper = random.choice(_DATA["wrappers"])
    question = random.choice(_DATA["templates"][kind]["questions"]).format(**row)
    return wrapper.format(question=question)
