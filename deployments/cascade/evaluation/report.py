"""Plots, Markdown tables and one HTML page of an evaluation's results."""

from __future__ import annotations

import base64
import math
from dataclasses import asdict, dataclass
from importlib.resources import files
from itertools import product
from typing import TYPE_CHECKING, Any

import jinja2

from cascade.evaluation import compare
from cascade.evaluation.compare import FROM_LOSSLESS, MARGIN, View
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
from cascade.evaluation.records import OPTIONAL
from cascade.evaluation.results import ALL
from cascade.evaluation.scoring import import_extra
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from cascade.evaluation.results import Cell, Estimate, GroupMetrics, Results

_AXES = {
    "rejection_rate": "rejection rate",
    "latency": "modelled latency, relative to the expert alone",
}

_MARKERS = {DRAFTER: "v", EXPERT: "*", LOSSLESS: "D"}

_DASHED = (TOKEN_CASCADE, SEQUENCE_CASCADE, LOSSY, LOSSY_SOLVED)

_MAX_COLUMNS = 3

_DOTS_PER_INCH = 110


def plot(results: Results, folder: Path) -> list[Path]:
    """Write a plot for each axis, temperature and draft length; return the files.

    Raises:
        InvalidMeasurement: matplotlib is not installed.
    """
    figures = import_extra("matplotlib.figure")
    groups = [group for group in results.groups if group != ALL]
    columns = min(len(groups), _MAX_COLUMNS)
    rows = math.ceil(len(groups) / columns)
    paths: list[Path] = []
    for axis, temperature, length in product(_AXES, results.temperatures, results.lengths):
        cells = results.select(temperature=temperature, draft_tokens=length)
        figure = figures.Figure(
            figsize=(4.6 * columns + 1.6, 3.6 * rows + 0.6), layout="constrained"
        )
        panels = list(figure.subplots(rows, columns, squeeze=False).flat)
        for panel, group in zip(panels, groups, strict=False):
            _plot_group(panel, results.metrics[group], cells, axis=axis)
            panel.set_title(group, fontsize=10)
        for panel in panels[len(groups) :]:
            panel.set_visible(False)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside right upper", fontsize=8, frameon=False)
        figure.supxlabel(_AXES[axis], fontsize=10)
        figure.supylabel("quality, points", fontsize=10)
        figure.suptitle(
            f"temperature {temperature:g}, {length} drafted tokens a block", fontsize=11
        )
        name = f"quality-{axis.split('_', maxsplit=1)[0]}-t{temperature:g}-d{length}.png"
        figure.savefig(folder / name, dpi=_DOTS_PER_INCH)
        paths.append(folder / name)
    return paths


def _plot_group(panel: Any, metrics: GroupMetrics, cells: list[Cell], *, axis: str) -> None:
    """Plot the curves of one family, then the baselines as points over them."""
    curves = {
        curve: [cell for cell in cells if cell.setting.curve == curve]
        for curve in (*CURVES, *BASELINES)
    }
    present = [curve for curve in CURVES if curves[curve]]
    for number, curve in enumerate(present):
        ends = curves[LOSSLESS] if curve in FROM_LOSSLESS else []
        xs, ys = _coordinates(metrics, [*ends, *curves[curve]], axis=axis)
        _, _, bars = panel.errorbar(
            [x.value for x in xs],
            [y.value for y in ys],
            xerr=_arms(xs),
            yerr=_arms(ys),
            label=curve,
            color=f"C{number % 10}",
            linestyle="--" if curve in _DASHED else "-",
            marker="o",
            markersize=3,
            linewidth=1.2,
            elinewidth=0.6,
        )
        for bar in bars:
            bar.set_alpha(0.25)
    for cell in cells:
        if cell.setting.curve in BASELINES:
            _plot_baseline(panel, metrics, cell, axis=axis)
    if axis == "rejection_rate":
        # Modes without blocks reject far more than all others; they may lie outside the plot.
        rates = [
            metrics.estimate(cell, "rejection_rate").high
            for cell in cells
            if cell.setting.mode in (Mode.CASCADE, Mode.SPECULATIVE)
        ]
        panel.set_xlim(-0.01, max(0.05, 1.15 * max(rates)))
    panel.grid(visible=True, alpha=0.25)
    panel.tick_params(labelsize=8)


