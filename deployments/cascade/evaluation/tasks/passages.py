"""A short passage and a question about it, in the style of SQuAD."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.evaluation.tasks.item import PERIOD, WORDS, Choice, Level, TaskQuestion

if TYPE_CHECKING:
    from random import Random


def draw(random: Random, level: Level) -> TaskQuestion:
    """Return a passage about `level` people and a question about one of them.

    At the hardest level the question names the person by a relative, so that two sentences are
    needed to answer it.
    """
    if level == Level.HARDEST:
        return _two_hops(random)
    names, jobs = random.sample(WORDS["names"], level), random.sample(WORDS["jobs"], level)
    cities = random.sample(WORDS["cities"], level)
    sentences = _sentences(random, names, jobs, cities)
    index = random.randrange(level)
    name, job, city = names[index], jobs[index], cities[index]
    question, answer, addition = random.choice(
        (
            (f"Where does {name} live?", city, f", where {name} lives"),
            (f"What does {name} do?", job, f", in {city}"),
            (f"Who lives in {city}?", name, f", the {job}"),
            (f"Who is the {job}?", name, f" from {city}"),
        )
    )
    return TaskQuestion(
        f"{' '.join(sentences)}\n{question}", (answer, Choice("", addition), PERIOD)
    )


def _sentences(random: Random, names: list[str], jobs: list[str], cities: list[str]) -> list[str]:
    return [
        random.choice(
            (
                f"{name} is a {job} in {city}.",
                f"{name} lives in {city} and works as a {job}.",
                f"In {city}, {name} works as a {job}.",
            )
        )
        for name, job, city in zip(names, jobs, cities, strict=True)
    ]


def _two_hops(random: Random) -> TaskQuestion:
    names = random.sample(WORDS["names"], 6)
    people, relatives = names[:3], names[3:]
    jobs, cities = random.sample(WORDS["jobs"], 3), random.sample(WORDS["cities"], 3)
    relations = [random.choice(WORDS["relations"]) for _ in people]
    sentences = _sentences(random, people, jobs, cities) + [
        f"{name} is the {relation} of {relative}."
        for name, relation, relative in zip(people, relations, relatives, strict=True)
    ]
    random.shuffle(sentences)
    index = random.randrange(3)
    who = f"the {relations[index]} of {relatives[index]}"
    name, job, city = people[index], jobs[index], cities[index]
    question, short, formal = random.choice(
        (
            (f"Where does {who} live?", city, f"{name} lives in {city}"),
            (f"What does {who} do?", job, f"{name} works as a {job}"),
        )
    )
    return TaskQuestion(f"{' '.join(sentences)}\n{question}", (Choice(short, formal), PERIOD))
