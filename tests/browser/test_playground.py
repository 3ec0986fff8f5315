"""What a person does on the page: ask, stop, turn the dial, compare, look closer."""

from __future__ import annotations

import asyncio
import gzip
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import httpx2
import pytest
from axe_playwright_python.async_playwright import Axe
from tests.support.http_server import serve_http

from cascade.api.http import create_app
from cascade.api.keys import Keys
from cascade.api.playground import FOLDER
from cascade.errors import ExpertUnavailable

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from playwright.async_api import Page

    from cascade.api.context import ServingContext
    from cascade.types import OutputChunk, Request

    Opened: TypeAlias = Callable[..., AbstractAsyncContextManager[Page]]

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]

SCREENSHOTS = os.environ.get("BROWSER_SCREENSHOTS")  # a folder
LIMIT_BYTES = 120_000  # of the page, compressed


async def ask(page: Page) -> None:
    await page.get_by_role("button", name="Ask").click()


async def done(page: Page, *columns: int) -> None:
    for column in columns:
        await page.locator(f"[data-column='{column}'][data-state='done']").wait_for()


async def answer(page: Page, column: int) -> str:
    return (await page.locator(f"[data-column='{column}'] .answer").inner_text()).strip()


async def origins(page: Page, column: int) -> list[str]:
    tokens = page.locator(f"[data-column='{column}'] .token")
    found = await tokens.evaluate_all("all => all.map(one => one.dataset.origin)")
    return list(found)


async def keep(page: Page, name: str) -> None:
    if SCREENSHOTS:
        await page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


async def test_a_question_is_answered_side_by_side_in_colours(opened: Opened) -> None:
    async with opened() as page:
        await ask(page)
        await done(page, 0, 1)
        assert (await answer(page, 0)).startswith("Edwin")
        assert (await answer(page, 1)).startswith("Buzz")
        assert set(await origins(page, 0)) == {"e"}
        assert {"d", "k"} <= set(await origins(page, 1))
        passes = page.locator("[data-figure='expert passes']")
        expert, cascade = [int(text) for text in await passes.all_inner_texts()]
        assert cascade < expert
        await keep(page, "side-by-side")


async def test_the_dial_changes_whose_wording_the_answer_has(opened: Opened) -> None:
    async with opened() as page:
        for alpha, first in (("0", "Edwin"), ("0.9", "Buzz")):
            await page.locator("#alpha-1").fill(alpha)
            await ask(page)
            await done(page, 0, 1)
            assert (await answer(page, 1)).startswith(first)


async def test_four_ways_of_answering_fit_beside_each_other(opened: Opened) -> None:
    async with opened() as page:
        for _ in range(2):
            await page.get_by_role("button", name="Compare with another").click()
        assert await page.get_by_role("button", name="Compare with another").is_disabled()
        await ask(page)
        await done(page, 0, 1, 2, 3)
        names = await page.locator(".column h2").all_inner_texts()
        assert len(set(names)) == 4
        await keep(page, "four")


async def test_the_tour_shows_four_ways_of_answering(opened: Opened) -> None:
    """A cascade keeps or throws away whole answers; a speculative cascade keeps words."""
    async with opened() as page:
        await page.get_by_role("button", name="Four ways of answering").click()
        await ask(page)
        await done(page, 0, 1, 2, 3)
        said = [await answer(page, column) for column in range(4)]
        assert [text.partition(" ")[0] for text in said] == ["Buzz", "Edwin", "Edwin", "Buzz"]
        figures = page.locator("[data-figure='expert passes']")
        passes = [int(text) for text in await figures.all_inner_texts()]
        assert passes[0] == 0
        assert passes[1] > passes[2] > passes[3] > 0
        await keep(page, "tour")


async def test_an_answer_can_be_explored_with_the_keyboard_alone(opened: Opened) -> None:
    async with opened() as page:
        await page.locator("#question").focus()
        for _ in range(3):
            await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await done(page, 0, 1)
        await page.locator("[data-column='1'] .answer").focus()
        await page.keyboard.press("ArrowRight")
        details = page.locator("[data-column='1'] .details")
        assert '"Buzz" kept.' in await details.inner_text()
        await page.keyboard.press("ArrowRight")
        assert "drafted." in await details.inner_text()
        await page.keyboard.press("End")
        assert await page.locator("[data-column='1'] .token.chosen").count() == 1


async def test_a_word_shows_its_probability_and_the_alternatives(opened: Opened) -> None:
    async with opened() as page:
        await ask(page)
        await done(page, 0, 1)
        await page.locator("[data-column='1'] .token").first.hover()
        details = page.locator("[data-column='1'] .details")
        assert "%" in await details.locator("[data-figure='probability']").inner_text()
        assert '"Edwin"' in await details.inner_text()


