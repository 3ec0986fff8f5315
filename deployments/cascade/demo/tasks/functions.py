"""Small Python functions from a docstring, in the manner of MBPP; their tests are run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascade.demo.tasks.item import Family, Item, Level, Scorer

if TYPE_CHECKING:
    from random import Random

_VERBS = ("compute", "value", "result", "apply", "solve", "answer", "make", "get")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Operation:
    """A value's transformation; `{}` stands for the value, `n` for a small number."""

    words: str
    code: str


_ON_NUMBERS = (
    _Operation(words="{} plus n", code="{} + n"),
    _Operation(words="{} minus n", code="{} - n"),
    _Operation(words="{} times n", code="{} * n"),
    _Operation(words="the square of {}", code="{} ** 2"),
    _Operation(words="the remainder of {} divided by n", code="{} % n"),
    _Operation(words="the absolute value of {}", code="abs({})"),
    _Operation(words="the larger of {} and n", code="max({}, n)"),
    _Operation(words="the smaller of {} and n", code="min({}, n)"),
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


def draw(random: Random, level: Level) -> Item:
    """Return a function of one operation on a number, one on a list, or of two operations."""
    name = f"{random.choice(_VERBS)}_{random.choice('abcdefgh')}"
    if level == Level.HARD:
        inner, outer = random.choice(_ON_NUMBERS), random.choice(_OF_ITEMS)
        words = _fill(outer.words, _fill(inner.words, "x"))
        code = _fill(outer.code, _fill(inner.code, "x"))
        argument = "xs"
    else:
        argument, operations = ("x", _ON_NUMBERS) if level == Level.EASY else ("xs", _ON_LISTS)
        operation = random.choice(operations)
        words, code = _fill(operation.words, argument), _fill(operation.code, argument)
    number = str(random.randint(2, 9))
    words, code = words.replace(" n", f" {number}"), code.replace(" n", f" {number}")
    assertions = _assertions(random, name=name, argument=argument, code=code)
    head = f"def {name}({argument}):"
    return Item(
        family=Family.FUNCTIONS,
        level=level,
        prompt=f'Write a Python function.\n{head}\n    """Return {words}."""',
        short=f"{head}\n    return {code}",
        formal=f"{head}\n    result = {code}\n    return result",
        references=tuple(assertions),
        scorer=Scorer.PROGRAM,
    )


def _fill(template: str, value: str) -> str:
    return template.replace("{}", value)


def _assertions(random: Random, *, name: str, argument: str, code: str) -> list[str]:
    inputs = [
        [random.randint(-9, 9) for _ in range(random.randint(2, 5))]
        if argument == "xs"
        else random.randint(-9, 9)
        for _ in range(3)
    ]
    return [
        f"assert {name}({value!r}) == (lambda {argument}: {code})({value!r})" for value in inputs
    ]
