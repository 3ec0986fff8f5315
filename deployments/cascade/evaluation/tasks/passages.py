"""A short passage and a question it answers, in the manner of SQuAD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.evaluation.tasks.item import Answer, Choice, Family, Item, Level, Scorer, phrasings
from cascade.evaluation.tasks.words import CITIES, JOBS, NAMES

if TYPE_CHECKING:
    from random import Random

_PERIOD = Choice("", ".")

_BONDS = ("friend", "neighbour", "boss", "cousin")


def draw(random: Random, level: Level) -> Item:
    """Return a passage about `level` people and a question about one of them.

    At the hardest level the question names the person by a relative: two sentences answer it.
    """
    if level == Level.HARDEST:
        return _two_hops(random)
    names, jobs = random.sample(NAMES, level), random.sample(JOBS, level)
    cities = random.sample(CITIES, level)
    told = [
        _sentence(random, name=name, job=job, city=city)
        for name, job, city in zip(names, jobs, cities, strict=True)
    ]
    asked = random.randrange(level)
    question, answer = _question(random, name=names[asked], job=jobs[asked], city=cities[asked])
    return Item(
        family=Family.PASSAGES,
        level=level,
        prompt=f"{' '.join(told)}\n{question}",
        answer=answer,
        references=phrasings(answer),
        scorer=Scorer.MATCH,
    )


def _sentence(random: Random, *, name: str, job: str, city: str) -> str:
    return random.choice(
        (
            f"{name} is a {job} in {city}.",
            f"{name} lives in {city} and works as a {job}.",
            f"In {city}, {name} works as a {job}.",
        )
    )


def _question(random: Random, *, name: str, job: str, city: str) -> tuple[str, Answer]:
    """Return a question and its answer."""
    question, said, more = random.choice(
        (
            (f"Where does {name} live?", city, f", where {name} lives"),
            (f"What does {name} do?", job, f", in {city}"),
            (f"Who lives in {city}?", name, f", the {job}"),
            (f"Who is the {job}?", name, f" from {city}"),
        )
    )
    return question, (said, Choice("", more), _PERIOD)


def _two_hops(random: Random) -> Item:
    names = random.sample(NAMES, 6)
    people, relatives = names[:3], names[3:]
    jobs, cities = random.sample(JOBS, 3), random.sample(CITIES, 3)
    bonds = [random.choice(_BONDS) for _ in people]
    told = [
        _sentence(random, name=name, job=job, city=city)
        for name, job, city in zip(people, jobs, cities, strict=True)
    ]
    told += [
        f"{name} is the {bond} of {relative}."
        for name, bond, relative in zip(people, bonds, relatives, strict=True)
    ]
    random.shuffle(told)
    asked = random.randrange(3)
    whom = f"the {bonds[asked]} of {relatives[asked]}"
    name, job, city = people[asked], jobs[asked], cities[asked]
    question, short, formal = random.choice(
        (
            (f"Where does {whom} live?", city, f"{name} lives in {city}"),
            (f"What does {whom} do?", job, f"{name} works as a {job}"),
        )
    )
    answer = (Choice(short, formal), _PERIOD)
    return Item(
        family=Family.PASSAGES,
        level=Level.HARDEST,
        prompt=f"{' '.join(told)}\n{question}",
        answer=answer,
        references=phrasings(answer),
        scorer=Scorer.MATCH,
    )
