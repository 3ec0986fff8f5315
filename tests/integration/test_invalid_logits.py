"""A model whose logits are NaN ends its own answer with an error, and no other answer."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import torch
from tests.conftest import Folder, Pair, random_model
from tests.support.http_server import serve_http

from cascade.api.http import create_app
from cascade.local import local_server

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from pathlib import Path

VOCABULARY = 300
POISON = chr(0x41 + VOCABULARY - 1)  # the word whose states overflow


def poisoned(folder: Path) -> Folder:
    """Write a model whose weights are finite, and whose states overflow at one token."""
    found = random_model(folder, vocabulary=VOCABULARY, width=64, layers=2, seed=3)
    body: Any = found.model.model
    first = body.layers[0]
    with torch.no_grad():
        body.embed_tokens.weight[:, -1] = 0
        body.embed_tokens.weight[-1] = 0
        body.embed_tokens.weight[-1, -1] = 1
        first.self_attn.o_proj.weight[-1] = 0
        for matrix in (first.mlp.gate_proj, first.mlp.up_proj):
            matrix.weight[0] = 0
            matrix.weight[0, -1] = 1e30
    found.model.save_pretrained(folder)
    return found


def sound(folder: Path) -> Folder:
    return random_model(folder, vocabulary=VOCABULARY, width=32, layers=1, seed=4)


@asynccontextmanager
async def served(pair: Pair) -> AsyncGenerator[str]:
    """Serve a pair over HTTP; gives the URL."""
    async with (
        local_server(pair.settings()) as server,
        serve_http(create_app(server.service)) as url,
    ):
        yield url


@pytest.fixture(scope="module")
async def poisoned_expert(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[str]:
    root = tmp_path_factory.mktemp("pair")
    pair = Pair(drafter=sound(root / "drafter"), expert=poisoned(root / "expert"))
    async with served(pair) as url:
        yield url


async def ask(url: str, prompt: str, **fields: Any) -> Any:
    body = {"prompt": prompt, "max_tokens": 8, "temperature": 0} | fields
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return await client.post("/v1/completions", json=body)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "top_p": 0.9, "seed": 3},
        {"temperature": 1, "repetition_penalty": 1.2, "logprobs": 2},
        {"cascade": {"mode": "expert_only"}, "temperature": 1},
        {"cascade": {"verification": "block", "draft_tokens": 3}, "temperature": 1},
        {"cascade": {"rule": {"kind": "token_v3", "alpha": 0.5}, "rows": "full"}},
        {"echo": True, "logprobs": 1},
    ],
    ids=str,
)
async def test_an_expert_without_logits_ends_that_answer_alone(
    poisoned_expert: str, fields: dict[str, Any]
) -> None:
    alone = (await ask(poisoned_expert, "HELLO")).json()
    bad, *others = await asyncio.gather(
        ask(poisoned_expert, f"HE{POISON}LO", **fields),
        *(ask(poisoned_expert, "HELLO") for _ in range(3)),
    )
    assert bad.status_code == 500
    assert bad.json()["error"]["code"] == "invalid_logits"
    assert "NaN or infinite" in bad.json()["error"]["message"]
    for other in others:
        assert other.json()["choices"][0]["text"] == alone["choices"][0]["text"]


async def test_a_drafter_without_logits_is_reported_and_not_used(tmp_path: Path) -> None:
    pair = Pair(drafter=poisoned(tmp_path / "drafter"), expert=sound(tmp_path / "expert"))
    async with served(pair) as url:
        answer = (await ask(url, f"HE{POISON}LO")).json()
        plain = await ask(url, f"HE{POISON}LO", cascade={"mode": "expert_only"})
        required = await ask(url, f"HE{POISON}LO", cascade={"mode": "drafter_only"})
    assert answer["choices"][0]["text"] == plain.json()["choices"][0]["text"]
    statistics = answer["usage"]["cascade"]
    assert statistics["drafted"] == 0
    assert statistics["failover_causes"].get("drafter broken")
    assert required.status_code == 500
    assert required.json()["error"]["code"] == "invalid_logits"


@pytest.mark.parametrize("penalty", [1e-38, 1e-300, 5e-324, 9.9e-7, 0.0, -1.0])
async def test_a_penalty_that_overflows_is_refused(shipped_url: str, penalty: float) -> None:
    refused = await ask(shipped_url, "Who", repetition_penalty=penalty)

    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "repetition_penalty"
