"""A short passage and a question it answers, in the manner of SQuAD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.demo.tasks.item import Family, Item, Level, Scorer
from cascade.demo.tasks.words import CITIES, JOBS, NAMES

if TYPE_CHECKING:
    from random import Random


def draw(random: Random, level: Level) -> Item:
    """Return a passage about `level` people and a question about one of them."""
    names, jobs = random.sample(NAMES, level), random.sample(JOBS, level)
    cities = random.sample(CITIES, level)
    told = [
        _sentence(random, name=name, job=job, city=city)
        for name, job, city in zip(names, jobs, cities, strict=True)
    ]
    asked = random.randrange(level)
    question, short, formal = _question(
        random, name=names[asked], job=jobs[asked], city=cities[asked]
    )
    return Item(
        family=Family.PASSAGES,
        level=level,
        prompt=f"{' '.join(told)}\n{question}",
        short=short,
        formal=formal,
        references=(short, formal),
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


def _question(random: Random, *, name: str, job: str, city: str) -> tuple[str, str, str]:
    """Return a question and its two answers."""
    return random.choice(
        (
            (f"Where does {name} live?", city, f"{name} lives in {city}."),
            (f"What does {name} do?", job, f"{name} works as a {job}."),
            (f"Who lives in {city}?", name, f"The person in {city} is {name}."),
            (f"Who is the {job}?", name, f"The {job} is {name}."),
        )
    )
