"""The documentation names files, functions, settings and metrics that exist, and links lead on."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter

from cascade.api.schema import Options
from cascade.observability.metric_specs import ENGINE, ROUTER
from cascade.settings import Application
from cascade.types import Statistics

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "deployments" / "cascade"
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", ".github/CONTRIBUTING.md")),
    *(ROOT / name for name in ("cluster/README.md", "protos/README.md")),
    *sorted((ROOT / "docs").glob("*.md")),
]
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text()
REFERENCE = (ROOT / "docs" / "reference.md").read_text()
QUOTED = sorted(set(re.findall(r"`([^`\n]+)`", ARCHITECTURE)))
FILES = [text for text in QUOTED if re.fullmatch(r"[\w./]+(\.\w+|/)", text) and " " not in text]
PATHS = [text for text in FILES if "/" in text or text.endswith(".py")]
NAMES = [text for text in QUOTED if re.fullmatch(r"[a-z_]+(\.\w+)+", text) and text not in PATHS]
KEYS = set(re.findall(r"`([^`\n]+)`", REFERENCE))


@pytest.mark.parametrize("path", PATHS)
def test_a_path_in_the_architecture_page_exists(path: str) -> None:
    assert (PACKAGE / path).exists() or (ROOT / path).exists()


@pytest.mark.parametrize("name", NAMES)
def test_a_name_in_the_architecture_page_exists(name: str) -> None:
    """It is a module, class, function or field of the package, or a key of the settings."""
    first, *rest = name.split(".")
    if not ((PACKAGE / first).exists() or (PACKAGE / f"{first}.py").exists()):
        assert first == "usage", "no package of ours"
        return
    assert is_defined(name) or rest[-1] in settings_keys()


def is_defined(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        module = PACKAGE.joinpath(*parts[:end]).with_suffix(".py")
        if module.is_file():
            return is_in(ast.parse(module.read_text()), parts[end:])
    return False


def is_in(tree: ast.AST, names: list[str]) -> bool:
    """Return whether a class or module defines the first name, which defines the next."""
    if not names:
        return True
    body: list[ast.stmt] = getattr(tree, "body", [])
    for node in body:
        match node:
            case ast.ClassDef(name=name) | ast.FunctionDef(name=name):
                found = name
            case ast.AsyncFunctionDef(name=name) | ast.AnnAssign(target=ast.Name(id=name)):
                found = name
            case ast.Assign(targets=[ast.Name(id=name)]):
                found = name
            case _:
                continue
        if found == names[0]:
            return is_in(node, names[1:])
    return False


@cache
def settings_keys() -> frozenset[str]:
    """Return the keys that a YAML may have; those of rules are described as parameters."""
    schema: dict[str, Any] = TypeAdapter(Application).json_schema()
    branches = [schema, *schema["$defs"].values()]
    return frozenset(
        key
        for branch in branches
        for key in branch.get("properties", {})
        if "kind" not in branch["properties"]
    )


def test_the_architecture_page_has_a_line_for_every_package() -> None:
    parts = {f"{path.name}/" if path.is_dir() else path.name for path in PACKAGE.iterdir()}
    assert parts - {"__init__.py", "__pycache__/", "py.typed"} <= set(PATHS)


def test_the_life_of_a_token_fits_on_one_page() -> None:
    section = ARCHITECTURE.split("## The files that a token passes")[1].split("\n## ")[0]
    assert 10 < len(re.findall(r"^\| `", section, re.MULTILINE)) <= 30
    assert len(ARCHITECTURE.splitlines()) < 200


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        name, _, anchor = target.partition("#")
        linked = (page.parent / name).resolve() if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), re.MULTILINE)
            assert anchor in {slug(heading) for heading in headings}, target


def slug(heading: str) -> str:
    """Return the anchor that GitHub gives a heading."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


def test_the_reference_describes_every_setting_field_and_metric() -> None:
    described = KEYS | {key.rpartition(".")[2] for key in KEYS}
    wanted = settings_keys() | set(Options.model_fields)
    wanted |= set(Statistics.__dataclass_fields__) | {metric.name for metric in (*ROUTER, *ENGINE)}
    assert wanted <= described, wanted - described
