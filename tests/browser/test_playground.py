"""What a person does on the page: ask, stop, turn the dial, compare, look closer."""

from __future__ import annotations

import asyncio
import gzip
import json
import os
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, get_args

import httpx2
import pytest
from axe_playwright_python.async_playwright import Axe
from pydantic import Field, TypeAdapter
from tests.support.http_server import serve_http
from tests.support.programs import execute, install_node_clients

from cascade.api.http import create_app
from cascade.api.keys import Keys
from cascade.api.playground import FOLDER
from cascade.errors import ExpertUnavailable
from cascade.rules import Rule

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable
    from contextlib import AbstractAsyncContextManager

    from playwright.async_api import Locator, Page

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


async def test_a_budget_bounds_how_far_an_answer_goes_from_the_expert(opened: Opened) -> None:
    """Under each answer stands what it took of both models, and its divergence."""
    async with opened() as page:
        await page.locator("[data-column='1'] details summary").first.click()
        for budget, first in (("0", "Edwin"), ("100", "Buzz")):
            await page.locator("#divergence_budget-1").fill(budget)
            await page.locator("#divergence_budget-1").press("Tab")
            await ask(page)
            await done(page, 0, 1)
            assert (await answer(page, 1)).startswith(first)
            column = page.locator("[data-column='1']")
            assert float(await figure(column, "expert seconds")) > 0
            spent = float(await figure(column, "divergence from the expert"))
            assert spent == 0 if first == "Edwin" else 1 <= spent <= 100


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


async def test_a_word_shows_both_models_probabilities_the_decision_and_the_alternatives(
    opened: Opened,
) -> None:
    """Of a kept word, of one that was drafted and rejected, and of one that nobody drafted."""
    async with opened() as page:
        await page.locator("#mode-0").select_option("speculative")
        await ask(page)
        await done(page, 0, 1)
        kept, rejected = [page.locator(f"[data-column='{column}']") for column in (1, 0)]
        await kept.locator(".token").first.hover()
        assert await figure(kept, "decision") == "kept"
        assert await probabilities(kept, "Buzz") == (17, 92)
        assert await probabilities(kept, "Edwin") == (82, 2)

        await rejected.locator(".token").first.hover()
        assert await figure(rejected, "decision") == "expert"
        details = rejected.locator(".details")
        assert 'The drafter proposed "Buzz"; the rule rejected' in await details.inner_text()
        assert await probabilities(rejected, "Edwin") == (82, 2)
        assert await probabilities(rejected, "Buzz") == (17, 92)

        await page.locator("#mode-0").select_option("expert_only")
        await ask(page)
        await done(page, 0, 1)
        await rejected.locator(".token").first.hover()
        assert "nothing was drafted here" in await details.inner_text()
        assert await probabilities(rejected, "Edwin") == (82, None)


async def figure(part: Locator, name: str) -> str:
    return await part.locator(f"[data-figure='{name}']").inner_text()


async def probabilities(column: Locator, token: str) -> tuple[int | None, int | None]:
    """Return the whole per cents under the expert and the drafter; None: it was not asked."""
    row = column.locator(f"tr[data-token='{token}']")
    expert, drafter = [await figure(row, name) for name in ("expert", "drafter")]
    return _percent(expert), _percent(drafter)


def _percent(text: str) -> int | None:
    return None if text == "not asked" else int(float(text.removesuffix(" %")))


PROGRAMS = {"curl": "bash", "Python": sys.executable, "Node": "node"}


