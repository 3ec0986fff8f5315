"""How much the page does for each event and each frame, counted rather than timed."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tests.browser.replay import Paced, Replay
from tests.browser.test_playground import ask, done
from tests.support.http_server import serve_http

from cascade.api.http import create_app

if TYPE_CHECKING:
    from starlette.types import ASGIApp
    from tests.browser.test_playground import Opened

    from cascade.api.context import ServingContext

pytestmark = [pytest.mark.browser, pytest.mark.timeout(300)]

WATCH = Path(__file__).with_name("watch.js").read_text()
TOKENS, COLUMNS = 400, 4


# Where each token's lines begin and end, in the blocks of the page or in one run of text.
PLACES = """({ together }) => {
  const shown = document.querySelector(".answer");
  const answer = together ? shown.cloneNode(true) : shown;
  const tokens = [...answer.querySelectorAll(".token")];
  if (together) {
    answer.firstElementChild.append(...tokens);
    shown.after(answer);
  }
  const { left, top } = answer.getBoundingClientRect();
  const place = (one) => [one.left - left, one.top - top, one.right - left].map(Math.round);
  return tokens.map((token) => [...token.getClientRects()].filter((one) => one.width).map(place));
}"""
COPIED = """() => {
  const answer = document.querySelector(".answer");
  getSelection().selectAllChildren(answer);
  const asked = { clipboardData: new DataTransfer(), bubbles: true, cancelable: true };
  const event = new ClipboardEvent("copy", asked);
  answer.dispatchEvent(event);
  return event.clipboardData.getData("text/plain");
}"""


@pytest.mark.parametrize("width", [1440, 390])
async def test_blocks_change_neither_lines_nor_what_is_copied(
    opened: Opened, service: ServingContext, width: int
) -> None:
    app = create_app(replace(service, generator=Replay(service, tokens=TOKENS)))
    async with serve_http(app) as address, opened(address, width=width) as page:
        await ask(page)
        await done(page, 0)
        assert await page.locator(".answer").first.locator("> div").count() > 4
        assert await page.evaluate(COPIED) == await page.locator(".answer").first.text_content()
        await page.set_viewport_size({"width": width - 40, "height": 900})
        await page.evaluate("new Promise((next) => requestAnimationFrame(() => setTimeout(next)))")
        in_blocks = await page.evaluate(PLACES, {"together": False})
        assert in_blocks == await page.evaluate(PLACES, {"together": True})


@pytest.fixture(params=[None, 60], ids=["at once", "60 events a second"])
async def watched(
    opened: Opened, service: ServingContext, request: pytest.FixtureRequest
) -> dict[str, list[Any]]:
    """What happened in the page while four answers came; paced, the first event is a role alone."""
    app: ASGIApp = create_app(replace(service, generator=Replay(service, tokens=TOKENS)))
    if request.param:
        app = Paced(app, streams=COLUMNS, events_per_s=request.param)
    async with serve_http(app) as address, opened(address, script=WATCH) as page:
        for _ in range(COLUMNS - 2):
            await page.get_by_role("button", name="Compare with another").click()
        await page.evaluate("watched.drawn.length = 0")
        await ask(page)
        await done(page, *range(COLUMNS))
        assert await page.locator(".answer .token").count() == COLUMNS * TOKENS
        found: dict[str, list[Any]] = await page.evaluate("watched")
        return found


async def test_the_page_draws_once_a_frame_and_each_token_once(
    watched: dict[str, list[Any]],
) -> None:
    """The work for a token does not grow with the text before it."""
    drawn = [one for one in watched["drawn"] if one["added"]]
    assert sum(one["added"] for one in drawn) == COLUMNS * TOKENS
    assert max(Counter(one["frame"] for one in drawn).values()) == 1
    assert sum(one["touched"] for one in drawn) == 0  # no token is changed once it is there
    beside = [one["changes"] - one["added"] for one in drawn[1:]]  # counters, for each column
    assert max(beside) <= 12 * COLUMNS


async def test_a_token_is_drawn_in_the_first_frame_after_its_event_or_after_a_rest(
    watched: dict[str, list[Any]],
) -> None:
    """What has come before a drawing is in it; the first token of all waits for no rest."""
    came, shown = Counter[int](), Counter[int]()
    for one in watched["events"]:
        came[one["frame"]] += one["tokens"]
    for one in watched["drawn"]:
        if one["added"]:
            shown[one["frame"]] += one["added"]
    assert min(shown) == min(came) + 1
    behind = 0
    for frame in range(max(shown) + 1):
        if shown[frame]:
            behind -= shown[frame]  # of what had come before this frame
            assert behind == 0
        behind += came[frame]
    assert behind == 0
