"""Draws the curves of an evaluation: quality over rejections, and over modelled latency."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING, Any

from cascade.evaluation import page
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
from cascade.evaluation.scoring import import_extra
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cascade.evaluation.compare import View
    from cascade.evaluation.results import Cell, Estimate, GroupMetrics, Results

_AXES = {
    "rejection_rate": "rejection rate",
    "latency": "modelled latency, relative to the expert alone",
}

_MARKERS = {DRAFTER: "v", EXPERT: "*", LOSSLESS: "D"}

_DASHED = (TOKEN_CASCADE, SEQUENCE_CASCADE, LOSSY, LOSSY_SOLVED)

_MAX_COLUMNS = 3

_DOTS_PER_INCH = 110

_INCHES = (5.0, 4.6)  # of one panel on a page: its text is as large as a phone's own


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


def panel(view: View, *, axis: str, chosen: Cell | None = None) -> page.Figure:
    """Return one group's curves for a page.

    Args:
        view: Which items, temperature and draft length.
        axis: `rejection_rate` or `latency`.
        chosen: A setting to circle.
    """
    figure = import_extra("matplotlib.figure").Figure(figsize=_INCHES, layout="constrained")
    axes = figure.subplots()
    _plot_group(axes, view.metrics, view.cells, axis=axis)
    if chosen is not None and not (axis == "rejection_rate" and chosen.setting.curve == EXPERT):
        x, y = (view.metrics.estimate(chosen, name).value for name in (axis, "quality"))
        axes.plot(
            [x], [y], label=f"chosen: {chosen.setting.name}", marker="o", markersize=14,
            markerfacecolor="none", markeredgecolor="crimson", markeredgewidth=2, linestyle="none",
        )  # fmt: skip
    axes.set_xlabel(_AXES[axis])
    axes.set_ylabel("quality, points")
    figure.legend(loc="outside lower center", ncols=2, fontsize=9, frameon=False)
    return page.draw(
        f"{view.group}: quality over {_AXES[axis].partition(',')[0]}, temperature"
        f" {view.temperature:g}, {view.draft_tokens} drafted tokens a block",
        figure,
    )


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
