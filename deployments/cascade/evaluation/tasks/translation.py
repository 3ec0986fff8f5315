"""Numbers, dates and simple sentences in English, French and German, in the style of WMT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cascade.evaluation.tasks.item import PERIOD, WORDS, Choice, Level, TaskQuestion, load_data

if TYPE_CHECKING:
    from collections.abc import Mapping
    from random import Random


LANGUAGES = ("English", "French", "German")

_EIGHTY = 80

_DATA: dict[str, Any] = load_data("translation.json")


def draw(random: Random, level: Level) -> TaskQuestion:
    """Return a number, a date, a sentence, or a sentence with an action and a day."""
    kinds = {
        Level.EASY: _number,
        Level.MIDDLE: _date,
        Level.HARD: _description,
        Level.HARDEST: _action,
    }
    return kinds[level](random)


def number_in(language: str, number: int) -> str:
    """Return `number`, 0 to 99, in words; French with hyphens, as in the reform of 1990."""
    units, tens = _DATA["units"][language], _DATA["tens"][language]
    if number < len(units):
        return units[number]
    if language == "French" and number >= _EIGHTY:
        return "quatre-vingt" + (f"-{units[number - _EIGHTY]}" if number > _EIGHTY else "s")
    # French counts on after sixty: 71 is sixty and eleven.
    index = min(number // 10 - 2, len(tens) - 1)
    stem, unit = tens[index], number - 10 * (index + 2)
    if not unit:
        return stem
    if language == "German":
        return ("ein" if unit == 1 else units[unit]) + "und" + stem
    return stem + ("-et-" if language == "French" and unit in (1, 11) else "-") + units[unit]


def date_in(language: str, *, day: int, month: int, year: int) -> str:
    """Return a date as the language writes it, without an article.

    Args:
        language: One of `LANGUAGES`.
        day: 1 to 28.
        month: 0 to 11.
        year: Four digits.
    """
    name = _DATA["months"][language][month]
    ordinal = {"German": f"{day}.", "French": "1er" if day == 1 else f"{day}"}
    return f"{ordinal.get(language, day)} {name} {year}"


def _number(random: Random) -> TaskQuestion:
    number = random.randrange(100)
    source, target = random.sample(LANGUAGES, 2)
    text = random.choice((str(number), number_in(source, number)))
    return _question(target, text, number_in(target, number))


def _date(random: Random) -> TaskQuestion:
    day, month, year = random.randint(1, 28), random.randrange(12), random.randint(1900, 2029)
    source, target = random.sample(LANGUAGES, 2)
    text, short = (
        date_in(language, day=day, month=month, year=year) for language in (source, target)
    )
    article = {"English": "the ", "French": "le ", "German": "der "}[target]
    return _question(target, text, Choice(short, article + short))


def _description(random: Random) -> TaskQuestion:
    """Return a noun with one adjective, a strengthened one, or two."""
    source, target = random.sample(LANGUAGES, 2)
    noun, adjectives = random.choice(_DATA["nouns"]), random.sample(_DATA["adjectives"], 2)
    form = random.randrange(3)

    def clause(language: str) -> str:
        feminine = language == "French" and noun["feminine"]
        first, second = (one["French feminine" if feminine else language] for one in adjectives)
        very, conjunction = _DATA["very"][language], _DATA["and"][language]
        predicate = (first, f"{very} {first}", f"{first} {conjunction} {second}")[form]
        return f"{noun[language]} {_DATA['is'][language]} {predicate}"

    return _question(target, clause(source), clause(target))


def _action(random: Random) -> TaskQuestion:
    """Return a sentence with two objects and a day; German puts the verb in second place."""
    source, target = random.sample(LANGUAGES, 2)
    name = random.choice(WORDS["names"])
    verb, day = random.choice(_DATA["verbs"]), random.choice(_DATA["days"])
    nouns = random.sample(_DATA["nouns"], 2)

    def sentence(language: str) -> str:
        objects = f" {_DATA['and'][language]} ".join(_accusative(language, noun) for noun in nouns)
        if language == "German":
            return f"{day[language]} {verb[language]} {name} {objects}"
        return f"{day[language]}, {name} {verb[language]} {objects}"

    short = sentence(target)
    return _question(target, sentence(source), Choice(short, short[0].upper() + short[1:]))


def _accusative(language: str, noun: Mapping[str, str]) -> str:
    """Return a noun with its article as the object of a sentence."""
    text = noun[language]
    return f"den {text[4:]}" if language == "German" and text.startswith("der ") else text


def _question(target: str, text: str, answer: str | Choice) -> TaskQuestion:
    return TaskQuestion(f"Translate to {target}: {text}", (answer, PERIOD))
