"""Random JSON schemas: every finished answer is JSON that its schema describes, and all end.

Two random models answer at temperature 1, through router and both tiers.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest
import torch
from transformers import AutoConfig, LlamaForCausalLM

from cascade import demo
from cascade.engine.tokenizer import load
from cascade.local import local_server
from cascade.rules import Chow, Diff, Lossless, TokenV3
from cascade.settings import Application
from cascade.types import (
    Coupling,
    DecodingParams,
    FinishReason,
    Grammar,
    GrammarKind,
    Mode,
    Request,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

    from cascade.local import LocalServer

SCHEMAS, TOKENS, AT_ONCE, TIMEOUT_S = 2000, 400, 16, 300
RULES = (Lossless(), TokenV3(alpha=0.5), Diff(alpha=0.1), Chow(alpha=0.3))


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


def random_model(folder: Path, *, width: int, seed: int) -> str:
    """Write a random model with the tokenizer that ships."""
    shutil.copytree(demo.EXPERT, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    config: Any = AutoConfig.from_pretrained(folder)
    config.update({"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1})
    config.update({"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": width // 2})
    torch.manual_seed(seed)
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=1 / width**0.5)
    model.save_pretrained(folder)
    return str(folder)


def request(schema: dict[str, Any], seed: int, stop_ids: tuple[int, ...]) -> Request:
    """Return a request for an answer; the seed also chooses how it is decoded."""
    rng = random.Random(seed)  # noqa: S311 - no secret
    policy = DecodingParams(
        rule=rng.choice(RULES),
        coupling=rng.choice([*Coupling]),
        seed=seed,
        stop_ids=stop_ids,
        grammar=Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema)),
    )
    draft_tokens = rng.choice([None, 1, 4, 8])
    return Request(
        prompt=(5, 6, 7),
        policy=policy,
        mode=Mode.CASCADE,
        max_tokens=TOKENS,
        draft_tokens=draft_tokens,
    )


async def check(server: LocalServer, schemas: int) -> int:
    """Check answers to so many schemas; return how many were finished."""
    tokenizer, slots = load(str(demo.EXPERT)), asyncio.Semaphore(AT_ONCE)

    async def is_finished(seed: int) -> bool:
        schema = random_schema(random.Random(seed))  # noqa: S311 - no secret
        asked = request(schema, seed, tokenizer.stop_ids)
        async with slots, asyncio.timeout(TIMEOUT_S):
            chunks = [chunk async for chunk in server.router.generate(asked)]
        if chunks[-1].finish is FinishReason.LENGTH:
            return False
        tokens = [token for chunk in chunks for token in chunk.tokens]
        assert tokens.pop() in tokenizer.stop_ids
        text = b"".join(map(tokenizer.bytes_of, tokens)).decode()
        jsonschema.validate(json.loads(text), schema)
        return True

    return sum(await asyncio.gather(*map(is_finished, range(schemas))))


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[LocalServer]:
    engine = {"threads": 1}
    models = {"drafter": (16, 1), "expert": (32, 2)}
    tiers = {
        tier: {"model": random_model(tmp_path / tier, width=width, seed=seed), "engine": engine}
        for tier, (width, seed) in models.items()
    }
    settings = Application.model_validate({**tiers, "router": {"draft_deadline_s": 120}})
    async with local_server(settings) as running:
        yield running


async def test_finished_answers_to_random_schemas_validate(server: LocalServer) -> None:
    assert await check(server, 8) > 4


@pytest.mark.slow
@pytest.mark.timeout(3600)
async def test_finished_answers_to_two_thousand_random_schemas_validate(
    server: LocalServer,
) -> None:
    assert await check(server, SCHEMAS) > 0.6 * SCHEMAS
