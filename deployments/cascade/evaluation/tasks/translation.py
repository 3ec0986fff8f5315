"""Numbers, dates and simple sentences between English, French and German, in the manner of WMT."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascade.evaluation.tasks.item import Answer, Choice, Family, Item, Level, Scorer, phrasings
from cascade.evaluation.tasks.words import NAMES

if TYPE_CHECKING:
    from random import Random


def _row(words: str) -> tuple[str, ...]:
    return tuple(words.split())


LANGUAGES = ("English", "French", "German")

_ENGLISH_UNITS = _row(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
)

_ENGLISH_TENS = _row("twenty thirty forty fifty sixty seventy eighty ninety")

_FRENCH_UNITS = _row(
    "zéro un deux trois quatre cinq six sept huit neuf dix onze douze treize quatorze quinze seize "
    "dix-sept dix-huit dix-neuf"
)

_FRENCH_TENS = _row("vingt trente quarante cinquante soixante")

_GERMAN_UNITS = _row(
    "null eins zwei drei vier fünf sechs sieben acht neun zehn elf zwölf dreizehn vierzehn "
    "fünfzehn sechzehn siebzehn achtzehn neunzehn"
)

_GERMAN_TENS = _row("zwanzig dreißig vierzig fünfzig sechzig siebzig achtzig neunzig")

_MONTHS = {
    "English": _row(
        "January February March April May June July August September October November December"
    ),
    "French": _row(
        "janvier février mars avril mai juin juillet août septembre octobre novembre décembre"
    ),
    "German": _row(
        "Januar Februar März April Mai Juni Juli August September Oktober November Dezember"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Noun:
    """A thing in three languages; `french` and `german` carry their articles."""

    english: str
    french: str
    german: str
    feminine: bool = False


NOUNS = (
    Noun(english="house", french="la maison", german="das Haus", feminine=True),
    Noun(english="table", french="la table", german="der Tisch", feminine=True),
    Noun(english="car", french="la voiture", german="das Auto", feminine=True),
    Noun(english="flower", french="la fleur", german="die Blume", feminine=True),
    Noun(english="door", french="la porte", german="die Tür", feminine=True),
    Noun(english="garden", french="le jardin", german="der Garten"),
    Noun(english="book", french="le livre", german="das Buch"),
    Noun(english="bread", french="le pain", german="das Brot"),
    Noun(english="dog", french="le chien", german="der Hund"),
    Noun(english="boat", french="le bateau", german="das Boot"),
)

# English, French masculine, French feminine, German.
ADJECTIVES = (
    ("small", "petit", "petite", "klein"),
    ("big", "grand", "grande", "groß"),
    ("green", "vert", "verte", "grün"),
    ("black", "noir", "noire", "schwarz"),
    ("old", "vieux", "vieille", "alt"),
    ("new", "nouveau", "nouvelle", "neu"),
    ("beautiful", "beau", "belle", "schön"),
    ("heavy", "lourd", "lourde", "schwer"),
)

# English, French, German.
_VERBS = (
    ("sees", "voit", "sieht"),
    ("buys", "achète", "kauft"),
    ("finds", "trouve", "findet"),
    ("paints", "peint", "malt"),
    ("sells", "vend", "verkauft"),
    ("wants", "veut", "will"),
)

_WEEK = (
    ("on Monday", "lundi", "am Montag"),
    ("on Tuesday", "mardi", "am Dienstag"),
    ("on Friday", "vendredi", "am Freitag"),
    ("on Sunday", "dimanche", "am Sonntag"),
    ("today", "aujourd'hui", "heute"),
    ("tomorrow", "demain", "morgen"),
)

_PERIOD = Choice("", ".")

_IS = {"English": "is", "French": "est", "German": "ist"}

_AND = {"English": "and", "French": "et", "German": "und"}

_VERY = {"English": "very", "French": "très", "German": "sehr"}


def draw(random: Random, level: Level) -> Item:
    """Return a number, a date, a sentence, or one with an action and a day."""
    kinds = {
        Level.EASY: _number,
        Level.MIDDLE: _date,
        Level.HARD: _sentence,
        Level.HARDEST: _action,
    }
    return kinds[level](random)


def number_in(language: str, number: int) -> str:
    """Return `number`, 0 to 99, in words."""
    spell = {"English": english_number, "French": french_number, "German": german_number}
    return spell[language](number)


def english_number(number: int) -> str:
    """Return an English number word, 0 to 99."""
    if number < len(_ENGLISH_UNITS):
        return _ENGLISH_UNITS[number]
    tens, unit = divmod(number, 10)
    return _ENGLISH_TENS[tens - 2] + (f"-{_ENGLISH_UNITS[unit]}" if unit else "")


def french_number(number: int) -> str:
    """Return a French number word, 0 to 99, with hyphens as in the reform of 1990."""
    if number < len(_FRENCH_UNITS):
        return _FRENCH_UNITS[number]
    scores, rest = divmod(number, 80)
    if scores:
        return "quatre-vingt" + (f"-{_FRENCH_UNITS[rest]}" if rest else "s")
    tens = min(number // 10, 6)
    rest = number - 10 * tens
    stem = _FRENCH_TENS[tens - 2]
    if not rest:
        return stem
    joint = "-et-" if rest in (1, 11) else "-"
    return stem + joint + _FRENCH_UNITS[rest]


def german_number(number: int) -> str:
    """Return a German number word, 0 to 99."""
    if number < len(_GERMAN_UNITS):
        return _GERMAN_UNITS[number]
    tens, unit = divmod(number, 10)
    if not unit:
        return _GERMAN_TENS[tens - 2]
    return ("ein" if unit == 1 else _GERMAN_UNITS[unit]) + "und" + _GERMAN_TENS[tens - 2]


def date_in(language: str, *, day: int, month: int, year: int) -> str:
    """Return a date as the language writes it, without an article."""
    name = _MONTHS[language][month]
    if language == "German":
        return f"{day}. {name} {year}"
    if language == "French" and day == 1:
        return f"1er {name} {year}"
    return f"{day} {name} {year}"


def _number(random: Random) -> Item:
    number = random.randrange(100)
    source, goal = random.sample(LANGUAGES, 2)
    said = random.choice((str(number), number_in(source, number)))
    answer = number_in(goal, number)
    return _item(level=Level.EASY, goal=goal, said=said, answer=(answer, _PERIOD))


def _date(random: Random) -> Item:
    day, month, year = random.randint(1, 28), random.randrange(12), random.randint(1900, 2029)
    source, goal = random.sample(LANGUAGES, 2)
    short = date_in(goal, day=day, month=month, year=year)
    article = {"English": "the ", "French": "le ", "German": "der "}[goal]
    said = date_in(source, day=day, month=month, year=year)
    return _item(
        level=Level.MIDDLE, goal=goal, said=said, answer=(Choice(short, article + short), _PERIOD)
    )


def _sentence(random: Random) -> Item:
    source, goal = random.sample(LANGUAGES, 2)
    noun, adjectives = random.choice(NOUNS), random.sample(range(len(ADJECTIVES)), 2)
    shape = random.randrange(3)
    said = _clause(source, noun=noun, adjectives=adjectives, shape=shape)
    clause = _clause(goal, noun=noun, adjectives=adjectives, shape=shape)
    return _item(level=Level.HARD, goal=goal, said=said, answer=(clause, _PERIOD))


def _action(random: Random) -> Item:
    """Return a sentence with an object and a day; German moves the verb to the second place."""
    source, goal = random.sample(LANGUAGES, 2)
    name, verb, day = random.choice(NAMES), random.choice(_VERBS), random.choice(_WEEK)
    first, second = random.sample(NOUNS, 2)
    said, short = (
        _deed(language, name=name, verb=verb, day=day, objects=(first, second))
        for language in (source, goal)
    )
    answer = (Choice(short, short[0].upper() + short[1:]), _PERIOD)
    return _item(level=Level.HARDEST, goal=goal, said=said, answer=answer)


def _deed(
    language: str,
    *,
    name: str,
    verb: tuple[str, ...],
    day: tuple[str, ...],
    objects: tuple[Noun, Noun],
) -> str:
    column = LANGUAGES.index(language)
    things = f" {_AND[language]} ".join(accusative(language, noun) for noun in objects)
    if language == "German":
        return f"{day[column]} {verb[column]} {name} {things}"
    return f"{day[column]}, {name} {verb[column]} {things}"


def accusative(language: str, noun: Noun) -> str:
    """Return a noun with its article as the object of a sentence."""
    if language == "English":
        return f"the {noun.english}"
    if language == "French":
        return noun.french
    return noun.german.replace("der ", "den ", 1) if noun.german.startswith("der ") else noun.german


def _clause(language: str, *, noun: Noun, adjectives: list[int], shape: int) -> str:
    subject = {"English": f"the {noun.english}", "French": noun.french, "German": noun.german}
    column = {"English": 0, "French": 2 if noun.feminine else 1, "German": 3}[language]
    first, second = (ADJECTIVES[index][column] for index in adjectives)
    said = (first, f"{_VERY[language]} {first}", f"{first} {_AND[language]} {second}")[shape]
    return f"{subject[language]} {_IS[language]} {said}"


def _item(*, level: Level, goal: str, said: str, answer: Answer) -> Item:
    return Item(
        family=Family.TRANSLATION,
        level=level,
        prompt=f"Translate to {goal}: {said}",
        answer=answer,
        references=phrasings(answer),
        scorer=Scorer.MATCH,
    )
