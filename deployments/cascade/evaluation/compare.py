"""Two comparisons of an evaluation's settings, with confidence intervals.

At the expert's quality: which setting rejects least among those that are not worse? A setting is
not worse if the 95 % interval of its paired difference in quality lies above minus the *equivalence
margin*, as in a test of non-inferiority (one side of a TOST): a wide interval proves nothing. Below
`MIN_ITEMS` items nothing is called equal. The best of many settings looks too good on the items
that it was chosen on, so the choice is repeated, by measured quality, on each half of the items and
measured on the other half.

At equal rejections: how much better does a rule's curve score than that of lossy speculative
decoding? Both are interpolated between their settings and averaged over the rejection rates that
both reach.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from cascade.evaluation.grid import EXPERT, LOSSLESS, LOSSY, LOSSY_SOLVED
from cascade.evaluation.results import Estimate, GroupMetrics, estimate
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from cascade.evaluation.results import Cell, Results

    Floats = NDArray[np.float64]

FEWER = 0.6
"""A rule pays if it rejects at most this share of lossless speculation's rejections."""

FROM_LOSSLESS = frozenset(
    {"chow", "diff", "opt", "token_v1", "token_v2", "ensemble", LOSSY, LOSSY_SOLVED}
)
"""Curves that reach lossless speculation at one end of their dial."""

MARGIN = 2.0
"""The equivalence margin, in points: a loss of quality that does not matter."""

MIN_ITEMS = 30
"""With fewer items no difference is called equal; bootstrap intervals are too narrow then."""

_GRID_POINTS = 21  # rejection rates at which curves are compared

_CURVES = 501  # the measured curve and 500 resamples; each is interpolated

_SAME_RATE = 0.01  # rejection rates closer than this count as one


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The setting with the fewest rejections at the expert's quality, in one group of items."""

    group: str
    items: int
    cell: Cell | None  # None: no setting is proven to keep the quality
    difference: Estimate  # of quality to the expert, points
    rejection_rate: Estimate
    lossless_rate: Estimate
    ratio: Estimate  # of the two rates
    halves: tuple[float, float] | None  # ratio and difference where halves choose for each other

    @property
    def pays(self) -> bool:
        """Return whether rejections are at most `FEWER` of lossless speculation's."""
        return self.cell is not None and self.ratio.value <= FEWER