def _coordinates(
    metrics: GroupMetrics, cells: Iterable[Cell], *, axis: str
) -> tuple[list[Estimate], list[Estimate]]:
    """Return the cells' positions on the axis, ascending, and their qualities."""
    points = [(metrics.estimate(cell, axis), metrics.estimate(cell, "quality")) for cell in cells]
    points.sort(key=lambda point: point[0].value)
    return [x for x, _ in points], [y for _, y in points]


def _arms(estimates: Iterable[Estimate]) -> list[list[float]]:
    """Return how far the intervals reach below and above, at least 0."""
    arms = [(max(0.0, e.value - e.low), max(0.0, e.high - e.value)) for e in estimates]
    return [[below for below, _ in arms], [above for _, above in arms]]


def _plot_baseline(panel: Any, metrics: GroupMetrics, cell: Cell, *, axis: str) -> None:
    """Plot a point. The expert rejects everything by definition: its quality is a line instead."""
    x, y = metrics.estimate(cell, axis), metrics.estimate(cell, "quality")
    curve = cell.setting.curve
    if curve == EXPERT and axis == "rejection_rate":
        panel.axhline(y.value, color="black", linestyle=":", linewidth=1, label=curve)
        panel.axhspan(y.low, y.high, color="black", alpha=0.05, linewidth=0)
        return
    panel.errorbar(
        [x.value], [y.value], yerr=_arms([y]), label=curve, color="black",
        marker=_MARKERS[curve], markersize=7, linestyle="none", elinewidth=0.5, zorder=5,
    )  # fmt: skip


# Of each metric: heading, decimals, and whether tables show its interval.
_METRICS = {
    "quality": ("quality", 1, True),
    "valid": ("valid", 1, True),
    "fields": ("fields right", 1, False),
    "tool": ("tool right", 1, False),
    "rejection_rate": ("rejected", 3, True),
    "deferral_rate": ("deferred", 3, False),
    "tokens_per_expert_pass": ("tokens / expert pass", 2, False),
    "latency": ("latency, modelled", 2, True),
    "expert_passes": ("expert passes", 2, False),
    "drafter_passes": ("drafter passes", 2, False),
    "tokens": ("tokens", 2, False),
    "bytes": ("bytes", 0, False),
    "wall_s": ("s under load", 2, False),
}

_BRIEF = (
    "quality", "valid", "fields", "tool", "rejection_rate", "deferral_rate",
    "tokens_per_expert_pass", "latency", "bytes",
)  # fmt: skip

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


def estimates(results: Results) -> list[dict[str, Any]]:
    """Return every metric of every setting in every group, with its interval, as JSON values."""
    found: list[dict[str, Any]] = []
    for group, cell in product(results.groups, results.cells):
        names = [
            name for name in (*_METRICS, "bleu") if name not in OPTIONAL or name in cell.columns
        ]
        entry: dict[str, Any] = {"setting": cell.setting.key, "group": group}
        for name in names:
            interval = asdict(results.metrics[group].estimate(cell, name))
            entry[name] = {
                part: round(value, 6) if math.isfinite(value) else None
                for part, value in interval.items()
            }
        if group in cell.corpus_bleu:
            entry["corpus_bleu"] = cell.corpus_bleu[group]
        found.append(entry)
    return found


def settings_table(
    results: Results, group: str, *, temperature: float, brief: bool = False
) -> Table:
    """Return what every setting scored and cost.

    Args:
        results: Of an evaluation.
        group: Of items.
        temperature: Of sampling.
        brief: Whether to leave out the less important metrics.
    """
    metrics = results.metrics[group]
    cells = [cell for cell in results.cells if cell.setting.temperature == temperature]
    names = [name for name in (_BRIEF if brief else _METRICS) if metrics.has(cells, name)]
    # Each column: its heading and a text for each cell.
    columns = [("setting", [cell.setting.name for cell in cells])]
    if len(results.lengths) > 1:
        columns.append(("draft", [str(cell.setting.draft_tokens or "") for cell in cells]))
    for name in names:
        shown = [_format(metrics.estimate(cell, name), name) for cell in cells]
        columns.append((_METRICS[name][0], shown))
    if any(group in cell.corpus_bleu for cell in cells):
        columns.append(("BLEU", [f"{cell.corpus_bleu[group]:.1f}" for cell in cells]))
    headings, texts = zip(*columns, strict=True)
    return Table(
        title=f"{group}, temperature {temperature:g}, {compare.count_items(metrics.items)}",
        headings=headings,
        rows=tuple(zip(*texts, strict=True)),
    )