async def test_a_request_can_be_copied_as_code(opened: Opened) -> None:
    async with opened() as page:
        column = page.locator("[data-column='1']")
        parts = {"curl": "curl http", "Python": "extra_body", "Node": "import OpenAI"}
        for language, part in parts.items():
            await column.get_by_role("button", name=language).click()
            text = await column.locator("pre").inner_text()
            assert part in text
            assert "token_v3" in text


async def test_a_schema_shapes_the_answer_and_marks_forced_tokens(opened: Opened) -> None:
    schema = '{"type": "object", "properties": {"a": {"enum": ["x"]}}, "required": ["a"]}'
    async with opened() as page:
        await page.get_by_text("Schema and tools").click()
        await page.locator("#schema").fill(schema)
        await ask(page)
        await done(page, 0, 1)
        assert '"a"' in await answer(page, 1)
        assert "f" in await origins(page, 1)


class Slow:
    """Lets the first chunk of each answer through, and holds the rest until it is cancelled."""

    def __init__(self, service: ServingContext) -> None:
        self._service = service
        self.cancelled = 0
        self.score = service.generator.score

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        try:
            async for chunk in self._service.generator.generate(request):
                yield chunk
                await asyncio.Event().wait()
        finally:
            self.cancelled += 1


async def test_stop_ends_the_answers_here_and_on_the_server(
    opened: Opened, service: ServingContext
) -> None:
    slow = Slow(service)
    app = create_app(replace(service, generator=slow))
    async with serve_http(app) as address, opened(address) as page:
        await ask(page)
        await page.locator("[data-column='0'] .token").first.wait_for()
        await page.get_by_role("button", name="Stop").click()
        for column in (0, 1):
            await page.locator(f"[data-column='{column}'][data-state='stopped']").wait_for()
        while slow.cancelled < 2:  # noqa: ASYNC110 - untold
            await asyncio.sleep(0.05)
        assert await page.locator(".error").count() == 0


class Dead:
    """Has no expert."""

    def __init__(self, service: ServingContext) -> None:
        self.score = service.generator.score

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        del request
        raise ExpertUnavailable("no expert replica answered")
        yield  # so that it is a generator


async def test_a_dead_expert_is_a_sentence(opened: Opened, service: ServingContext) -> None:
    app = create_app(replace(service, generator=Dead(service)))
    async with serve_http(app) as address, opened(address) as page:
        await ask(page)
        alert = page.locator("[data-column='0'] [role='alert']")
        assert "No expert answers right now" in await alert.inner_text()
        await keep(page, "dead-expert")


async def test_a_server_with_keys_asks_for_one(opened: Opened, service: ServingContext) -> None:
    app = create_app(replace(service, keys=Keys(["sk-mine"])))
    async with serve_http(app) as address, opened(address) as page:
        assert "wants an API key" in await page.get_by_role("alert").inner_text()
        await page.locator("#key").fill("sk-mine")
        await page.locator("#question").focus()
        await page.locator("button.main:not([disabled])").wait_for()
        await ask(page)
        await done(page, 0, 1)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1440])
async def test_the_page_is_accessible_and_fits_the_screen(
    opened: Opened, width: int, scheme: str
) -> None:
    async with opened(width=width, scheme=scheme) as page:
        await ask(page)
        await done(page, 0, 1)
        await page.locator("[data-column='1'] .token").first.hover()
        fits = "document.documentElement.scrollWidth <= window.innerWidth"
        assert await page.evaluate(fits)
        found = await Axe().run(page)
        serious: list[Any] = [
            (one["id"], one["nodes"][0]["html"])
            for one in found.response["violations"]
            if one["impact"] in {"serious", "critical"}
        ]
        assert serious == []
        await keep(page, f"{width}-{scheme}")


def test_the_page_is_small() -> None:
    files = [one for one in FOLDER.rglob("*") if one.suffix in {".html", ".js", ".css"}]
    assert len(files) >= 5
    assert sum(len(gzip.compress(one.read_bytes())) for one in files) < LIMIT_BYTES


async def test_the_page_can_be_switched_off(service: ServingContext) -> None:
    transport = httpx2.ASGITransport(app=create_app(service, has_playground=False))
    async with httpx2.AsyncClient(transport=transport, base_url="http://s") as client:
        for path in ("/", "/playground/app.js"):
            assert (await client.get(path)).status_code == 404