@dataclass(frozen=True, slots=True, kw_only=True)
class Equal:
    """A rule's curve against lossy's at equal rejection rates, in one group of items."""

    group: str
    low: float  # of the rejection rates that both reach
    high: float
    difference: Estimate  # mean over those rates, points of quality


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One group of items at one temperature and draft length."""

    results: Results
    group: str
    temperature: float
    draft_tokens: int
    margin: float = MARGIN

    @property
    def metrics(self) -> GroupMetrics:
        """Return the metrics of the group."""
        return self.results.metrics[self.group]

    @property
    def cells(self) -> list[Cell]:
        """Return the settings of the view."""
        return self.results.select(temperature=self.temperature, draft_tokens=self.draft_tokens)

    @property
    def expert(self) -> Cell:
        """Return the expert alone."""
        return self.results.find(EXPERT, temperature=self.temperature)

    @property
    def lossless(self) -> Cell:
        """Return lossless speculation."""
        return self.results.find(
            LOSSLESS, temperature=self.temperature, draft_tokens=self.draft_tokens
        )

    def cascades(self, curve: str | None = None) -> list[Cell]:
        """Return the settings of a rule, or of all rules, in mode cascade."""
        return [
            cell
            for cell in self.cells
            if cell.setting.mode is Mode.CASCADE and curve in (None, cell.setting.curve)
        ]


def rules(results: Results) -> list[str]:
    """Return the curves of mode cascade, in the order of the results."""
    settings = (cell.setting for cell in results.cells)
    return list(dict.fromkeys(one.curve for one in settings if one.mode is Mode.CASCADE))


def count_items(count: int) -> str:
    """Return the number of items in words."""
    return f"{count} item{'' if count == 1 else 's'}"


def few_items(count: int) -> str:
    """Return the warning about a comparison on few items."""
    return (
        f"Warning: {count_items(count)} prove nothing about quality; evaluate at least"
        f" {MIN_ITEMS}, better some hundred."
    )


def keeps_quality(view: View, cell: Cell) -> bool:
    """Return whether a setting's quality is proven to be at most the margin below the expert's."""
    enough = view.metrics.items >= MIN_ITEMS
    return enough and view.metrics.difference(cell, view.expert).low >= -view.margin


def recommended(view: View) -> Cell:
    """Return the setting of least modelled latency that keeps the expert's quality.

    Lossless speculation and the expert alone keep it by construction, however few the items.
    """
    kept = [cell for cell in view.cells if keeps_quality(view, cell)]
    return min(
        (*kept, view.lossless, view.expert),
        key=lambda cell: float(view.metrics.resampled(cell, "latency")[0]),
    )


def matched(view: View, *, curve: str | None = None) -> Matched:
    """Return the setting that rejects least among those that keep the expert's quality.

    Args:
        view: Which items, temperature, draft length and margin.
        curve: Whose settings; those of every rule in mode cascade if absent.
    """
    metrics, lossless, cells = view.metrics, view.lossless, view.cascades(curve)
    cell = _fewest_rejections(metrics, [cell for cell in cells if keeps_quality(view, cell)])
    chosen = cell or lossless
    rate_R, lossless_R = (metrics.resampled(one, "rejection_rate") for one in (chosen, lossless))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = estimate(rate_R / lossless_R)
    return Matched(
        group=view.group,
        items=metrics.items,
        cell=cell,
        difference=metrics.difference(chosen, view.expert),
        rejection_rate=estimate(rate_R),
        lossless_rate=estimate(lossless_R),
        ratio=ratio,
        halves=_halves(view, cells),
    )


def _fewest_rejections(metrics: GroupMetrics, cells: Iterable[Cell]) -> Cell | None:
    return min(
        cells, key=lambda cell: float(metrics.resampled(cell, "rejection_rate")[0]), default=None
    )


def _halves(view: View, cells: Sequence[Cell]) -> tuple[float, float] | None:
    """Return ratio and difference on each half of what the other half chose, averaged."""
    weights_RN = view.results.resamples_of(view.group)
    members_M = np.flatnonzero(weights_RN[0])
    if len(members_M) < 2:  # noqa: PLR2004 - one for each half
        return None
    halves = [
        GroupMetrics(
            view.results, view.group, weights_RN=_restricted(weights_RN, members_M[start::2])
        )
        for start in (0, 1)
    ]
    found: list[tuple[float, float]] = []
    for choosing, measuring in (halves, reversed(halves)):
        differences = ((cell, choosing.difference(cell, view.expert).value) for cell in cells)
        cell = _fewest_rejections(
            choosing, [cell for cell, points in differences if points >= -view.margin]
        )
        if cell is None:
            return None
        rate, lossless = (
            float(measuring.resampled(one, "rejection_rate")[0]) for one in (cell, view.lossless)
        )
        ratio = rate / lossless if lossless else float("nan")
        found.append((ratio, measuring.difference(cell, view.expert).value))
    return fmean(ratio for ratio, _ in found), fmean(points for _, points in found)


def _restricted(weights_RN: Floats, members_M: NDArray[np.intp]) -> Floats:
    """Return the weights of some items; a resample without any of them weighs them equally."""
    kept_RN = np.zeros_like(weights_RN)
    kept_RN[:, members_M] = weights_RN[:, members_M]
    empty_R = kept_RN.sum(axis=1) == 0
    kept_RN[np.ix_(empty_R, members_M)] = 1
    return kept_RN


def equal(view: View, *, curve: str, lossy: str) -> Equal | None:
    """Return a rule's curve against lossy's, or None where they share no range of rejections.

    At temperature 0 lossy speculative decoding is lossless at every dial: there is no curve.

    Args:
        view: Which items, temperature and draft length.
        curve: The rule's.
        lossy: `lossy` or `lossy_solved`.
    """
    curves = [curve_points(view, name) for name in (curve, lossy)]
    if any(len(rates_CR) == 0 for rates_CR, _ in curves):
        return None
    low = max(float(rates_CR[:, 0].min()) for rates_CR, _ in curves)
    high = min(float(rates_CR[:, 0].max()) for rates_CR, _ in curves)
    if high - low < _SAME_RATE:
        return None
    rates = np.linspace(low, high, _GRID_POINTS)
    ours_R, lossy_R = (_mean_quality(*points, rates) for points in curves)
    return Equal(group=view.group, low=low, high=high, difference=estimate(ours_R - lossy_R))


def curve_points(view: View, curve: str) -> tuple[Floats, Floats]:
    """Return rejection rates and qualities of a curve's settings, each [C, R + 1]."""
    cells = [cell for cell in view.cells if cell.setting.curve == curve]
    if cells and curve in FROM_LOSSLESS:
        cells.append(view.lossless)
    rates, qualities = (
        [view.metrics.resampled(cell, name) for cell in cells]
        for name in ("rejection_rate", "quality")
    )
    return np.array(rates), np.array(qualities)


def _mean_quality(rates_CR: Floats, qualities_CR: Floats, rates: Floats) -> Floats:
    """Return the mean quality of a curve at some rejection rates, in each resample."""
    means: list[float] = []
    for rates_C, qualities_C in islice(zip(rates_CR.T, qualities_CR.T, strict=True), _CURVES):
        order_C = np.argsort(rates_C, kind="stable")
        means.append(np.interp(rates, rates_C[order_C], qualities_C[order_C]).mean())
    return np.array(means)


def better(view: View) -> list[tuple[Cell, Estimate]]:
    """Return the cascades whose quality is surely above the expert's, and by how much; best first.

    Surely: the interval of the paired difference, in points, is above zero.
    """
    differences = [(cell, view.metrics.difference(cell, view.expert)) for cell in view.cascades()]
    above = [(cell, difference) for cell, difference in differences if difference.low > 0]
    return sorted(above, key=lambda found: -found[1].value)