def _format(estimate: Estimate, metric: str) -> str:
    if not math.isfinite(estimate.value):
        return ""
    _, decimals, with_interval = _METRICS[metric]
    if with_interval:
        return _with_interval(estimate, f".{decimals}f")
    return f"{estimate.value:.{decimals}f}"


def _with_interval(estimate: Estimate, spec: str = "+.1f") -> str:
    return f"{estimate.value:{spec}} [{estimate.low:{spec}}, {estimate.high:{spec}}]"


def views(results: Results, *, margin: float = MARGIN) -> list[list[View]]:
    """Return the views of every group, for each temperature and draft length."""
    return [
        [
            View(
                results=results,
                group=group,
                temperature=temperature,
                draft_tokens=length,
                margin=margin,
            )
            for group in results.groups
        ]
        for temperature, length in product(results.temperatures, results.lengths)
    ]


def conclusions(results: Results, *, margin: float = MARGIN) -> list[str]:
    """Return a sentence for each temperature and draft length: what to use, and why.

    Args:
        results: Of an evaluation.
        margin: The equivalence margin, in points.
    """
    return [_conclusion(of_groups[0]) for of_groups in views(results, margin=margin)]


def _conclusion(view: View) -> str:
    metrics, cell = view.metrics, compare.recommended(view)
    quality, latency = metrics.estimate(cell, "quality"), metrics.estimate(cell, "latency")
    expert = metrics.estimate(view.expert, "quality")
    passes = [float(metrics.resampled(one, "expert_passes")[0]) for one in (cell, view.expert)]
    items = compare.count_items(metrics.items)
    text = (
        f"Temperature {view.temperature:g}, {view.draft_tokens} drafted tokens a block: use"
        f" {cell.setting.name}: quality {quality.value:.1f} points (the expert alone:"
        f" {expert.value:.1f}), cost {latency.value:.2f} of the expert's modelled latency and"
        f" {passes[0] / passes[1]:.2f} of its passes, measured on {items}."
    )
    if metrics.items < compare.MIN_ITEMS:
        return f"{text} {compare.few_items(metrics.items)}"
    if cell not in (view.lossless, view.expert):
        difference = _with_interval(metrics.difference(cell, view.expert))
        return (
            f"{text} Its quality is proven to be at most {view.margin:g} points below the expert's"
            f" (difference {difference})."
        )
    return (
        f"{text} It has the expert's distribution by construction; no cheaper setting is proven to"
        f" be at most {view.margin:g} points below the expert."
    )


def finding_tables(results: Results, *, margin: float = MARGIN) -> list[Table]:
    """Return the tables of the comparisons in `compare`, those with any rows.

    Args:
        results: Of an evaluation.
        margin: The equivalence margin, in points.
    """
    tables: list[Table] = []
    for of_groups in views(results, margin=margin):
        tables += [
            _matched_table(of_groups),
            _share_table(of_groups),
            *(_equal_table(of_groups, lossy) for lossy in (LOSSY, LOSSY_SOLVED)),
            _better_table(of_groups),
        ]
    return [table for table in tables if table.rows]


def _title(text: str, views: Sequence[View]) -> str:
    temperature, length = views[0].temperature, views[0].draft_tokens
    return f"{text}: temperature {temperature:g}, {length} drafted tokens a block"


def _matched_table(views: Sequence[View]) -> Table:
    found = [compare.matched(view) for view in views]
    families = [one for one in found if one.group != ALL or len(found) == 1]
    paying = sum(one.pays for one in families)
    margin = f"at most {views[0].margin:g} points below the expert"
    few = [one for one in found if one.items < compare.MIN_ITEMS]
    return Table(
        title=_title(f"Fewest rejections {margin}", views),
        note=(
            f"At most {compare.FEWER:g} of the rejections of lossless speculation on {paying} of"
            f" {len(families)} families. A setting counts if the 95 % interval of its paired"
            f" difference lies above -{views[0].margin:g}; with few items no setting does. The last"
            " two columns: a setting chosen by its measured quality on one half of the items,"
            " measured on the other."
        ) + "".join(f" {one.group}: {compare.few_items(one.items)}" for one in few),
        headings=("family", "items", "setting", "quality minus the expert's", "rejected",
                  "lossless rejects", "share", "share, other half", "difference, other half"),
        rows=tuple(_matched_row(one) for one in found),
    )  # fmt: skip


