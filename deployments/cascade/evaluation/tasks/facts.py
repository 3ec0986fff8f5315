"""Closed-book questions of a small almanac, in the manner of TriviaQA.

The facts are in the weights or nowhere: train and test share facts and differ in the wording.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cascade.evaluation.tasks.almanac import (
    BOOKS,
    COUNTRIES,
    ELEMENTS,
    ORDINALS,
    PEOPLE,
    PLANETS,
    RARE_CAPITALS,
    RARE_ELEMENTS,
)
from cascade.evaluation.tasks.item import Answer, Choice, Family, Item, Level, Scorer, phrasings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

T = TypeVar("T")

_PERIOD = Choice("", ".")

_WRAPPERS = (
    "{question}", "{question}", "{question}", "Please tell me: {question}", "Question: {question}",
    "I would like to know: {question}", "Quiz: {question}", "Do you know? {question}",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fact:
    questions: tuple[str, ...]
    answer: Answer


def draw(random: Random, level: Level) -> Item:
    """Return a question; a higher level asks of rarer things."""
    kinds = {
        Level.EASY: (_capital, _person, _planet),
        Level.MIDDLE: (_capital, _person, _symbol, _continent),
        Level.HARD: (_capital, _currency, _symbol, _atomic_number),
        Level.HARDEST: (_rare_capital, _rare_symbol, _author, _deed, _neighbour_element),
    }
    fact = random.choice(kinds[level])(random, level)
    question = random.choice(_WRAPPERS).format(question=random.choice(fact.questions))
    return Item(
        family=Family.FACTS,
        level=level,
        prompt=question,
        answer=fact.answer,
        references=phrasings(fact.answer),
        scorer=Scorer.MATCH,
    )


def _slice(things: Sequence[T], level: Level) -> Sequence[T]:
    """Return the third of `things` that belongs to `level`."""
    return things[(level - 1) * len(things) // 3 : level * len(things) // 3]


def _person(random: Random, _level: Level) -> _Fact:
    name, full, what, deed = random.choice(PEOPLE)
    return _Fact(
        questions=(f"Who is {name}?", f"Tell me about {name}.", f"Who was {name}?"),
        answer=(Choice(name, full), f" is {what}", Choice("", f" who {deed}"), "."),
    )


def _capital(random: Random, level: Level) -> _Fact:
    country, capital, _, _ = random.choice(_slice(COUNTRIES, level))
    return _Fact(
        questions=(
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
        ),
        answer=(capital, Choice("", f", the capital of {country}"), _PERIOD),
    )


def _continent(random: Random, _level: Level) -> _Fact:
    country, _, continent, _ = random.choice(COUNTRIES)
    return _Fact(
        questions=(f"On which continent is {country}?", f"Where in the world is {country}?"),
        answer=(continent, Choice("", f", like all of {country}"), _PERIOD),
    )


def _currency(random: Random, _level: Level) -> _Fact:
    country, _, _, currency = random.choice(COUNTRIES)
    return _Fact(
        questions=(
            f"What is the currency of {country}?",
            f"With what money do people pay in {country}?",
        ),
        answer=(currency, Choice("", f", the currency of {country}"), _PERIOD),
    )


def _symbol(random: Random, level: Level) -> _Fact:
    name, symbol = random.choice(_slice(ELEMENTS, level))
    return _Fact(
        questions=(
            f"What is the chemical symbol of {name}?",
            f"Give the symbol of the element {name}.",
        ),
        answer=(symbol, Choice("", f", the symbol of {name}"), _PERIOD),
    )


def _atomic_number(random: Random, _level: Level) -> _Fact:
    index = random.randrange(len(ELEMENTS))
    name = ELEMENTS[index][0]
    return _Fact(
        questions=(f"What is the atomic number of {name}?", f"How many protons has {name}?"),
        answer=(str(index + 1), Choice("", f", as many as {name} has protons"), _PERIOD),
    )


def _planet(random: Random, _level: Level) -> _Fact:
    index = random.randrange(len(PLANETS))
    planet, place = PLANETS[index], ORDINALS[index]
    return _Fact(
        questions=(
            f"Which is the {place} planet from the Sun?",
            f"What is the {place} planet of the solar system?",
        ),
        answer=(planet, Choice("", f", the {place} planet"), _PERIOD),
    )


def _rare_capital(random: Random, _level: Level) -> _Fact:
    country, capital = random.choice(RARE_CAPITALS)
    return _Fact(
        questions=(
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
        ),
        answer=(capital, Choice("", f", the capital of {country}"), _PERIOD),
    )


def _rare_symbol(random: Random, _level: Level) -> _Fact:
    name, symbol = random.choice(RARE_ELEMENTS)
    return _Fact(
        questions=(
            f"What is the chemical symbol of {name}?",
            f"Give the symbol of the element {name}.",
        ),
        answer=(symbol, Choice("", f", the symbol of {name}"), _PERIOD),
    )


def _neighbour_element(random: Random, _level: Level) -> _Fact:
    """Return a question whose answer needs two facts: a number, and whose the next number is."""
    index = random.randrange(len(ELEMENTS) - 1)
    name, following = ELEMENTS[index][0], ELEMENTS[index + 1][0]
    return _Fact(
        questions=(
            f"Which element follows {name} in the periodic table?",
            f"Which element has one proton more than {name}?",
        ),
        answer=(following, Choice("", f", the element after {name}"), _PERIOD),
    )


def _author(random: Random, _level: Level) -> _Fact:
    title, author = random.choice(BOOKS)
    return _Fact(
        questions=(f"Who wrote {title}?", f"Who is the author of {title}?"),
        answer=(author, Choice("", f", the author of {title}"), _PERIOD),
    )


def _deed(random: Random, _level: Level) -> _Fact:
    name, full, _, deed = random.choice(PEOPLE)
    return _Fact(
        questions=(f"Who {deed}?", f"Name the person who {deed}."),
        answer=(Choice(name, full), Choice("", f", who {deed}"), _PERIOD),
    )
