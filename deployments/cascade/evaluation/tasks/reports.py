"""Reports of an event and their one-line summaries, in the style of XSum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cascade.evaluation.tasks.item import WORDS, Level, TaskQuestion, fill, load_data

if TYPE_CHECKING:
    from random import Random

_DATA: dict[str, Any] = load_data("reports.json")


def draw(random: Random, level: Level) -> TaskQuestion:
    """Return a report with `level` - 1 sentences that do not matter.

    At the hardest level the report has two events, and the summary must be of the one with the
    larger number.
    """
    if level == Level.HARDEST:
        return _two_events(random)
    city, elsewhere = random.sample(WORDS["cities"], 2)
    count, other = random.sample(WORDS["numbers"][2:], 2)
    event = random.choice(_DATA["events"])
    values = {
        "city": city,
        "day": random.choice(WORDS["days"]),
        "place": random.choice(WORDS["buildings"]),
        "count": count,
        "Count": count.capitalize(),
        "other": other,
        "elsewhere": elsewhere,
    }
    sentences = [event["text"], *random.sample(_DATA["asides"], level - 1)]
    prompt = "Summarize: " + " ".join(sentences).format(**values)
    return TaskQuestion(prompt, fill(event["summary"], values))


def _two_events(random: Random) -> TaskQuestion:
    cities, places = random.sample(WORDS["cities"], 2), random.sample(WORDS["buildings"], 2)
    numbers, events = random.sample(range(2, 13), 2), random.sample(_DATA["events"], 2)
    day = random.choice(WORDS["days"])
    values = [
        {"city": city, "day": day, "place": place, "count": count, "Count": count.capitalize()}
        for city, place, count in zip(
            cities, places, (WORDS["numbers"][number] for number in numbers), strict=True
        )
    ]
    texts = [event["text"].format(**words) for event, words in zip(events, values, strict=True)]
    larger = numbers.index(max(numbers))
    return TaskQuestion(
        "Summarize the report with the larger number: " + " ".join(texts),
        fill(events[larger]["summary"], values[larger]),
    )
