"""The cost-quality curves of an evaluation as PNG, a panel for each family.

As in the papers' figures: quality against the rejection rate, and against latency relative to the
expert alone. A curve joins the settings of one rule; bars are 95 % intervals of both axes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cascade.decoding.session import Mode
from cascade.lab.compare import FROM_LOSSLESS
from cascade.lab.grid import (
    BASELINES,
    CURVES,
    DRAFTER,
    EXPERT,
    LOSSLESS,
    SEQUENCE_CASCADE,
    TOKEN_CASCADE,
)
from cascade.lab.results import ALL
from cascade.lab.scoring import extra

if TYPE_CHECKING:
    from pathlib import Path

    from cascade.lab.results import Cell, Draws, Results

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
