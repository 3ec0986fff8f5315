"""What one caller sends changes no answer of another: the shipped pair over HTTP."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import httpx2
import pytest

from cascade.api.http import create_app
from cascade.local import LocalServer, local_server
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from torch import Tensor

    from cascade.speculation.draft import DraftTask, DraftToken

LENIENT = {"rule": {"kind": "token_v3", "alpha": 0.9}, "draft_tokens": 5}
STRICT = {"rule": {"kind": "lossless"}, "draft_tokens": 5}
ALDRIN = "Who is Buzz Aldrin?"
QUESTIONS = (ALDRIN, "What is the capital of France?", "Translate to French: the red house")


@pytest.fixture(scope="module")
async def server() -> AsyncIterator[LocalServer]:
    """The shipped pair, with a drafter that is never late."""
    tier = {"engine": {"threads": 1}}
    settings = {"drafter": tier, "expert": tier, "router": {"draft_deadline_s": 120}}
    async with local_server(Application.model_validate(settings)) as running:
        yield running


@pytest.fixture(scope="module")
async def http(server: LocalServer) -> AsyncIterator[httpx2.AsyncClient]:
    transport = httpx2.ASGITransport(app=create_app(server.service))
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        yield client


async def ask(http: httpx2.AsyncClient, question: str, **body: Any) -> tuple[str, dict[str, Any]]:
    """Return the text of a greedy answer, and what it cost."""
    message = {"role": "user", "content": question}
    response = await http.post(
        "/v1/chat/completions", json={"messages": [message], "temperature": 0} | body
    )
    assert response.is_success, response.text
    whole = response.json()
    return whole["choices"][0]["message"]["content"], whole["usage"]["cascade"]


async def test_repeated_short_requests_change_nobody_elses_answer(
    http: httpx2.AsyncClient,
) -> None:
    """Sixty times the same two tokens, whose draft is always rejected; and sixteen choices."""
    alone = [await ask(http, question, cascade=LENIENT) for question in QUESTIONS]

    async def repeat() -> None:
        for _ in range(15):
            await asyncio.gather(
                *(ask(http, ALDRIN, max_tokens=2, cascade=STRICT) for _ in range(4))
            )
        for _ in range(2):
            await ask(http, ALDRIN, max_tokens=2, n=16, cascade=STRICT)

    repeating = asyncio.create_task(repeat())
    beside = [await ask(http, question, cascade=LENIENT) for question in QUESTIONS]
    await repeating
    after = [await ask(http, question, cascade=LENIENT) for question in QUESTIONS]
    assert (
        [text for text, _ in beside] == [text for text, _ in after] == [text for text, _ in alone]
    )
    for _, cost in (*beside, *after, await ask(http, ALDRIN, cascade=STRICT)):
        assert cost["drafted"] > 0
        assert cost["undrafted_rounds"] == cost["failover_causes"] == {}
    assert (await http.get("/health")).json() == {"status": "ok"}


async def test_a_corrupted_drafter_is_left_out_where_it_shows_and_used_again_when_it_is_mended(
    server: LocalServer, http: httpx2.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only under the rule of the answers that it spoils, and for no longer than that lasts."""
    right, [text, _] = server.drafter.draft, await ask(http, ALDRIN, cascade=STRICT)

    def corrupted(logits_NV: Tensor, tasks: Sequence[DraftTask]) -> Sequence[DraftToken]:
        return [replace(one, token=one.token ^ 1) for one in right(logits_NV, tasks)]

    monkeypatch.setattr(server.drafter, "draft", corrupted)
    names = "Neil Armstrong", "Ada Lovelace", "Alan Turing", "Marie Curie", "Isaac Newton", "Plato"
    spoilt = [f"Who is {name}?" for name in (*names, "Socrates")]
    costs = [(await ask(http, question, max_tokens=10, cascade=STRICT))[1] for question in spoilt]
    assert all(cost["accepted"] == 0 for cost in costs)
    # However slow the machine is, one answer at a time may draft, so most of these cannot.
    strict = (ask(http, question, max_tokens=10, cascade=STRICT) for question in spoilt)
    assert any("collapsed" in cost["undrafted_rounds"] for _, cost in await asyncio.gather(*strict))
    (warning,) = (await http.get("/health")).json()["warnings"]
    assert "lossless" in warning
    assert (await ask(http, ALDRIN, cascade=LENIENT))[1]["undrafted_rounds"] == {}
    waiting = STRICT | {"on_drafter_loss": "wait"}
    assert (await ask(http, ALDRIN, max_tokens=12, cascade=waiting))[1]["undrafted_rounds"] == {}
    monkeypatch.undo()
    async with asyncio.timeout(60):
        while "warnings" in (await http.get("/health")).json():
            assert (await ask(http, ALDRIN, cascade=STRICT))[0] == text
    assert (await ask(http, ALDRIN, cascade=STRICT))[1]["undrafted_rounds"] == {}


async def test_without_any_drafter_an_answer_says_so_or_is_refused_as_its_request_wishes(
    server: LocalServer, http: httpx2.AsyncClient
) -> None:
    await server.drafter.stop()
    body: dict[str, Any] = {"messages": [{"role": "user", "content": ALDRIN}], "temperature": 0}
    options = LENIENT | {"trace": True}
    whole = (await http.post("/v1/chat/completions", json=body | {"cascade": options})).json()
    lost, own = whole["usage"]["cascade"]["undrafted_rounds"], whole["choices"][0]["cascade"]
    assert set(lost) == {"lost"}
    assert own["undrafted_rounds"] == lost
    assert [one["undrafted"] for one in own["trace"]].count("lost") == lost["lost"]
    options = LENIENT | {"on_drafter_loss": "wait", "deadline_s": 1}
    refused = await http.post("/v1/chat/completions", json=body | {"cascade": options})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "drafter_unavailable")
    assert int(refused.headers["retry-after"]) > 0
