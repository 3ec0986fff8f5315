"""Small Python functions described by a docstring, in the style of MBPP; their tests are run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.evaluation.tasks.item import Choice, Level, TaskQuestion, load_data

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from random import Random

_VERBS = ("compute", "value", "result", "apply", "solve", "answer", "make", "get")

# Pairs of a description and its code; `{}` stands for the value, `N` and `M` for numbers.
_OPERATIONS: Mapping[str, Sequence[tuple[str, str]]] = load_data("functions.json")


def draw(random: Random, level: Level) -> TaskQuestion:
    """Return a function of one operation on a number, one on a list, of two, or with a filter."""
    name = f"{random.choice(_VERBS)}_{random.choice('abcdefgh')}"
    if level >= Level.HARD:
        inner = random.choice(_OPERATIONS["on_numbers"])
        # A filter may leave no items, and an empty list has no largest item.
        outer = random.choice(_OPERATIONS["on_items"][: 2 if level == Level.HARDEST else 3])
        argument = "xs"
        words, code = (
            out.replace("{}", into.replace("{}", "x"))
            for out, into in zip(outer, inner, strict=True)
        )
        if level == Level.HARDEST:
            words, code = _filtered(random, words=words, code=code)
    else:
        argument, kind = ("x", "on_numbers") if level == Level.EASY else ("xs", "on_lists")
        operation = random.choice(_OPERATIONS[kind])
        words, code = (text.replace("{}", argument) for text in operation)
    number = str(random.randint(2, 9))
    words, code = words.replace("N", number), code.replace("N", number)
    head, docstring = f"def {name}({argument}):", f'\n    """Return {words}."""'
    return TaskQuestion(
        prompt=f"Write a Python function.\n{head}{docstring}",
        answer=(
            head,
            Choice("", docstring),
            Choice(f"\n    return {code}", f"\n    result = {code}\n    return result"),
        ),
        references=tuple(_assertions(random, name=name, argument=argument, code=code)),
    )


def _filtered(random: Random, *, words: str, code: str) -> tuple[str, str]:
    """Return the description and code restricted to items that meet one or two conditions."""
    bound = str(random.randint(-9, 9))
    groups = random.choice((("parities",), ("bounds",), ("parities", "bounds")))
    conditions = [random.choice(_OPERATIONS[group]) for group in groups]
    description, test = (
        " and ".join(texts).replace("M", bound) for texts in zip(*conditions, strict=True)
    )
    return f"{words} that is {description}", code.replace("in xs", f"in xs if {test}")


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
