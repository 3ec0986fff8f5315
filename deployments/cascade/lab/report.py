"""An evaluation for readers: figures, findings in words, Markdown tables and one HTML page."""

from __future__ import annotations

import base64
import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2

from cascade.lab import compare
from cascade.lab.grid import LOSSY, LOSSY_SOLVED
from cascade.lab.results import ALL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cascade.lab.results import Cell, Figure, Results

METRICS = (
    "quality", "rejection_rate", "deferral_rate", "tokens_per_expert_pass", "latency",
    "expert_passes", "drafter_passes", "tokens", "bytes", "wall_s",
)  # fmt: skip
HEADINGS = {
    "quality": "quality",
    "rejection_rate": "rejected",
    "deferral_rate": "deferred",
    "tokens_per_expert_pass": "tokens / expert pass",
    "latency": "latency, modelled",
    "expert_passes": "expert passes",
    "drafter_passes": "drafter passes",
    "tokens": "tokens",
    "bytes": "bytes",
    "wall_s": "s under load",
}
_BRIEF = (
    "quality",
    "rejection_rate",
    "deferral_rate",
    "tokens_per_expert_pass",
    "latency",
    "bytes",
)
_BETTER_SHOWN = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """Rows of text under headings."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.headings, tuple("---" for _ in self.headings), *self.rows]
        table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        return "\n\n".join(part for part in (f"## {self.title}", self.note, table) if part)


def figures(results: Results) -> list[dict[str, Any]]:
    """Return every metric of every setting in every group, with its interval, as JSON values."""
    found: list[dict[str, Any]] = []
    for group in results.groups:
        draws = results.draws[group]
        for cell in results.cells:
            told = {name: _json(draws.figure(cell, name)) for name in _metrics(cell)}
            bleu = {"corpus_bleu": cell.corpus_bleu[group]} if group in cell.corpus_bleu else {}
            found.append({"setting": cell.setting.key, "group": group, **told, **bleu})
    return found


def _metrics(cell: Cell) -> tuple[str, ...]:
    return (*METRICS, "bleu") if "bleu" in cell.columns else METRICS


def _json(figure: Figure) -> dict[str, float | None]:
    return {
        name: round(value, 6) if math.isfinite(value) else None
        for name, value in asdict(figure).items()
    }


def settings_table(
    results: Results, group: str, *, temperature: float, brief: bool = False
) -> Table:
    """Return what every setting at a temperature scored and cost in a group."""
    metrics = _BRIEF if brief else METRICS
    draws = results.draws[group]
    cells = [cell for cell in results.cells if cell.setting.temperature == temperature]
    several = len(results.lengths) > 1
    bleu = any(group in cell.corpus_bleu for cell in cells)
    headings = ["setting", *(["draft"] if several else []), *(HEADINGS[m] for m in metrics)]
    rows: list[tuple[str, ...]] = []
    for cell in cells:
        length = [str(cell.setting.draft_tokens or "")] if several else []
        row = [cell.setting.name, *length, *(_said(draws.figure(cell, m), m) for m in metrics)]
        rows.append(tuple([*row, f"{cell.corpus_bleu[group]:.1f}"] if bleu else row))
    return Table(
        title=f"{group}, temperature {temperature:g}",
        headings=tuple([*headings, "BLEU"] if bleu else headings),
        rows=tuple(rows),
    )


def _said(figure: Figure, metric: str) -> str:
    if not math.isfinite(figure.value):
        return ""
    digits = {"quality": 1, "rejection_rate": 3, "deferral_rate": 3, "wall_s": 2, "latency": 2,
              "bytes": 0}.get(metric, 2)  # fmt: skip
    value = f"{figure.value:.{digits}f}"
    if metric not in ("quality", "rejection_rate", "latency"):
        return value
    return f"{value} [{figure.low:.{digits}f}, {figure.high:.{digits}f}]"


def finding_tables(results: Results) -> list[Table]:
    """Return the tables that answer the questions of `compare`."""
    tables: list[Table] = []
    for temperature in results.temperatures:
        for length in results.lengths:
            views = [
                compare.View(
                    results=results, group=group, temperature=temperature, draft_tokens=length
                )
                for group in results.groups
            ]
            tables += [
                _matched_table(views, strict=False),
                _matched_table(views, strict=True),
                _paying_table(views),
                *(_equal_table(views, lossy) for lossy in (LOSSY, LOSSY_SOLVED)),
                _better_table(views),
            ]
    return [table for table in tables if table.rows]


def _titled(what: str, views: Sequence[compare.View]) -> str:
    temperature, length = views[0].temperature, views[0].draft_tokens
    return f"{what}: temperature {temperature:g}, {length} drafted tokens a block"


def _groups(views: Sequence[compare.View]) -> list[str]:
    return [view.group for view in views]


def _matched_table(views: Sequence[compare.View], *, strict: bool) -> Table:
    found = [compare.matched(view, strict=strict) for view in views]
    families = [one for one in found if one.group != ALL or len(found) == 1]
    paying = sum(one.pays for one in families)
    kept = (
        f"it is measured at most {compare.POINT:g} point below"
        if strict
        else "the 95 % interval of the paired difference reaches zero"
    )
    near = "within a point of" if strict else "at"
    return Table(
        title=_titled(f"Fewest rejections {near} the expert's quality", views),
        note=(
            f"At most {compare.FEWER:g} of the rejections of lossless speculation on {paying} of"
            f" {len(families)} families. A setting keeps the expert's quality if {kept}."
            " The last two columns are what a setting chosen on one half of the items shows on the"
            " other."
        ),
        headings=("family", "setting", "quality less the expert's", "rejected", "lossless rejects",
                  "share", "share, other half", "difference, other half"),
        rows=tuple(_matched_row(one) for one in found),
    )  # fmt: skip


def _matched_row(one: compare.Matched) -> tuple[str, ...]:
    if one.cell is None:
        return (one.group, "none", "", "", f"{one.lossless_rate.value:.3f}", "", "", "")
    halves = one.halves or (math.nan, math.nan)
    return (
        one.group,
        one.cell.setting.name,
        _points(one.difference),
        f"{one.rejection_rate.value:.3f}",
        f"{one.lossless_rate.value:.3f}",
        f"{one.ratio.value:.2f} [{one.ratio.low:.2f}, {one.ratio.high:.2f}]",
        "" if math.isnan(halves[0]) else f"{halves[0]:.2f}",
        "" if math.isnan(halves[1]) else f"{halves[1]:+.1f}",
    )


def _points(figure: Figure) -> str:
    return f"{figure.value:+.1f} [{figure.low:+.1f}, {figure.high:+.1f}]"


def _paying_table(views: Sequence[compare.View]) -> Table:
    """Return the same share rule by rule: where it is 1 or nothing, the rule does not pay."""
    rows: list[tuple[str, ...]] = []
    for rule in compare.rules(views[0].results):
        found = [compare.matched(view, curve=rule) for view in views]
        rows.append(
            (rule, *("-" if one.cell is None else f"{one.ratio.value:.2f}" for one in found))
        )
    return Table(
        title=_titled("Share of lossless rejections at the expert's quality", views),
        note="From 1 on, and where there is none, the rule does not pay.",
        headings=("rule", *_groups(views)),
        rows=tuple(rows),
    )


def _equal_table(views: Sequence[compare.View], lossy: str) -> Table:
    found = {
        rule: [compare.equal(view, curve=rule, lossy=lossy) for view in views]
        for rule in compare.rules(views[0].results)
    }
    best: dict[str, float] = {}
    for one in (one for row in found.values() for one in row if one and one.group != ALL):
        best[one.group] = max(best.get(one.group, -math.inf), one.difference.value)
    holding = sum(value >= 0 for value in best.values())
    return Table(
        title=_titled(f"Quality less {lossy}'s at equal rejections", views),
        note=(
            f"The best rule scores no lower than {lossy} on {holding} of {len(best)} families:"
            " points, averaged over the rejection rates that both curves reach."
        ),
        headings=("rule", *_groups(views)),
        rows=tuple(
            (rule, *("" if one is None else _points(one.difference) for one in row))
            for rule, row in found.items()
            if any(row)
        ),
    )


def _better_table(views: Sequence[compare.View]) -> Table:
    found = [one for view in views for one in compare.better(view)[:_BETTER_SHOWN]]
    return Table(
        title=_titled("Above the expert itself", views),
        note=(
            f"Settings whose 95 % interval is clear of zero, at most {_BETTER_SHOWN} a family; of"
            f" {len(views[0].cascades())} settings one in forty would be without any effect."
        ),
        headings=("family", "setting", "quality less the expert's", "rejected"),
        rows=tuple(
            (one.group, one.cell.setting.name, _points(one.difference),
             f"{one.rejection_rate.value:.3f}")
            for one in found
        ),
    )  # fmt: skip


def write(results: Results, folder: Path, *, plots: Sequence[Path]) -> list[Path]:
    """Write `tables.md` and `report.html`; return both."""
    findings = finding_tables(results)
    settings = [
        settings_table(results, group, temperature=temperature)
        for group in results.groups
        for temperature in results.temperatures
    ]
    tables, page = folder / "tables.md", folder / "report.html"
    markdown = "\n\n".join(table.markdown() for table in (*findings, *settings))
    tables.write_text(markdown + "\n", encoding="utf-8")
    page.write_text(_html(results, findings, settings, plots), encoding="utf-8")
    return [tables, page]


def _html(
    results: Results, findings: Sequence[Table], settings: Sequence[Table], plots: Sequence[Path]
) -> str:
    source = files("cascade.lab").joinpath("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in plots}
    return page.render(about=results.about, findings=findings, settings=settings, images=images)
