"""The house rules that a linter does not know."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    path for path in (ROOT / "deployments" / "cascade").rglob("*.py") if "v1" not in path.parts
)
IDS = [str(path.relative_to(ROOT / "deployments")) for path in SOURCES]
OLD_NAMES = re.compile(
    "Absent|Account|Answer|Automatic|Bench|Bounded|Call|ChatShape|Drafting|Emission|Entry|"
    "Evidence|Experience|Extent|Family|Gates|Grant|GrpcDoor|Hard|Head|Hedged|Hurried|Job|"
    "Judged|Judging|Kind|Late|Law|Ledger|Length|Lesson|Line|Link|Making|Needs|Offer|"
    "Outcome|Outline|Outlook|Passage|Patience|Peer|Peers|Piece|Place|Policy|Predicted|"
    "Question|Ready|Regimes|Rim|Room|Row|Sampling|Scribe|Seat|SequenceStore|Service|Shape|"
    "Silent|Sink|Slice|Soft|Solo|Stack|Standing|Task|Tier|Tree|Trust|ballast|bring|"
    "catch_up|convict|fetch|greet|hear|heed|holdings|invert|is_fresh|keeps_unasked|lay_out|"
    "look|note|part|races|refuted|reserved|ripe|seat_of|shuns|spread|take_over|told|turn"
)
"""Names of 0.1 for which the field has other words."""

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
def test_no_class_or_function_has_a_name_of_old(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            assert not OLD_NAMES.fullmatch(node.name.lstrip("_")), node.name


def test_no_imports_form_a_circle() -> None:
    """Not even those for types: two modules that need each other are one, or need a third."""
    graph = grimp.build_graph("cascade")
    for importer in graph.modules:
        for imported in graph.find_modules_directly_imported_by(importer):
            chain = graph.find_shortest_chain(imported, importer)
            assert chain is None, " -> ".join((importer, *chain))


@pytest.mark.parametrize("path", SOURCES, ids=IDS)
def test_pickle_is_never_read(path: Path) -> None:
    """Weights are safetensors; no bytes from outside become code."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        assert not {"pickle", "cloudpickle", "marshal", "shelve"} & set(names)
