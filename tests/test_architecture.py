"""The house rules that a linter does not know."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for path in (ROOT / "deployments" / "cascade").rglob("*.py") if "v1" not in path.parts
)
IDS = [str(path.relative_to(ROOT / "deployments")) for path in SOURCES]
TOP = {
    "pyproject.toml",
    "deployments",
    "protos",
    "cluster",
    "tests",
    "README.md",
    "LICENSE",
    "CHANGELOG.md",
}


def test_the_top_level_is_what_was_agreed() -> None:
    seen = {path.name for path in ROOT.iterdir() if not path.name.startswith(".")}
    assert seen >= TOP
    assert seen <= TOP | {"docs", "dist", "build"}


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_pickle_is_never_read(path: Path) -> None:
    """Weights are safetensors; no bytes from outside become code."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {"pickle", "cloudpickle", "marshal", "shelve"} & set(names)
