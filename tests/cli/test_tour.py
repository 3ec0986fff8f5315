"""`cascade tour` over the shipped pair."""

from __future__ import annotations

import asyncio
import re

from tests.support.http_server import serve_http
from typer.testing import CliRunner

from cascade.api.http import create_app
from cascade.cli import app
from cascade.local import local_server
from cascade.settings import Application


async def test_the_tour_tells_the_story_with_real_answers() -> None:
    async with (
        local_server(Application()) as running,
        serve_http(create_app(running.service)) as url,
    ):
        command = ["tour", "--url", url]
        result = await asyncio.to_thread(
            CliRunner().invoke, app, command, env={"COLUMNS": "200", "NO_COLOR": "1"}
        )
    assert result.exit_code == 0, result.output
    answers = re.findall(r"^   (\w+) .*Aldrin", result.stdout, re.MULTILINE)
    assert answers == ["Buzz", "Edwin", "Edwin", "Buzz"]
    assert re.search(r"of the first 5 drafted words 0 stay", result.stdout)
    deferred, speculative, cascade = map(int, re.findall(r"(\d+) times", result.stdout))
    assert deferred > speculative > cascade > 0


def test_without_a_server_the_tour_says_how_to_start_one() -> None:
    result = CliRunner().invoke(app, ["tour", "--url", "http://127.0.0.1:1"])
    assert result.exit_code == 3
    assert "serve run cluster/local.yaml" in result.output