@pytest.mark.parametrize("kind", ["chat", "completion"])
@pytest.mark.parametrize("language", PROGRAMS)
async def test_code_that_is_copied_runs_and_says_what_the_page_says(
    opened: Opened, service: ServingContext, tmp_path: Path, language: str, kind: str
) -> None:
    """On a server that wants a key, which the code has from the environment."""
    if language == "Node":
        await install_node_clients(tmp_path)
    app = create_app(replace(service, keys=Keys(["sk-mine"])))
    async with serve_http(app) as address, opened(address) as page:
        await page.context.grant_permissions(["clipboard-read", "clipboard-write"])
        await page.locator("#key").fill("sk-mine")
        await page.locator("#kind").select_option(kind)
        await page.locator("#question").fill('Who is Buzz Aldrin\'s "friend"?')
        await page.get_by_text("Schema and tools").click()
        await page.locator("#schema").fill('{"type": "string", "maxLength": 12}')
        await page.locator("button.main:not([disabled])").wait_for()
        await ask(page)
        await done(page, 0, 1)
        expected = await answer(page, 1)
        column = page.locator("[data-column='1']")
        await column.get_by_role("button", name=language).click()
        await column.get_by_role("button", name="Copy").click()
        await column.get_by_text("Copied").wait_for()
        text: str = await page.evaluate("navigator.clipboard.readText()")
        assert text == await column.locator("pre").inner_text()
        assert "sk-mine" not in text
        file = tmp_path / {"curl": "ask.sh", "Python": "ask.py", "Node": "ask.js"}[language]
        file.write_text(text)
        command = ["env", "CASCADE_API_KEY=sk-mine", PROGRAMS[language], file.name]
        code, printed, error = await execute(*command, cwd=tmp_path, timeout_s=120)
        assert code == 0, error
        if language == "curl":
            (choice,) = json.loads(printed)["choices"]
            printed = choice["text"] if kind == "completion" else choice["message"]["content"]
        assert printed.strip() == expected


async def test_copying_without_a_clipboard_says_what_to_do(opened: Opened) -> None:
    """Browsers give none to pages over plain HTTP from another machine."""
    async with opened() as page:
        await page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
        column = page.locator("[data-column='1']")
        await column.get_by_role("button", name="curl").click()
        await column.get_by_role("button", name="Copy").click()
        await column.get_by_text("select the text and copy it").wait_for()


async def test_every_rule_and_the_ends_of_its_dial_are_what_the_server_takes(
    opened: Opened,
) -> None:
    script = """async () => {
        const { RULES, ruleOf } = await import("/playground/rules.js");
        return Object.entries(RULES).map(([rule, dial]) =>
            [dial?.min, dial?.max].map((alpha) => ruleOf({ rule, alpha })));
    }"""
    adapter: TypeAdapter[Rule] = TypeAdapter(Annotated[Rule, Field(discriminator="kind")])
    async with opened() as page:
        found = [
            [adapter.validate_python(one) for one in ends] for ends in await page.evaluate(script)
        ]
    assert {type(one) for ends in found for one in ends} == set(get_args(Rule))


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


class Broken(Slow):
    """Ends the connection after the first chunk of each answer was seen, without a word."""

    def __init__(self, service: ServingContext) -> None:
        super().__init__(service)
        self.seen = asyncio.Event()

    async def generate(self, request: Request) -> AsyncGenerator[OutputChunk]:
        async for chunk in self._service.generator.generate(request):
            yield chunk
            await self.seen.wait()
            raise asyncio.CancelledError


async def test_an_answer_that_breaks_off_is_not_shown_as_whole(
    opened: Opened, service: ServingContext
) -> None:
    broken = Broken(service)
    app = create_app(replace(service, generator=broken))
    async with serve_http(app) as address, opened(address) as page:
        await ask(page)
        for column in range(2):
            await page.locator(f"[data-column='{column}'] .token").first.wait_for()
        broken.seen.set()
        alert = page.locator("[data-column='0'] [role='alert']")
        await alert.wait_for()
        assert re.search("broke off|does not answer", await alert.inner_text())
        assert await page.locator("[data-column='0'][data-state='failed'] .token").count()


async def test_a_server_that_has_gone_is_a_sentence(opened: Opened) -> None:
    async with opened() as page:
        await page.route("**/v1/chat/**", lambda route: route.abort())
        await ask(page)
        alert = page.locator("[data-column='0'] [role='alert']")
        assert "does not answer" in await alert.inner_text()


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
