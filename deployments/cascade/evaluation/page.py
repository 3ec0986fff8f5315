"""The page that every measurement is told on: a sentence, the curve, tables, provenance."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2

from cascade.evaluation.scoring import import_extra

if TYPE_CHECKING:
    from collections.abc import Mapping

_NUMBER = re.compile(r"[+-]?\d[^A-Za-df-z]*( to .*| of .*)?|-|")
"""What a column of numbers holds: `0.3`, `87.1 [80.0, 93.1]`, `1.20 (1.10 to 1.31)`, `1 of 4`."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text under headings."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    marked: frozenset[str] = frozenset()  # first cells of the rows to mark

    @cached_property
    def is_numeric(self) -> tuple[bool, ...]:
        """Whether each column holds numbers, which are aligned to the right."""
        columns = zip(*self.rows, strict=True) if self.rows else ((),) * len(self.headings)
        return tuple(
            any(column) and all(_NUMBER.fullmatch(cell) for cell in column) for column in columns
        )

    def markdown(self) -> str:
        """Return the table as Markdown."""
        rule = tuple("---:" if numeric else "---" for numeric in self.is_numeric)
        lines = (self.headings, rule, *self.rows)
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join(part for part in (f"## {self.title}", self.note, table) if part)


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A picture, and what it shows."""

    title: str
    svg: bytes

    @property
    def base64(self) -> str:
        """Return the picture for a `data:` address."""
        return base64.b64encode(self.svg).decode()


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a measurement says: in one sentence, with its numbers, and what makes it unsure."""

    headline: str
    detail: str = ""
    warning: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, (self.headline, self.detail, self.warning)))


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page; figures come before tables."""

    title: str
    text: str = ""
    code: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Page:
    """A whole page, which needs nothing from elsewhere."""

    title: str
    findings: tuple[Finding, ...]
    sections: tuple[Section, ...]
    provenance: Table

    def html(self) -> str:
        """Return the page."""
        source = files("cascade.evaluation").joinpath("page.html").read_text(encoding="utf-8")
        environment = jinja2.Environment(
            autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
        )
        return environment.from_string(source).render(page=self)


def draw(title: str, figure: Any) -> Figure:
    """Return a figure of matplotlib's for a page."""
    written = io.BytesIO()
    with import_extra("matplotlib").rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(written, format="svg", metadata={"Date": None})
    return Figure(title=title, svg=written.getvalue())


def provenance_table(about: Mapping[str, Any]) -> Table:
    """Return where and how something was measured, a row for each value that is not empty.

    Args:
        about: Values by name, nested ones by the path of their names.
    """
    return Table(
        title="How and where this was measured",
        headings=("what", "value"),
        rows=tuple(flattened(about).items()),
    )


def flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as text by the path of their names, without those that are empty.

    Args:
        values: By name.
        prefix: Of the path.
    """
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            found |= flattened(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            found[name] = ", ".join(map(str, value))
        else:
            found[name] = f"{value:.3g}" if isinstance(value, float) else str(value)
    return {name: text for name, text in found.items() if text}
