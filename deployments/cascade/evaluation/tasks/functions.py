"""Small Python functions from a docstring, in the manner of MBPP; their tests are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascade.evaluation.tasks.item import Choice, Family, Item, Level, Scorer

if TYPE_CHECKING:
    from random import Random

_VERBS = ("compute", "value", "result", "apply", "solve", "answer", "make", "get")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """A value's transformation; `{}` stands for the value, `N` and `M` for numbers."""

    words: str
    code: str


_ON_NUMBERS = (
    _Operation(words="{} plus N", code="{} + N"),
    _Operation(words="{} minus N", code="{} - N"),
    _Operation(words="{} times N", code="{} * N"),
    _Operation(words="the square of {}", code="{} ** 2"),
    _Operation(words="the remainder of {} divided by N", code="{} % N"),
    _Operation(words="the absolute value of {}", code="abs({})"),
    _Operation(words="the larger of {} and N", code="max({}, N)"),
    _Operation(words="the smaller of {} and N", code="min({}, N)"),
)

_ON_LISTS = (
    _Operation(words="the sum of {}", code="sum({})"),
    _Operation(words="the largest item of {}", code="max({})"),
    _Operation(words="the smallest item of {}", code="min({})"),
    _Operation(words="the length of {}", code="len({})"),
    _Operation(words="the last item of {}", code="{}[-1]"),
    _Operation(words="the first item of {}", code="{}[0]"),
    _Operation(words="{} in reverse order", code="{}[::-1]"),
    _Operation(words="{} in sorted order", code="sorted({})"),
)

_OF_ITEMS = (
    _Operation(words="the list of {} for each x in xs", code="[{} for x in xs]"),
    _Operation(words="the sum of {} for each x in xs", code="sum({} for x in xs)"),
    _Operation(words="the largest {} for each x in xs", code="max({} for x in xs)"),
)

_PARITIES = (
    _Operation(words="even", code="x % 2 == 0"),
    _Operation(words="odd", code="x % 2 == 1"),
)

_BOUNDS = (
    _Operation(words="positive", code="x > 0"),
    _Operation(words="negative", code="x < 0"),
    _Operation(words="larger than M", code="x > M"),
    _Operation(words="smaller than M", code="x < M"),
)


def draw(random: Random, level: Level) -> Item:
    """Return a function of one operation on a number, one on a list, of two, or with a filter."""
    name = f"{random.choice(_VERBS)}_{random.choice('abcdefgh')}"
    if level >= Level.HARD:
        # A filter may leave nothing, which has no largest item.
        outers = _OF_ITEMS[:2] if level == Level.HARDEST else _OF_ITEMS
        inner, outer = random.choice(_ON_NUMBERS), random.choice(outers)
        words = _fill(outer.words, _fill(inner.words, "x"))
        code = _fill(outer.code, _fill(inner.code, "x"))
        argument = "xs"
        if level == Level.HARDEST:
            words, code = _filtered(random, words=words, code=code)
    else:
        argument, operations = ("x", _ON_NUMBERS) if level == Level.EASY else ("xs", _ON_LISTS)
        operation = random.choice(operations)
        words, code = _fill(operation.words, argument), _fill(operation.code, argument)
    number = str(random.randint(2, 9))
    words, code = words.replace("N", number), code.replace("N", number)
    assertions = _assertions(random, name=name, argument=argument, code=code)
    head = f"def {name}({argument}):"
    return Item(
        family=Family.FUNCTIONS,
        level=level,
        prompt=f'Write a Python function.\n{head}\n    """Return {words}."""',
        answer=(
            head,
            Choice("", f'\n    """Return {words}."""'),
            Choice(f"\n    return {code}", f"\n    result = {code}\n    return result"),
        ),
        references=tuple(assertions),
        scorer=Scorer.PROGRAM,
    )


def _filtered(random: Random, *, words: str, code: str) -> tuple[str, str]:
    """Return the description and the code for those items that one or two conditions hold of."""
    bound = str(random.randint(-9, 9))
    groups = random.choice(((_PARITIES,), (_BOUNDS,), (_PARITIES, _BOUNDS)))
    conditions = [random.choice(group) for group in groups]
    said = " and ".join(condition.words for condition in conditions).replace("M", bound)
    test = " and ".join(condition.code for condition in conditions).replace("M", bound)
    return f"{words} that is {said}", code.replace("in xs", f"in xs if {test}")


def _fill(template: str, value: str) -> str:
    return template.replace("{}", value)


def _assertions(random: Random, *, name: str, argument: str, code: str) -> list[str]:
    inputs = [
        [random.randint(-9, 9) for _ in range(random.randint(3, 8))]
        if argument == "xs"
        else random.randint(-9, 9)
        for _ in range(5)
    ]
    return [
        f"assert {name}({value!r}) == (lambda {argument}: {code})({value!r})" for value in inputs
    ]