def _matched_row(one: compare.Matched) -> tuple[str, ...]:
    lossless = f"{one.lossless_rate.value:.3f}"
    if one.cell is None:
        return (one.group, str(one.items), "none proven", "", "", lossless, "", "", "")
    ratio, difference = one.halves or (math.nan, math.nan)
    return (
        one.group,
        str(one.items),
        one.cell.setting.name,
        _with_interval(one.difference),
        f"{one.rejection_rate.value:.3f}",
        lossless,
        _with_interval(one.ratio, ".2f"),
        "" if math.isnan(ratio) else f"{ratio:.2f}",
        "" if math.isnan(difference) else f"{difference:+.1f}",
    )


def _share_table(views: Sequence[View]) -> Table:
    rows: list[tuple[str, ...]] = []
    for rule in compare.rules(views[0].results):
        found = [compare.matched(view, curve=rule) for view in views]
        rows.append(
            (rule, *("-" if one.cell is None else f"{one.ratio.value:.2f}" for one in found))
        )
    return Table(
        title=_title(
            f"Share of lossless rejections at most {views[0].margin:g} points below the expert",
            views,
        ),
        note="Where the share is 1 or more, or missing, the rule does not pay.",
        headings=("rule", *(view.group for view in views)),
        rows=tuple(rows),
    )


def _equal_table(views: Sequence[View], lossy: str) -> Table:
    rows: list[tuple[str, ...]] = []
    best: dict[str, float] = {}
    for rule in compare.rules(views[0].results):
        found = [compare.equal(view, curve=rule, lossy=lossy) for view in views]
        for one in found:
            if one and one.group != ALL:
                best[one.group] = max(best.get(one.group, -math.inf), one.difference.value)
        if any(found):
            rows.append((rule, *(_with_interval(one.difference) if one else "" for one in found)))
    no_lower = sum(value >= 0 for value in best.values())
    return Table(
        title=_title(f"Quality minus {lossy}'s at equal rejections", views),
        note=(
            f"The best rule scores no lower than {lossy} on {no_lower} of {len(best)} families:"
            " points, averaged over the rejection rates that both curves reach."
        ),
        headings=("rule", *(view.group for view in views)),
        rows=tuple(rows),
    )


def _better_table(views: Sequence[View]) -> Table:
    return Table(
        title=_title("Above the expert itself", views),
        note=(
            f"Settings whose 95 % interval is above zero, at most {_BETTER_SHOWN} a family; by"
            f" chance alone, one in forty of the {len(views[0].cascades())} settings would be."
        ),
        headings=("family", "setting", "quality minus the expert's", "rejected"),
        rows=tuple(
            (view.group, cell.setting.name, _with_interval(difference),
             f"{view.metrics.estimate(cell, 'rejection_rate').value:.3f}")
            for view in views
            for cell, difference in compare.better(view)[:_BETTER_SHOWN]
        ),
    )  # fmt: skip


def write(
    results: Results, folder: Path, *, plots: Sequence[Path], margin: float = MARGIN
) -> list[Path]:
    """Write `tables.md` and `report.html`; return both.

    Args:
        results: Of an evaluation.
        folder: Where to.
        plots: PNG files, embedded in the page.
        margin: The equivalence margin, in points.
    """
    sentences = conclusions(results, margin=margin)
    findings = finding_tables(results, margin=margin)
    settings = [
        settings_table(results, group, temperature=temperature)
        for group, temperature in product(results.groups, results.temperatures)
    ]
    tables, page = folder / "tables.md", folder / "report.html"
    markdown = "\n\n".join((*sentences, *(table.markdown() for table in (*findings, *settings))))
    tables.write_text(markdown + "\n", encoding="utf-8")
    source = files("cascade.evaluation").joinpath("report.html").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(source).render(
        workload=results.about["workload"],
        conclusions=sentences,
        about=_flattened(results.about),
        findings=findings,
        settings=settings,
        images={path.stem: base64.b64encode(path.read_bytes()).decode() for path in plots},
    )
    page.write_text(html, encoding="utf-8")
    return [tables, page]


def _flattened(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Return nested values as text by the path of their names, without those that are empty."""
    found: dict[str, str] = {}
    for key, value in values.items():
        name = f"{prefix}{key.replace('_', ' ')}"
        if isinstance(value, dict):
            found |= _flattened(value, f"{name}: ")
        elif isinstance(value, list | tuple):
            found[name] = ", ".join(map(str, value))
        else:
            found[name] = f"{value:.3g}" if isinstance(value, float) else str(value)
    return {name: text for name, text in found.items() if text}
