"""Reports of an event and their one-line summaries, in the manner of XSum."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascade.evaluation.tasks.item import Answer, Choice, Family, Item, Level, Scorer, phrasings
from cascade.evaluation.tasks.words import CITIES, DAYS, SMALL_NUMBERS

if TYPE_CHECKING:
    from random import Random

PLACES = ("bakery", "school", "hotel", "museum", "factory", "station", "theatre", "market")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    """Templates with the slots city, day, place and count."""

    told: str
    summary: Answer


_WHEN = (Choice("", " on {day}"), ".")

_EVENTS = (
    _Event(
        told="A fire broke out in a {place} in {city} on {day}. {Count} people were hurt.",
        summary=(
            "A fire in a {place} in {city}", Choice(" hurt", " injured"), " {count} people", *_WHEN,
        ),
    ),
    _Event(
        told="Workers of a {place} in {city} went on strike on {day}. "
        "They ask for {count} more days of leave.",
        summary=(
            "Workers of a {place} in {city}", Choice(" strike", " went on strike"),
            " for {count} days of leave", *_WHEN,
        ),
    ),
    _Event(
        told="The mayor of {city} opened a new {place} on {day}. It cost {count} million euros.",
        summary=(
            "A new {place} in {city}", Choice(" opens", " was opened"),
            " for {count} million euros", *_WHEN,
        ),
    ),
    _Event(
        told="Thieves entered a {place} in {city} on {day} and took {count} paintings.",
        summary=(
            "Thieves", Choice(" took", " stole"), " {count} paintings from a {place} in {city}",
            *_WHEN,
        ),
    ),
)  # fmt: skip

_ASIDES = (
    "The police were there within {other} minutes.",
    "Neighbours said that they had never seen so many people.",
    "A visitor from {elsewhere} said that it was a strange day.",
    "The street was closed for {other} hours.",
)


def draw(random: Random, level: Level) -> Item:
    """Return a report with `level` - 1 sentences that do not matter.

    At the hardest level two events are told and the summary is of the one with the larger number.
    """
    if level == Level.HARDEST:
        return _two_events(random)
    city, elsewhere = random.sample(CITIES, 2)
    count, other = random.sample(SMALL_NUMBERS[2:], 2)
    event = random.choice(_EVENTS)
    slots = {
        "city": city, "City": city, "day": random.choice(DAYS), "place": random.choice(PLACES),
        "count": count, "Count": count.capitalize(), "other": other, "elsewhere": elsewhere,
    }  # fmt: skip
    told = [event.told, *random.sample(_ASIDES, level - 1)]
    answer = _fill(event.summary, slots)
    return Item(
        family=Family.REPORTS,
        level=level,
        prompt="Summarize: " + " ".join(told).format(**slots),
        answer=answer,
        references=phrasings(answer),
        scorer=Scorer.BIGRAMS,
    )


def _two_events(random: Random) -> Item:
    cities, places = random.sample(CITIES, 2), random.sample(PLACES, 2)
    numbers, events = random.sample(range(2, 13), 2), random.sample(_EVENTS, 2)
    day = random.choice(DAYS)
    slots = [
        {
            "city": city, "City": city, "day": day, "place": place,
            "count": SMALL_NUMBERS[number], "Count": SMALL_NUMBERS[number].capitalize(),
        }
        for city, place, number in zip(cities, places, numbers, strict=True)
    ]  # fmt: skip
    main = numbers.index(max(numbers))
    told = [event.told.format(**words) for event, words in zip(events, slots, strict=True)]
    answer = _fill(events[main].summary, slots[main])
    return Item(
        family=Family.REPORTS,
        level=Level.HARDEST,
        prompt="Summarize the report with the larger number: " + " ".join(told),
        answer=answer,
        references=phrasings(answer),
        scorer=Scorer.BIGRAMS,
    )


def _fill(summary: Answer, slots: dict[str, str]) -> Answer:
    return tuple(
        part.format(**slots)
        if isinstance(part, str)
        else Choice(*(way.format(**slots) for way in part))
        for part in summary
    )
