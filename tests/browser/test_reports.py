"""Reports of real measurements, on a phone, on a desk and on paper."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import pytest
from axe_playwright_python.async_playwright import Axe

from cascade.benchmark import report as benchmark
from cascade.benchmark.load import ClosedLoop
from cascade.benchmark.runner import compare
from cascade.benchmark.suite import CaseResult, Claim
from cascade.benchmark.systems import Role, System
from cascade.evaluation import tune_report
from cascade.evaluation.client import InProcessClient, request_body
from cascade.evaluation.environment import provenance
from cascade.evaluation.grid import GridBlock, merge_blocks
from cascade.evaluation.run import Run, evaluate, write
from cascade.evaluation.tune import judged, parse
from cascade.evaluation.workloads import load

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractAsyncContextManager

    from playwright.async_api import Page

    from cascade.api.context import ServingContext

    Opened: TypeAlias = Callable[..., AbstractAsyncContextManager[Page]]

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

SCREENSHOTS = os.environ.get("BROWSER_SCREENSHOTS")  # a folder
PAGES = ("report", "tune", "bench", "suite")
PAPER = (1032, 703)  # what margins leave of A4, landscape, in CSS pixels


@pytest.fixture(scope="module")
async def folder(service: ServingContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a report of each kind, measured with the pair that ships."""
    out = tmp_path_factory.mktemp("reports")
    client = InProcessClient(service, name="shipped")
    workload = load("facts,translation", count=1)
    curves = {"token_v3": [0.9], "lossy": [0.5], "sequence_cascade": [-0.1]}
    settings = merge_blocks([GridBlock(temperatures=[0, 1], curves=curves)])
    results = await evaluate(workload, settings, client, run=Run(folder=out))
    write(results, out)
    choices = judged(results, [parse("quality >= expert - 99")], group="all", temperature=0)
    chosen = tune_report.page(results, choices, confidence=0.5)
    (out / "tune.html").write_text(chosen.html(), encoding="utf-8")
    systems = [
        System(name="expert_only", client=client, options={"mode": "expert_only"},
               role=Role.EXPERT_ALONE),
        System(name="lossless, drafts of 4 tokens, early stop at confidence 0.4", client=client),
    ]  # fmt: skip
    bodies = [request_body(item, temperature=0) for item in workload.items]
    compared = await compare(systems, bodies, ClosedLoop(), rounds=2)
    document = benchmark.document(compared, notes=["A note."], provenance=provenance())
    benchmark.write(document, folder=out, name="bench")
    claim = Claim(case="one stream, 120M", says="speed", measured=1.0, least=2.0)
    for case in ("one_stream", "sixteen_streams"):
        found = CaseResult(claims=(claim,), comparisons={"speed": (compared, "A note.")})
        benchmark.write_suite(case, found, folder=out, provenance=provenance())
    return out


async def keep(page: Page, name: str) -> None:
    if SCREENSHOTS:
        await page.screenshot(path=Path(SCREENSHOTS) / f"{name}.png", full_page=True)


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize(("width", "scheme"), [(390, "light"), (390, "dark"), (1440, "light")])
async def test_a_report_is_readable(
    opened: Opened, folder: Path, name: str, width: int, scheme: str
) -> None:
    """Wide tables scroll inside themselves, under their headings; nothing is asked of a network."""
    address = (folder / f"{name}.html").as_uri()
    async with opened(address, width=width, scheme=scheme) as page:
        await keep(page, f"{name}-{width}-{scheme}")
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        pictures = page.locator("img")
        assert await pictures.evaluate_all("all => all.every(one => one.naturalWidth > 0)")
        top = page.locator(".lead").first
        box = await top.bounding_box()
        assert box is not None
        assert box["y"] < 200
        boxes = page.locator(".scroll")
        moved = await boxes.evaluate_all(
            """all => all.map(box => {
              box.scrollTo(9999, 9999)
              const edge = box.getBoundingClientRect(), style = getComputedStyle
              const heading = box.querySelector("thead th").getBoundingClientRect()
              return Math.abs(heading.top - edge.top) < 3 && Math.abs(heading.left - edge.left) < 3
            })"""
        )
        assert moved
        assert all(moved), "headings and first columns stay where they are"
        found = await Axe().run(page)  # pyright: ignore[reportUnknownMemberType] - untyped
        serious = [
            one for one in found.response["violations"] if one["impact"] in {"serious", "critical"}
        ]
        assert serious == []


@pytest.mark.parametrize("name", PAGES)
async def test_paper_has_every_row_of_a_report(
    opened: Opened, folder: Path, tmp_path: Path, name: str
) -> None:
    async with opened((folder / f"{name}.html").as_uri(), width=PAPER[0], scheme="dark") as page:
        await page.emulate_media(media="print", color_scheme="dark")
        assert await page.evaluate("document.documentElement.scrollWidth") <= PAPER[0]
        cut: list[Any] = await page.evaluate(
            """width => [...document.querySelectorAll(".scroll, pre, tr, img")].filter(one =>
              one.scrollWidth > one.clientWidth + 1 && one.matches(".scroll, pre")
              || one.scrollHeight > one.clientHeight + 1 && one.matches(".scroll, pre")
              || one.getBoundingClientRect().right > width
              || one.getBoundingClientRect().height < 8).map(one => one.outerHTML)""",
            PAPER[0],
        )
        assert cut == []
        colors = await page.evaluate(
            "[document.body, document.querySelector('.lead')].map(one => getComputedStyle(one))"
            ".map((style, n) => n ? style.color : style.backgroundColor)"
        )
        assert colors == ["rgb(255, 255, 255)", "rgb(26, 29, 33)"], "light, whatever the screen is"
        height = await page.evaluate("document.documentElement.scrollHeight")
        printed = await page.pdf(prefer_css_page_size=True)
        (tmp_path / f"{name}.pdf").write_bytes(printed)
        pages = len(re.findall(rb"/Type\s*/Page\b", printed))
        assert pages * PAPER[1] >= height
