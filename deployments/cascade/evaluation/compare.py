"""Questions that an evaluation is asked, and their answers with intervals.

At the expert's quality: which rule rejects least among those whose quality is not below the
expert's, surely or within a point? "Not surely below" means that the interval of the paired
difference reaches zero; with few items that is lenient, and the other reading, a measured
loss of at most `POINT`, is the stricter one. Choosing the best of many settings on the
items that also measure it flatters it; so the choice is repeated on each half of the items and
measured on the other.

At equal rejections: how much better does a rule's curve score than lossy speculative decoding's,
both interpolated between their settings, on the average of the rejection rates both reach?
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from cascade.evaluation.grid import EXPERT, LOSSLESS, LOSSY, LOSSY_SOLVED
from cascade.evaluation.results import Draws, Figure, figure
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cascade.evaluation.results import Cell, Results

    Floats = NDArray[np.float64]

FEWER = 0.6

"""The share of lossless speculation's rejections that a rule that pays stays under."""

FROM_LOSSLESS = frozenset(
    {"chow", "diff", "opt", "token_v1", "token_v2", "ensemble", LOSSY, LOSSY_SOLVED}
)

"""Curves whose one end is lossless speculation by definition."""

POINT = 1.0

"""The loss of quality, in points, that the stricter reading of "the expert's quality" allows."""

_PLACES = 21

_DRAWS = 500  # resamples of a whole curve: each is an interpolation

_NARROW = 0.01  # rejection rates closer than this are one


@dataclass(frozen=True, slots=True, kw_only=True)
class Matched:
    """The setting with the fewest rejections at the expert's quality, in one group of items."""

    group: str
    cell: Cell | None  # None: no setting keeps the quality
    difference: Figure  # of quality to the expert, points
    rejection_rate: Figure
    lossless_rate: Figure
    ratio: Figure  # of the two rates
    halves: tuple[float, float] | None  # ratio and difference where halves choose for each other

    @property
    def pays(self) -> bool:
        """Whether rejections are at most `FEWER` of lossless speculation's."""
        return self.cell is not None and self.ratio.value <= FEWER


@dataclass(frozen=True, slots=True, kw_only=True)
class Equal:
    """A rule's curve against lossy's at equal rejection rates, in one group of items."""

    group: str
    low: float  # of the rejection rates that both reach
    high: float
    difference: Figure  # mean over those rates, points of quality

    @property
    def holds(self) -> bool:
        """Whether the rule scores no lower."""
        return self.difference.value >= 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Better:
    """A cascade that scores above the expert itself, its interval clear of zero."""

    group: str
    cell: Cell
    difference: Figure
    rejection_rate: Figure


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One group of items at one temperature and draft length."""

    results: Results
    group: str
    temperature: float
    draft_tokens: int

    @property
    def draws(self) -> Draws:
        """Return the metrics of the group."""
        return self.results.draws[self.group]

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
    cells = [cell.setting for cell in results.cells if cell.setting.mode is Mode.CASCADE]
    return list(dict.fromkeys(setting.curve for setting in cells))


def matched(view: View, *, curve: str | None = None, strict: bool = False) -> Matched:
    """Return the least rejecting setting of a rule, or of any, at the expert's quality.

    Args:
        view: Of which items, under which temperature and draft length.
        curve: Whose settings; those of every rule in mode cascade if absent.
        strict: Whether a measured loss of more than `POINT` is too much, however unsure it is.
    """
    draws, lossless = view.draws, view.lossless
    cell = _least(draws, view.cascades(curve), view.expert, strict=strict)
    chosen = cell or lossless
    rate_R, lossless_R = (draws.metric(one, "rejection_rate") for one in (chosen, lossless))
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = figure(rate_R / lossless_R)
    return Matched(
        group=view.group,
        cell=cell,
        difference=draws.difference(chosen, view.expert),
        rejection_rate=figure(rate_R),
        lossless_rate=figure(lossless_R),
        ratio=ratio,
        halves=_halves(view, view.cascades(curve), strict=strict),
    )


def _least(draws: Draws, cells: Sequence[Cell], expert: Cell, *, strict: bool) -> Cell | None:
    """Return the cell with the fewest rejections among those at the expert's quality."""
    kept = [cell for cell in cells if _as_good(draws.difference(cell, expert), strict=strict)]
    return min(kept, key=lambda cell: float(draws.metric(cell, "rejection_rate")[0]), default=None)


