"""Measures the page at 200 tokens a second in each of four columns.

`python -m tests.browser.frames` serves the shipped pair's own answers, recorded and replayed at
that rate, and prints how many frames Chromium's trace says were dropped, and in a second run, which
watches the page from inside, what its own clock says. Before that, the same of a page that only
adds words to four columns. Stop other work first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import rich
from playwright.async_api import async_playwright
from tests.browser.conftest import CHROMIUM, FLAGS
from tests.browser.replay import Paced, Replay
from tests.browser.test_frames import COLUMNS, WATCH
from tests.support.http_server import serve_http

from cascade.api.http import create_app
from cascade.local import local_server
from cascade.settings import Application

if TYPE_CHECKING:
    from playwright.async_api import Page, ViewportSize

VIEWPORT: ViewportSize = {"width": 1440, "height": 900}
FRAME_MS = 1000 / 60
# No others: to record all events of a browser takes a part of its time.
CATEGORIES = ["-*", "disabled-by-default-devtools.timeline.frame"]

BARE_S = 5
BARE = """<!doctype html>
<style>body { display: flex; } div { width: 25%; white-space: pre-wrap; }</style>
<div></div><div></div><div></div><div></div>
<script>
  const columns = [...document.querySelectorAll("div")];
  window.add = ([seconds, rate]) => new Promise((end) => {
    const frames = [], began = performance.now();
    let added = 0;
    const tick = (now) => {
      frames.push(now);
      const words = Math.max(0, Math.floor((now - began) / 1000 * rate) - added);
      for (const column of columns) column.append(" word".repeat(words));
      added += words;
      now - began < seconds * 1000 ? requestAnimationFrame(tick) : end(frames);
    };
    requestAnimationFrame(tick);
  });
</script>"""


async def measure(*, tokens: int, tokens_per_s: float, trace: Path | None) -> None:
    """Print the figures of one run, and keep Chromium's trace if a path is given."""
    async with local_server(Application()) as running, async_playwright() as started:
        generator = Replay(running.service, tokens=tokens)
        answering = create_app(replace(running.service, generator=generator))
        app = Paced(answering, streams=COLUMNS, events_per_s=tokens_per_s)
        browser = await started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = await browser.new_page(viewport=VIEWPORT)
        await page.set_content(BARE)
        await browser.start_tracing(page=page, categories=CATEGORIES)
        frames = await page.evaluate("add", [BARE_S, tokens_per_s])
        dropped = _dropped(await browser.stop_tracing())
        await page.close()
        rich.print(f"a bare page: {dropped} frames dropped in Chromium's trace; by its own clock:")
        rich.print(f"{len(frames)} frames, {_late(frames)} more were late")
        async with serve_http(app) as address:
            page = await browser.new_page(viewport=VIEWPORT)
            await page.goto(address)
            await browser.start_tracing(page=page, path=trace, categories=CATEGORIES)
            await _ask(page)
            dropped = _dropped(await browser.stop_tracing())
            await page.close()
            rich.print(f"the page: {dropped} frames dropped in Chromium's trace; by its own clock:")
            page = await browser.new_page(viewport=VIEWPORT)
            await page.add_init_script(WATCH)
            await page.goto(address)
            await _ask(page)
            report(await page.evaluate("watched"))
        await browser.close()


async def _ask(page: Page) -> None:
    """Ask under four settings, and wait for the answers."""
    for _ in range(COLUMNS - 2):
        await page.get_by_role("button", name="Compare with another").click()
    await page.get_by_role("button", name="Ask").click()
    for column in range(COLUMNS):
        await page.locator(f"[data-column='{column}'][data-state='done']").wait_for()


def report(watched: dict[str, list[Any]]) -> None:
    """Print medians and tails between the first and the last token."""
    came, drawn = watched["events"], [one for one in watched["drawn"] if one["added"]]
    first_ms, last_ms = drawn[0]["at"], drawn[-1]["at"]
    inside = [at for at in watched["frames"] if first_ms <= at <= last_ms]
    gaps = [later - sooner for sooner, later in pairwise(inside)]
    waits = [_wait(one, drawn) for one in came]
    tasks = watched["tasks"]
    seconds, tokens = (last_ms - first_ms) / 1000, sum(one["added"] for one in drawn)
    rich.print(
        f"{tokens} tokens in {seconds:.2f} s, {tokens / seconds:.0f} a second",
        f"first token drawn {first_ms - came[0]['at']:.1f} ms after its event",
        f"events drawn after {median(waits):.1f} ms, 95 % within {_tail(waits):.1f} ms",
        f"{len(gaps)} frames {median(gaps):.1f} ms apart, 95 % within {_tail(gaps):.1f} ms",
        f"{_late(inside)} more were late",
        f"{len(tasks)} tasks above 50 ms, the longest {max([0, *tasks]):.0f} ms",
        sep="\n",
    )


def _dropped(trace: bytes) -> int:
    """Return how many frames Chromium says to have dropped."""
    events: list[dict[str, Any]] = json.loads(trace)["traceEvents"]
    return sum(one["name"] == "DroppedFrame" for one in events)


def _wait(event: dict[str, Any], drawn: list[dict[str, Any]]) -> float:
    """Return the milliseconds until the next drawing."""
    return next((one["at"] - event["at"] for one in drawn if one["at"] >= event["at"]), 0.0)


def _late(frames: list[float]) -> int:
    """Return how many frames are missing."""
    gaps = [later - sooner for sooner, later in pairwise(frames)]
    return sum(round(gap / FRAME_MS) - 1 for gap in gaps if gap > 1.5 * FRAME_MS)


def _tail(values: list[float]) -> float:
    return quantiles(values, n=20)[-1]


if __name__ == "__main__":
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--tokens", type=int, default=1000, help="of each answer")
    options.add_argument("--rate", type=float, default=200, help="tokens a second of each answer")
    options.add_argument("--trace", type=Path, help="a file for Chromium's trace")
    chosen = options.parse_args()
    asyncio.run(measure(tokens=chosen.tokens, tokens_per_s=chosen.rate, trace=chosen.trace))
