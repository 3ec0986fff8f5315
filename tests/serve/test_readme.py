"""What the READMEs and the pages of docs/ show works as it stands, but for the ports."""

from __future__ import annotations

import re
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.serve.conftest import ROOT

if TYPE_CHECKING:
    from tests.serve.conftest import Server

TEXT = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "protos" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PYTHON = {
    f"{page.relative_to(ROOT)} {number}": code
    for page in PAGES
    if page.name != "clients.md"  # tests/integration/test_clients.py runs those
    for number, code in enumerate(re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL))
}
CURL = re.findall(r"```console\n(curl .*?)```", TEXT, re.DOTALL)


def here(text: str, server: Server) -> str:
    return text.replace("http://127.0.0.1:8000", server.http).replace("127.0.0.1:9000", server.grpc)


@pytest.mark.parametrize("code", PYTHON.values(), ids=PYTHON)
def test_a_python_example_prints_an_answer(server: Server, code: str) -> None:
    run = subprocess.run(  # noqa: S603 - the page's own words
        [sys.executable, "-c", here(code, server)],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert run.returncode == 0, run.stderr
    assert len(run.stdout.strip()) > 3


@pytest.mark.parametrize("line", CURL)
def test_a_curl_example_prints_an_answer(server: Server, line: str) -> None:
    run = subprocess.run(  # noqa: S602 - the README's own words
        here(line, server), shell=True, capture_output=True, text=True, check=False, timeout=60
    )
    assert '"trace":[{' in run.stdout.replace(" ", "")


def test_the_readme_stays_short() -> None:
    assert len(TEXT.splitlines()) < 120
