"""Lossless text of a quantised expert is that expert's own, as transformers writes it.

The reference runs one prompt at a time with transformers' own cache. See `Kind.reference` for how
it loads the checkpoint: where the scheme quantises activations, with unpacked weights.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from tests.conftest import Folder, random_model
from tests.support.generation import greedy_answer
from tests.support.quantised import KINDS, MORE, read

from cascade.local import LocalServer, local_server
from cascade.settings import Application
from cascade.types import DecodingParams, Mode, Request, SamplingParams

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

GREEDY = DecodingParams(sampling=SamplingParams(temperature=0.0))
ALL = KINDS | MORE
LONGEST = 24
VOCABULARY = 64


@dataclass(frozen=True, kw_only=True)
class Checkpoints:
    """A model, and where its quantised versions are."""

    plain: Folder
    root: Path

    def __getitem__(self, name: str) -> Path:
        folder = self.root / name
        return folder if folder.exists() else ALL[name].make(self.plain.path, folder)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    root = tmp_path_factory.mktemp("quantised")
    plain = random_model(root / "plain", vocabulary=VOCABULARY, width=64, layers=2, seed=4)
    return Checkpoints(plain=plain, root=root)


def prompts(count: int) -> list[tuple[int, ...]]:
    chance = random.Random(5)  # noqa: S311 - nothing secret
    return [
        tuple(chance.randrange(VOCABULARY) for _ in range(chance.randrange(1, 40)))
        for _ in range(count)
    ]


def own_text(model: Any, prompt: Sequence[int]) -> tuple[int, ...]:
    """Return the greedy answer of plain transformers."""
    return greedy_answer(model, prompt, max_tokens=LONGEST)


def requests(texts: Sequence[tuple[int, ...]], mode: Mode) -> list[Request]:
    """Return requests with blocks of 1 to 8 drafted tokens."""
    return [
        Request(
            prompt=text, policy=GREEDY, mode=mode, max_tokens=LONGEST, draft_tokens=1 + number % 8
        )
        for number, text in enumerate(texts)
    ]


async def answers(server: LocalServer, asked: Sequence[Request]) -> list[tuple[int, ...]]:
    """Return answers that are generated together."""

    async def one(request: Request) -> tuple[int, ...]:
        chunks = [chunk async for chunk in server.router.generate(request)]
        return tuple(token for chunk in chunks for token in chunk.tokens)

    return list(await asyncio.gather(*map(one, asked)))


async def check(*, drafter: Path, expert: Path, own: Any, other: Any, count: int) -> None:
    """Serve a pair and compare its text.

    Args:
        drafter: Its checkpoint.
        expert: Its checkpoint.
        own: The expert as transformers runs it.
        other: A model whose text differs.
        count: How many prompts.
    """
    texts = prompts(count)
    expected = [own_text(own, text) for text in texts]
    assert expected != [own_text(other, text) for text in texts]
    engine = {"threads": 1, "dtype": "float32"}
    settings = Application.model_validate(
        {
            "drafter": {"model": str(drafter), "engine": engine},
            "expert": {"model": str(expert), "engine": engine},
        }
    )
    async with local_server(settings) as server:
        for mode in (Mode.EXPERT_ONLY, Mode.SPECULATIVE):
            assert await answers(server, requests(texts, mode)) == expected


@pytest.mark.parametrize("name", ["torchao int8", "compressed-tensors W4A16", "fp8"])
async def test_a_quantised_expert_writes_its_own_text(checkpoints: Checkpoints, name: str) -> None:
    folder = checkpoints[name]
    await check(
        drafter=checkpoints.plain.path,
        expert=folder,
        own=KINDS[name].reference(folder),
        other=checkpoints.plain.model,
        count=6,
    )


async def test_a_quantised_drafter_changes_no_token(checkpoints: Checkpoints) -> None:
    name = "torchao int8"
    await check(
        drafter=checkpoints[name],
        expert=checkpoints.plain.path,
        own=checkpoints.plain.model,
        other=read(checkpoints["torchao int4"]),
        count=6,
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    ("name", "quantised"),
    [
        *((name, which) for name in KINDS for which in ("expert", "drafter", "both")),
        *((name, "expert") for name in MORE if not name.endswith("keys and values")),
    ],
)
async def test_fifty_prompts(checkpoints: Checkpoints, name: str, quantised: str) -> None:
    folder, plain = checkpoints[name], checkpoints.plain
    own, other = ALL[name].reference(folder), plain.model
    if quantised == "drafter":
        own, other = other, own
    await check(
        drafter=plain.path if quantised == "expert" else folder,
        expert=plain.path if quantised == "drafter" else folder,
        own=own,
        other=other,
        count=50,
    )