def _as_good(difference: Figure, *, strict: bool) -> bool:
    if strict:
        return difference.value >= -POINT
    return difference.high >= 0


def _halves(view: View, cells: Sequence[Cell], *, strict: bool) -> tuple[float, float] | None:
    """Return ratio and difference on each half of what the other half chose, averaged."""
    weights_RN = view.results.resamples_of(view.group)
    members = np.flatnonzero(weights_RN[0])
    found: list[tuple[float, float]] = []
    for first in (0, 1):
        choosing, judging = (
            Draws(view.results, view.group, weights_RN=_only(weights_RN, members[start::2]))
            for start in (first, 1 - first)
        )
        cell = _least(choosing, cells, view.expert, strict=strict) if len(members) > 1 else None
        if cell is None:
            return None
        rates = [float(judging.metric(c, "rejection_rate")[0]) for c in (cell, view.lossless)]
        ratio = rates[0] / rates[1] if rates[1] else float("nan")
        found.append((ratio, judging.difference(cell, view.expert).value))
    return fmean(ratio for ratio, _ in found), fmean(points for _, points in found)


def _only(weights_RN: Floats, members: NDArray[np.intp]) -> Floats:
    """Return the weights of some items. A resample that drew none of them weighs them alike."""
    kept_RN = np.zeros_like(weights_RN)
    kept_RN[:, members] = weights_RN[:, members]
    empty_R = kept_RN.sum(axis=1) == 0
    kept_RN[np.ix_(empty_R, members)] = 1
    return kept_RN


def equal(view: View, *, curve: str, lossy: str) -> Equal | None:
    """Return a rule's curve against lossy's, or None where they share no range of rejections.

    At temperature 0 lossy speculative decoding is lossless whatever its dial: there is no curve.
    """
    lines = [line(view, name) for name in (curve, lossy)]
    if any(len(rates_CR) == 0 for rates_CR, _ in lines):
        return None
    low = max(float(rates_CR[:, 0].min()) for rates_CR, _ in lines)
    high = min(float(rates_CR[:, 0].max()) for rates_CR, _ in lines)
    if high - low < _NARROW:
        return None
    places = np.linspace(low, high, _PLACES)
    ours_R, theirs_R = (_mean_height(*one, places) for one in lines)
    return Equal(group=view.group, low=low, high=high, difference=figure(ours_R - theirs_R))


def line(view: View, curve: str) -> tuple[Floats, Floats]:
    """Return rejection rates and qualities along a curve's settings, each [C, R + 1]."""
    cells = [cell for cell in view.cells if cell.setting.curve == curve]
    if cells and curve in FROM_LOSSLESS:
        cells.append(view.lossless)
    rates, qualities = (
        [view.draws.metric(cell, name) for cell in cells] for name in ("rejection_rate", "quality")
    )
    return np.array(rates), np.array(qualities)


def _mean_height(rates_CR: Floats, qualities_CR: Floats, places: Floats) -> Floats:
    """Return the mean quality of a curve at some rejection rates, in each resample."""
    rates_CR, qualities_CR = rates_CR[:, : _DRAWS + 1], qualities_CR[:, : _DRAWS + 1]
    order_CR = np.argsort(rates_CR, axis=0, kind="stable")
    sorted_CR = np.take_along_axis(rates_CR, order_CR, axis=0)
    heights_CR = np.take_along_axis(qualities_CR, order_CR, axis=0)
    return np.array(
        [
            np.interp(places, sorted_CR[:, r], heights_CR[:, r]).mean()
            for r in range(rates_CR.shape[1])
        ]
    )


def better(view: View) -> list[Better]:
    """Return the cascades that beat the expert, the furthest first."""
    found = [
        Better(
            group=view.group,
            cell=cell,
            difference=view.draws.difference(cell, view.expert),
            rejection_rate=view.draws.figure(cell, "rejection_rate"),
        )
        for cell in view.cascades()
    ]
    clear = [one for one in found if one.difference.low > 0]
    return sorted(clear, key=lambda one: -one.difference.value)
