"""The documentation is also a site: every link leads on, and nothing comes from a network."""

from __future__ import annotations

import json
import logging
import re
import warnings
from html import unescape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from pydantic import TypeAdapter

from cascade.api.http import create_app
from cascade.settings import Application

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "docs" / "mkdocs.yml"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build as `poe docs` does; a dead link, or a page that the navigation lacks, is an error."""
    out = tmp_path_factory.mktemp("site")
    said: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("mkdocs").addHandler(handler)
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        warnings.simplefilter("ignore")  # those of its libraries
        from mkdocs.commands.build import build  # noqa: PLC0415 - after the variable
        from mkdocs.config import load_config  # noqa: PLC0415 - as above

        config = load_config(str(CONFIG), site_dir=str(out), strict=False)
        config.plugins.on_startup(command="build", dirty=False)
        build(config)
    logging.getLogger("mkdocs").removeHandler(handler)
    assert said == []
    return out


def pages(site: Path) -> list[Path]:
    return [path for path in site.rglob("*.html") if "swagger" not in path.name]


def test_every_page_is_built(site: Path) -> None:
    for page in (ROOT / "docs").glob("*.md"):
        assert (site / "docs" / page.stem / "index.html").exists(), page
    assert "<title>Speculative Cascades" in (site / "index.html").read_text()
    assert "87.1" in (site / "docs" / "quality" / "index.html").read_text()


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        tags = re.findall(r"<(?:link|script|img|iframe|source)\b[^>]*>", path.read_text())
        away = [tag for tag in tags if re.search(r"(src|href)=[\"']?(https?:)?//", tag)]
        assert away == [], path
    for path in site.rglob("*.css"):
        assert not re.search(r"(@import|url\()\W*https?:", path.read_text()), path


def test_tables_and_lists_are_rendered_as_such(site: Path) -> None:
    """What GitHub takes for a list or a table is one on the site too."""
    for path in pages(site):
        text = re.sub(r"<(pre|code)\b.*?</\1>", "", path.read_text(), flags=re.DOTALL)
        assert not re.search(r"\| ?-{3}|<p>[-*] |^[-*] \w|```", text, re.MULTILINE), path


def test_every_setting_stands_on_the_site_with_its_type_and_its_words(site: Path) -> None:
    page = unescape((site / "docs" / "settings" / "index.html").read_text())
    rows = [
        re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)
        for row in re.findall(r"<tr>\s*<td.*?</tr>", page, re.DOTALL)
    ]
    described = {
        key: (kind, meaning)
        for cell, kind, _, meaning in rows
        for key in re.findall(r"<code>([\w.]+)</code>", cell)
    }
    for key in leaves(TypeAdapter(Application).dump_python(Application(), mode="json"), ""):
        near = (f"{one}." for one in described)
        assert any(f"{key}.".startswith(one) or one.startswith(f"{key}.") for one in near), key
    assert {"expert.scaling.backlog", "tls.ca", "cors.max_age"} <= set(described)
    assert [key for key, cells in described.items() if not all(cells)] == []


def leaves(value: Any, path: str) -> Iterator[str]:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from leaves(inner, f"{path}.{name}".lstrip("."))
    else:
        yield path


def test_the_routes_of_the_site_are_those_of_the_server(site: Path) -> None:
    assert json.loads((site / "openapi.json").read_text()) == create_app().openapi()
    page = (site / "http-api" / "index.html").read_text()
    frame = re.search(r'<iframe[^>]* src="([^"]+)"', page)
    assert frame is not None
    viewer = (site / "http-api" / frame[1]).resolve().read_text()
    assert "openapi.json" in viewer
    for asset in re.findall(r'(?:src|href)="([^"]+\.(?:js|css))"', viewer):
        assert (site / "http-api" / asset).resolve().exists()


def test_poe_docs_is_strict() -> None:
    text = re.sub(r"!!python\S*", "", CONFIG.read_text())
    assert yaml.safe_load(text)["strict"] is True
