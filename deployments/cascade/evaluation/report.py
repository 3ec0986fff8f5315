"""An evaluation for readers: figures, findings in words, Markdown tables and one HTML page."""

from __future__ import annotations

import base64
import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from typing import TYPE_CHECKING, Any

import jinja2

from cascade.evaluation import compare
from cascade.evaluation.compare import FROM_LOSSLESS
from cascade.evaluation.grid import (
    BASELINES,
    CURVES,
    DRAFTER,
    EXPERT,
    LOSSLESS,
    LOSSY,
    LOSSY_SOLVED,
    SEQUENCE_CASCADE,
    TOKEN_CASCADE,
)
from cascade.evaluation.results import ALL
from cascade.evaluation.scoring import extra
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cascade.evaluation.results import Cell, Draws, Figure, Results

_AXES = {
    "rejection_rate": "rejection rate",
    "latency": "modelled latency, relative to the expert alone",
}

_MARKERS = {DRAFTER: "v", EXPERT: "*", LOSSLESS: "D"}

_DASHED = (TOKEN_CASCADE, SEQUENCE_CASCADE, "lossy", "lossy_solved")

_PANELS_WIDE = 3

_DOTS_PER_INCH = 110


def draw(results: Results, folder: Path) -> list[Path]:
    """Write a figure for each axis, temperature and draft length; return the files.

    Raises:
        InvalidMeasurement: matplotlib is not installed.
    """
    extra("matplotlib")
    return [
        _figure(results, folder, axis=axis, temperature=temperature, length=length)
        for axis in _AXES
        for temperature in results.temperatures
        for length in results.lengths
    ]


def _figure(
    results: Results,
    folder: Path,
    *,
    axis: str,
    temperature: float,
    length: int,
) -> Path:
    groups = [group for group in results.groups if group != ALL]
    cells = results.select(temperature=temperature, draft_tokens=length)
    wide = min(len(groups), _PANELS_WIDE)
    high = -(-len(groups) // wide)
    sheet = extra("matplotlib.figure").Figure(
        figsize=(4.6 * wide + 1.6, 3.6 * high + 0.6), layout="constrained"
    )
    panels = list(sheet.subplots(high, wide, squeeze=False).flat)
    for panel in panels:
        panel.set_visible(False)
    for panel, group in zip(panels, groups, strict=False):
        panel.set_visible(True)
        _panel(panel, results.draws[group], cells, axis=axis)
        panel.set_title(group, fontsize=10)
    handles, labels = panels[0].get_legend_handles_labels()
    sheet.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
    sheet.supxlabel(_AXES[axis], fontsize=10)
    sheet.supylabel("quality, points", fontsize=10)
    sheet.suptitle(f"temperature {temperature:g}, {length} drafted tokens a block", fontsize=11)
    path = folder / f"quality-{axis.split('_', maxsplit=1)[0]}-t{temperature:g}-d{length}.png"
    sheet.savefig(path, dpi=_DOTS_PER_INCH)
    return path


def _panel(panel: Any, draws: Draws, cells: list[Cell], *, axis: str) -> None:
    """Draw the curves of one family, then the baselines as points over them."""
    lossless = [cell for cell in cells if cell.setting.curve == LOSSLESS]
    present = {cell.setting.curve for cell in cells}
    for number, curve in enumerate(curve for curve in CURVES if curve in present):
        members = [cell for cell in cells if cell.setting.curve == curve]
        ends = lossless if curve in FROM_LOSSLESS else []
        _curve(panel, draws, [*ends, *members], axis=axis, curve=curve, colour=number)
    for cell in cells:
        if cell.setting.curve in BASELINES:
            _point(panel, draws, cell, axis=axis)
    if axis == "rejection_rate":
        _fit(panel, draws, cells)
    panel.grid(visible=True, alpha=0.25)
    panel.tick_params(labelsize=8)


def _curve(  # noqa: PLR0913 - what to draw, of what
    panel: Any, draws: Draws, cells: list[Cell], *, axis: str, curve: str, colour: int
) -> None:
    points = sorted(
        ((draws.figure(cell, axis), draws.figure(cell, "quality")) for cell in cells),
        key=lambda point: point[0].value,
    )
    xs, ys = ([point[side] for point in points] for side in (0, 1))
    _, _, bars = panel.errorbar(
        [x.value for x in xs],
        [y.value for y in ys],
        xerr=_arms(xs),
        yerr=_arms(ys),
        label=curve,
        color=f"C{colour % 10}",
        linestyle="--" if curve in _DASHED else "-",
        marker="o",
        markersize=3,
        linewidth=1.2,
        elinewidth=0.6,
    )
    for bar in bars:
        bar.set_alpha(0.25)


def _arms(figures: list[Any]) -> list[list[float]]:
    """Return how far the intervals reach below and above; a bar has no negative arm."""
    below = [max(0.0, one.value - one.low) for one in figures]
    return [below, [max(0.0, one.high - one.value) for one in figures]]


def _point(panel: Any, draws: Draws, cell: Cell, *, axis: str) -> None:
    """Draw a baseline. The expert rejects by convention all: its quality is a line instead."""
    x, y = draws.figure(cell, axis), draws.figure(cell, "quality")
    curve = cell.setting.curve
    if curve == EXPERT and axis == "rejection_rate":
        panel.axhline(y.value, color="black", linestyle=":", linewidth=1, label=curve)
        panel.axhspan(y.low, y.high, color="black", alpha=0.05, linewidth=0)
        return
    panel.errorbar(
        [x.value], [y.value], yerr=_arms([y]), label=curve, color="black",
        marker=_MARKERS[curve], markersize=7, linestyle="none", elinewidth=0.5, zorder=5,
    )  # fmt: skip


def _fit(panel: Any, draws: Draws, cells: list[Cell]) -> None:
    """Leave out, at the right, what the modes without blocks reject beyond all others."""
    rates = [
        draws.figure(cell, "rejection_rate").high
        for cell in cells
        if cell.setting.mode in (Mode.CASCADE, Mode.SPECULATIVE)
    ]
    panel.set_xlim(-0.01, max(0.05, 1.15 * max(rates)))


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
    source = files("cascade.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    page = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined).from_string(source)
    images = {path.stem: base64.b64encode(path.read_bytes()).decode() for path in plots}
    return page.render(about=results.about, findings=findings, settings=settings, images=images)
