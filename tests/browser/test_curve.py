"""The curve of an evaluation, which the page draws if the settings name one."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
from tests.browser.test_playground import ask, done
from tests.support.evaluation_results import cell, make_results
from tests.support.http_server import serve_http

from cascade.api.http import create_app
from cascade.api.playground.evaluation import read
from cascade.evaluation import report
from cascade.evaluation.results import save

if TYPE_CHECKING:
    from pathlib import Path

    from tests.browser.test_playground import Opened

    from cascade.api.context import ServingContext

pytestmark = [pytest.mark.browser, pytest.mark.timeout(180)]


@pytest.fixture
def evaluated(service: ServingContext, tmp_path: Path) -> ServingContext:
    """The service with the curve of a made-up evaluation."""
    cells = [
        cell("token_v3", dial=dial, quality=[quality] * 6, expert_passes=[passes] * 6)
        for dial, quality, passes in ((0.5, 0.9, 4.0), (0.9, 0.8, 2.0))
    ]
    cells += [
        cell("lossy", dial=0.2),
        cell("sequence_cascade", dial=-0.1),
        cell("ensemble", dial=0.4),
    ]
    results = make_results(cells=cells)
    save(results, tmp_path / "results.json", figures=report.estimates(results))
    return replace(service, evaluation=read(str(tmp_path)))


async def test_a_point_of_the_curve_sets_a_column(
    opened: Opened, evaluated: ServingContext
) -> None:
    async with serve_http(create_app(evaluated)) as address, opened(address) as page:
        point = page.locator("[data-point='token_v3 0.5']")
        await point.hover()
        said = await page.locator("[data-figure='point']").inner_text()
        assert said == "token_v3 0.5: quality 90.0 [90.0, 90.0], 4.00 expert passes of an answer"
        await point.click()
        assert (
            await page.locator("[data-column='1'] h2").inner_text()
            == "Speculative cascade, token_v3 0.5"
        )
        assert await page.locator("#alpha-1").input_value() == "0.5"
        assert await page.locator("#draft_tokens-1").input_value() == "5"
        await ask(page)
        await done(page, 0, 1)


async def test_the_curve_is_explored_with_the_keyboard_alone(
    opened: Opened, evaluated: ServingContext
) -> None:
    """Each setting becomes one that the server answers."""
    async with serve_http(create_app(evaluated)) as address, opened(address) as page:
        await page.locator("#cost").select_option("latency")
        await page.locator("#target").select_option("0")
        await page.locator("#target").focus()
        await page.keyboard.press("Tab")
        seen = set[str]()
        for _ in range(await page.locator("[data-point]").count()):
            point = await page.evaluate("document.activeElement.dataset.point")
            await page.keyboard.press("Enter")
            await page.locator(f"[role='status']:has-text('{point} is in column 1')").wait_for()
            seen.add(await page.locator("[data-column='0'] h2").inner_text())
            await page.locator("#target").focus()
            await ask(page)
            await done(page, 0, 1)
            await page.locator(f"[data-point='{point}']").focus()
            await page.keyboard.press("ArrowRight")
        assert len(seen) == 8
