"""The playground in headless Chromium, over the shipped pair."""

from __future__ import annotations

import shutil
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
from tests.support.http_server import serve_http

from cascade.api.http import create_app
from cascade.local import local_server
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from playwright.async_api import Browser, Page

    from cascade.api.context import ServingContext

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = (
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture(scope="session")
async def browser() -> AsyncIterator[Browser]:
    playwright = pytest.importorskip("playwright.async_api")
    if CHROMIUM is None:
        pytest.skip("no Chromium: apt-get install chromium")
    async with playwright.async_playwright() as started:
        made = await started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield made
        await made.close()


@pytest.fixture(scope="session")
async def service() -> AsyncIterator[ServingContext]:
    # Every round has a draft, however busy the machine is: automatic lengths may be 0.
    settings = Application.model_validate(
        {"router": {"draft_deadline_s": 120}, "defaults": {"draft_tokens": 5}}
    )
    async with local_server(settings) as running:
        yield running.service


@pytest.fixture(scope="session")
async def url(service: ServingContext) -> AsyncIterator[str]:
    async with serve_http(create_app(service)) as found:
        yield found


@pytest.fixture
def opened(browser: Browser, url: str) -> Callable[..., AbstractAsyncContextManager[Page]]:
    """Return what opens the page, at `address` or over the shipped pair.

    The page must ask nobody but its server, and nothing may go wrong in its scripts.
    """

    @asynccontextmanager
    async def open_page(
        address: str = url, *, width: int = 1440, scheme: str = "light", script: str = ""
    ) -> AsyncGenerator[Page]:
        context = await browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme="dark" if scheme == "dark" else "light",
        )
        page = await context.new_page()
        asked, wrong = list[str](), list[str]()
        page.on("request", lambda request: asked.append(request.url))
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        if script:  # runs before those of the page
            await page.add_init_script(script)
        await page.goto(address)
        yield page
        await context.close()
        assert all(one.startswith((address, "data:")) for one in asked), asked
        # What a refused request writes there is the page's own subject.
        assert [one for one in wrong if "Failed to load resource" not in one] == []

    return open_page
