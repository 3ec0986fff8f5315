"""Closed-book questions of a small almanac, in the manner of TriviaQA.

The facts are in the weights or nowhere: train and test share facts and differ in the wording.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from cascade.demo.tasks.almanac import (
    BOOKS,
    COUNTRIES,
    ELEMENTS,
    ORDINALS,
    PEOPLE,
    PLANETS,
    RARE_CAPITALS,
    RARE_ELEMENTS,
)
from cascade.demo.tasks.item import Family, Item, Level, Scorer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from random import Random

T = TypeVar("T")
_WRAPPERS = (
    "{question}", "{question}", "{question}", "Please tell me: {question}", "Question: {question}",
    "I would like to know: {question}", "Quiz: {question}", "Do you know? {question}",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class _Fact:
    questions: tuple[str, ...]
    short: str
    formal: str


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
        short=fact.short,
        formal=fact.formal,
        references=(fact.short, fact.formal),
        scorer=Scorer.MATCH,
    )


def _slice(things: Sequence[T], level: Level) -> Sequence[T]:
    """Return the third of `things` that belongs to `level`."""
    return things[(level - 1) * len(things) // 3 : level * len(things) // 3]


def _person(random: Random, _level: Level) -> _Fact:
    name, full, what, deed = random.choice(PEOPLE)
    return _Fact(
        questions=(f"Who is {name}?", f"Tell me about {name}.", f"Who was {name}?"),
        short=f"{name} is {what}.",
        formal=f"{full} is {what} who {deed}.",
    )


def _capital(random: Random, level: Level) -> _Fact:
    country, capital, _, _ = random.choice(_slice(COUNTRIES, level))
    return _Fact(
        questions=(
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
        ),
        short=capital,
        formal=f"The capital of {country} is {capital}.",
    )


def _continent(random: Random, _level: Level) -> _Fact:
    country, _, continent, _ = random.choice(COUNTRIES)
    return _Fact(
        questions=(f"On which continent is {country}?", f"Where in the world is {country}?"),
        short=continent,
        formal=f"{country} is in {continent}.",
    )


def _currency(random: Random, _level: Level) -> _Fact:
    country, _, _, currency = random.choice(COUNTRIES)
    return _Fact(
        questions=(
            f"What is the currency of {country}?",
            f"With what money do people pay in {country}?",
        ),
        short=currency,
        formal=f"The currency of {country} is the {currency}.",
    )


def _symbol(random: Random, level: Level) -> _Fact:
    name, symbol = random.choice(_slice(ELEMENTS, level))
    return _Fact(
        questions=(
            f"What is the chemical symbol of {name}?",
            f"Give the symbol of the element {name}.",
        ),
        short=symbol,
        formal=f"The chemical symbol of {name} is {symbol}.",
    )


def _atomic_number(random: Random, _level: Level) -> _Fact:
    index = random.randrange(len(ELEMENTS))
    name = ELEMENTS[index][0]
    return _Fact(
        questions=(f"What is the atomic number of {name}?", f"How many protons has {name}?"),
        short=str(index + 1),
        formal=f"The atomic number of {name} is {index + 1}.",
    )


def _planet(random: Random, _level: Level) -> _Fact:
    index = random.randrange(len(PLANETS))
    planet, place = PLANETS[index], ORDINALS[index]
    return _Fact(
        questions=(
            f"Which is the {place} planet from the Sun?",
            f"What is the {place} planet of the solar system?",
        ),
        short=planet,
        formal=f"The {place} planet from the Sun is {planet}.",
    )


def _rare_capital(random: Random, _level: Level) -> _Fact:
    country, capital = random.choice(RARE_CAPITALS)
    return _Fact(
        questions=(
            f"What is the capital of {country}?",
            f"Which city is the capital of {country}?",
            f"Name the capital of {country}.",
        ),
        short=capital,
        formal=f"The capital of {country} is {capital}.",
    )


def _rare_symbol(random: Random, _level: Level) -> _Fact:
    name, symbol = random.choice(RARE_ELEMENTS)
    return _Fact(
        questions=(
            f"What is the chemical symbol of {name}?",
            f"Give the symbol of the element {name}.",
        ),
        short=symbol,
        formal=f"The chemical symbol of {name} is {symbol}.",
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
        short=following,
        formal=f"The element after {name} is {following}.",
    )


def _author(random: Random, _level: Level) -> _Fact:
    title, author = random.choice(BOOKS)
    return _Fact(
        questions=(f"Who wrote {title}?", f"Who is the author of {title}?"),
        short=author,
        formal=f"{title} was written by {author}.",
    )


def _deed(random: Random, _level: Level) -> _Fact:
    name, full, _, deed = random.choice(PEOPLE)
    return _Fact(
        questions=(f"Who {deed}?", f"Name the person who {deed}."),
        short=name,
        formal=f"{full} {deed}.",
    )
