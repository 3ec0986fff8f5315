"""Arithmetic word problems of one to four steps, in the style of GSM8K."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade.evaluation.tasks.item import PERIOD, WORDS, Choice, Level, TaskQuestion

if TYPE_CHECKING:
    from random import Random


def draw(random: Random, level: Level) -> TaskQuestion:
    """Return a problem: sums at the first two levels, products from the third on."""
    kinds = {
        Level.EASY: (_one_step,),
        Level.MIDDLE: (_two_steps,),
        Level.HARD: (_boxes,),
        Level.HARDEST: (_shopping, _sharing, _growing),
    }
    return random.choice(kinds[level])(random)


def _one_step(random: Random) -> TaskQuestion:
    name, thing = random.choice(WORDS["names"]), random.choice(WORDS["things"])
    first, second = random.randint(2, 20), random.randint(2, 12)
    if random.choice((True, False)) or second >= first:
        total, verb, sign = first + second, random.choice(("buys", "finds")), "+"
    else:
        total, verb, sign = first - second, random.choice(("loses", "sells")), "-"
    more = "more" if sign == "+" else "of them"
    return _question(
        prompt=f"{name} has {first} {thing} and {verb} {second} {more}. "
        f"How many {thing} does {name} have now?",
        sums=(f"{first} {sign} {second} = {total}",),
        total=total,
        formal=f"{name} starts with {first} {thing} and {verb} {second}.",
    )


def _two_steps(random: Random) -> TaskQuestion:
    name, friend = random.sample(WORDS["names"], 2)
    thing = random.choice(WORDS["things"])
    first, second = random.randint(3, 20), random.randint(2, 12)
    third = random.randint(2, min(12, first + second - 1))
    middle, total = first + second, first + second - third
    return _question(
        prompt=f"{name} has {first} {thing}, buys {second} more and gives {third} to {friend}. "
        f"How many {thing} does {name} have left?",
        sums=(f"{first} + {second} = {middle}", f"{middle} - {third} = {total}"),
        total=total,
        formal=f"{name} starts with {first} {thing}, buys {second} and gives {third} away.",
    )


def _boxes(random: Random) -> TaskQuestion:
    name, thing = random.choice(WORDS["names"]), random.choice(WORDS["things"])
    boxes, each, loose = random.randint(2, 9), random.randint(2, 9), random.randint(2, 12)
    middle, total = boxes * each, boxes * each + loose
    return _question(
        prompt=f"{name} fills {boxes} boxes with {each} {thing} each and has {loose} {thing} left. "
        f"How many {thing} does {name} have in all?",
        sums=(f"{boxes} * {each} = {middle}", f"{middle} + {loose} = {total}"),
        total=total,
        formal=f"{name} fills {boxes} boxes with {each} {thing} each and keeps {loose}.",
    )


def _shopping(random: Random) -> TaskQuestion:
    name, (first, second) = random.choice(WORDS["names"]), random.sample(WORDS["things"], 2)
    cost, price = random.randint(2, 9), random.randint(2, 9)
    count, number = random.randint(2, 6), random.randint(2, 6)
    one, other = count * cost, number * price
    spent = one + other
    total = 100 * (1 + (spent - 1) // 100)
    return _question(
        prompt=f"{name} buys {count} {first} at {cost} euros each and {number} {second} at {price} "
        f"euros each, and pays with {total} euros. How many euros does {name} get back?",
        sums=(
            f"{count} * {cost} = {one}",
            f"{number} * {price} = {other}",
            f"{one} + {other} = {spent}",
            f"{total} - {spent} = {total - spent}",
        ),
        total=total - spent,
        formal=f"{name} buys {count} {first} and {number} {second} and pays with {total} euros.",
    )


def _sharing(random: Random) -> TaskQuestion:
    name, friend = random.sample(WORDS["names"], 2)
    thing = random.choice(WORDS["things"])
    people, each, bags = random.randint(2, 9), random.randint(3, 12), random.randint(2, 4)
    given = random.randint(1, each - 1)
    per_bag, rest = divmod(people * each, bags)
    loose = "" if not rest else f" and {rest} more"
    middle = people * each
    return _question(
        prompt=f"{name} has {bags} bags of {per_bag} {thing}{loose}. {people} children share them "
        f"equally, and each gives {given} to {friend}. How many {thing} does each child keep?",
        sums=(
            f"{bags} * {per_bag} = {bags * per_bag}",
            *([f"{bags * per_bag} + {rest} = {middle}"] if rest else []),
            f"{middle} / {people} = {each}",
            f"{each} - {given} = {each - given}",
        ),
        total=each - given,
        formal=f"{name} has {bags} bags of {per_bag} {thing}{loose} for {people} children.",
    )


def _growing(random: Random) -> TaskQuestion:
    name, thing = random.choice(WORDS["names"]), random.choice(WORDS["things"])
    start, daily, days = random.randint(3, 20), random.randint(2, 9), random.randint(2, 9)
    found = daily * days
    have = start + found
    lost = random.randint(2, have - 1)
    return _question(
        prompt=f"{name} has {start} {thing} and collects {daily} every day. "
        f"After {days} days {name} loses {lost}. How many {thing} are left?",
        sums=(
            f"{daily} * {days} = {found}",
            f"{start} + {found} = {have}",
            f"{have} - {lost} = {have - lost}",
        ),
        total=have - lost,
        formal=f"{name} starts with {start} {thing}, collects {daily} on each of {days} days and "
        f"loses {lost}.",
    )


def _question(*, prompt: str, sums: tuple[str, ...], total: int, formal: str) -> TaskQuestion:
    steps = ", ".join(sums)
    return TaskQuestion(
        prompt,
        (
            Choice(steps, f"{formal} So {steps}"),
            Choice(". Answer:", ". The answer is"),
            f" {total}",
            PERIOD,
        ),
        references=(str(total),),
    )
