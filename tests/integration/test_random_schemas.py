"""Random JSON schemas: every finished answer is JSON that its schema describes, and all end."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import jsonschema
import numpy as np
import pytest

from cascade import demo
from cascade.engine.tokenizer import load
from cascade.errors import InvalidRequest
from cascade.structured.grammar import GrammarCompiler, TokenTexts
from cascade.types import Grammar, GrammarKind

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMAS, TOKENS = 2000, 400


def random_schema(rng: random.Random, depth: int = 3) -> dict[str, Any]:
    """Return a schema of what clients send: objects, lists, texts, numbers, choices."""
    leaves: list[Callable[[], dict[str, Any]]] = [
        lambda: {"type": "string", "maxLength": rng.randint(1, 6)},
        lambda: {"type": "string", "pattern": rng.choice(["^[0-9]{3}$", "^(ab|c)+$", "^x?y$"])},
        lambda: {"type": "integer", "minimum": rng.randint(-9, 0), "maximum": rng.randint(1, 99)},
        lambda: {"type": rng.choice(["boolean", "null", "number"])},
        lambda: {"enum": rng.sample([1, "one", None, True, "zw\u00f6lf", [2]], rng.randint(1, 3))},
        lambda: {"const": rng.choice(["fixed", 7, False])},
    ]
    if depth == 0 or rng.random() < 0.3:
        return rng.choice(leaves)()
    match rng.randrange(3):
        case 0:
            items = random_schema(rng, depth - 1)
            least = rng.randint(0, 2)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + 1}
        case 1:
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(rng.randint(1, 3))]}
        case _:
            names = rng.sample(["a", "name", "\u00fc", "x y", "tags"], rng.randint(1, 4))
            return {
                "type": "object",
                "properties": {name: random_schema(rng, depth - 1) for name in names},
                "required": rng.sample(names, rng.randint(0, len(names))),
                "additionalProperties": False,
            }


def sampled(compiler: GrammarCompiler, schema: dict[str, Any], seed: int) -> list[int] | None:
    """Return an answer of random tokens that the mask allows; None if it is cut off."""
    grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
    mask, rng, answer = compiler.mask(grammar, (1,)), np.random.default_rng(seed), list[int]()
    while len(answer) < TOKENS:
        bits_1W = np.full((1, -(-compiler.vocabulary // 32)), 2**32 - 1, np.uint32)
        mask.restrict(bits_1W, answer, ())
        flags = np.unpackbits(bits_1W.view(np.uint8), bitorder="little")[: compiler.vocabulary]
        allowed = np.flatnonzero(flags)
        assert len(allowed)
        token = int(rng.choice(allowed))
        if token == 1:
            return answer
        answer.append(token)
    return None


def check(schemas: int) -> tuple[int, int]:
    """Check answers to so many schemas; return how many were finished and refused."""
    tokenizer = load(str(demo.EXPERT))
    compiler = GrammarCompiler(TokenTexts.of(tokenizer, tokenizer.size))
    finished, refused = 0, 0
    for seed in range(schemas):
        schema = random_schema(random.Random(seed))  # noqa: S311 - no secret
        try:
            answer = sampled(compiler, schema, seed)
        except InvalidRequest:
            refused += 1
            continue
        if answer is not None:
            finished += 1
            text = b"".join(map(tokenizer.bytes_of, answer)).decode()
            jsonschema.validate(json.loads(text), schema)
    return finished, refused


def test_finished_answers_to_random_schemas_validate() -> None:
    finished, refused = check(100)
    assert finished > 60
    assert refused == 0


@pytest.mark.slow
def test_finished_answers_to_two_thousand_random_schemas_validate() -> None:
    finished, refused = check(SCHEMAS)
    assert finished > 0.6 * SCHEMAS
    assert refused == 0
