"""Word problems of one to three steps, in the manner of GSM8K."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.demo.tasks.item import Family, Item, Level, Scorer
from cascade.demo.tasks.words import NAMES, THINGS

if TYPE_CHECKING:
    from random import Random


def draw(random: Random, level: Level) -> Item:
    """Return a problem of `level` steps."""
    return {Level.EASY: _one_step, Level.MIDDLE: _two_steps, Level.HARD: _boxes}[level](random)


def _one_step(random: Random) -> Item:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    first, second = random.randint(2, 20), random.randint(2, 12)
    if random.choice((True, False)) or second >= first:
        total, verb, sign = first + second, random.choice(("buys", "finds")), "+"
    else:
        total, verb, sign = first - second, random.choice(("loses", "sells")), "-"
    more = "more" if sign == "+" else "of them"
    return _item(
        level=Level.EASY,
        prompt=f"{name} has {first} {thing} and {verb} {second} {more}. "
        f"How many {thing} does {name} have now?",
        sums=(f"{first} {sign} {second} = {total}",),
        total=total,
        formal=f"{name} starts with {first} {thing} and {verb} {second}.",
    )


def _two_steps(random: Random) -> Item:
    name, friend = random.sample(NAMES, 2)
    thing = random.choice(THINGS)
    first, second = random.randint(3, 20), random.randint(2, 12)
    third = random.randint(2, min(12, first + second - 1))
    middle, total = first + second, first + second - third
    return _item(
        level=Level.MIDDLE,
        prompt=f"{name} has {first} {thing}, buys {second} more and gives {third} to {friend}. "
        f"How many {thing} does {name} have left?",
        sums=(f"{first} + {second} = {middle}", f"{middle} - {third} = {total}"),
        total=total,
        formal=f"{name} starts with {first} {thing}, buys {second} and gives {third} away.",
    )


def _boxes(random: Random) -> Item:
    name, thing = random.choice(NAMES), random.choice(THINGS)
    boxes, each, loose = random.randint(2, 9), random.randint(2, 9), random.randint(2, 12)
    middle, total = boxes * each, boxes * each + loose
    return _item(
        level=Level.HARD,
        prompt=f"{name} fills {boxes} boxes with {each} {thing} each and has {loose} {thing} left. "
        f"How many {thing} does {name} have in all?",
        sums=(f"{boxes} * {each} = {middle}", f"{middle} + {loose} = {total}"),
        total=total,
        formal=f"{name} fills {boxes} boxes with {each} {thing} each and keeps {loose}.",
    )


def _item(*, level: Level, prompt: str, sums: tuple[str, ...], total: int, formal: str) -> Item:
    steps = ", ".join(sums)
    return Item(
        family=Family.PROBLEMS,
        level=level,
        prompt=prompt,
        short=f"{steps}. Answer: {total}",
        formal=f"{formal} So {steps}. The answer is {total}.",
        references=(str(total),),
        scorer=Scorer.NUMBER,
    )
