"""Questions whose answer is JSON, or a call of a tool; made of problems and facts.

The shipped pair is trained on their texts, but neither on JSON nor on tools: `docs/pair.md` says
what it can do here.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from random import Random
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.evaluation.tasks import facts, problems
from cascade.evaluation.tasks.generate import distinct, split_of
from cascade.evaluation.tasks.item import Level, Split

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

Json: TypeAlias = "dict[str, Any]"

_SMALLEST, _LARGEST = 2, 20  # numbers that the first two levels of problems name


class StructuredFamily(StrEnum):
    """Families whose answers programs read."""

    SCHEMAS = "schemas"
    TOOLS = "tools"


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredItem:
    """A question, and what its answer must fit: a schema, or one of some tools."""

    system: str | None = None
    prompt: str
    right: Any  # the JSON value, or the call: its name and arguments
    schema: Json | None = None
    tools: tuple[Json, ...] = ()


def held_out(family: StructuredFamily, *, count: int, seed: int = 0) -> list[StructuredItem]:
    """Return items whose prompts the shipped pair was not trained on, no prompt twice.

    Args:
        family: Which kind of task.
        count: How many items.
        seed: The same seed returns the same items.

    Raises:
        ValueError: The family has fewer than `count` such prompts.
    """
    return distinct(_test_items(family, seed), count=count, name=family)


def _test_items(family: StructuredFamily, seed: int) -> Iterator[StructuredItem]:
    random = Random(f"{family}/{seed}")  # noqa: S311 - a data set, no secret
    while True:
        item = random.choice(_KINDS[family])(random)
        if split_of(item.prompt) is Split.TEST:
            yield item


def _object(**properties: Json) -> Json:
    """Return the schema of an object that has all of these properties and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _number(*, low: int = _SMALLEST, high: int = _LARGEST) -> Json:
    return {"type": "integer", "minimum": low, "maximum": high}


def _numbers(prompt: str) -> list[int]:
    return [int(text) for text in re.findall(r"\d+", prompt)]


def _atomic_number(random: Random) -> StructuredItem:
    """Return a question whose plain answer is JSON: a number."""
    row, question = facts.ask(random, "atomic_number")
    return StructuredItem(
        system="Answer with JSON: an integer.",
        prompt=question,
        right=int(row["number"]),
        schema=_number(low=1, high=118),
    )


def _first_number(random: Random) -> StructuredItem:
    """Return a question for one number of a problem."""
    prompt = problems.draw(random, random.choice((Level.EASY, Level.MIDDLE))).prompt
    return StructuredItem(
        system="Answer with JSON. The key has is the count at first.",
        prompt=prompt,
        right={"has": _numbers(prompt)[0]},
        schema=_object(has=_number()),
    )


def _all_numbers(random: Random) -> StructuredItem:
    """Return a question for all numbers of a problem."""
    prompt = problems.draw(random, Level.MIDDLE).prompt
    names = ("has", "buys", "gives")
    return StructuredItem(
        system="Answer with JSON. The keys has, buys and gives are the counts.",
        prompt=prompt,
        right=dict(zip(names, _numbers(prompt), strict=True)),
        schema=_object(**dict.fromkeys(names, _number())),
    )


def _tool(name: str, description: str, **parameters: Json) -> Json:
    function = {"name": name, "description": description, "parameters": _object(**parameters)}
    return {"type": "function", "function": function}


_COUNTRY = {"type": "string", "maxLength": 30}

_TOOLS = (
    _tool("add", "How many there are with more.", has=_number(), more=_number()),
    _tool("subtract", "How many are left.", has=_number(), fewer=_number()),
    _tool("capital", "The capital of a country.", country=_COUNTRY),
    _tool("currency", "The currency of a country.", country=_COUNTRY),
)


def _sum(random: Random) -> StructuredItem:
    """Return a problem of one step, which one of two tools solves."""
    question = problems.draw(random, Level.EASY)
    first, second = _numbers(question.prompt)
    name, change = "add", "more"
    if question.references[0] == str(first - second):
        name, change = "subtract", "fewer"
    return StructuredItem(
        prompt=question.prompt,
        right={"name": name, "arguments": {"has": first, change: second}},
        tools=_TOOLS,
    )


def _fact(random: Random) -> StructuredItem:
    """Return a question about a country, which one of two tools answers."""
    name = random.choice(("capital", "currency"))
    row, question = facts.ask(random, name)
    return StructuredItem(
        prompt=question,
        right={"name": name, "arguments": {"country": row["country"]}},
        tools=_TOOLS,
    )


_KINDS: Mapping[StructuredFamily, Sequence[Callable[[Random], StructuredItem]]] = {
    StructuredFamily.SCHEMAS: (_atomic_number, _first_number, _all_numbers),
    StructuredFamily.TOOLS: (_sum, _fact),
}
