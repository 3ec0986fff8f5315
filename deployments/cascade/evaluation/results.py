"""What an evaluation found: `results.json`, and the figures drawn from it with their intervals.

The intervals are percentile bootstraps over items (Efron, 1979), 95 %, resampled within families.
One set of resamples serves every setting, so a difference of two settings is paired by item.

Shapes: `R` resamples and before them the items as they are, `N` items, `M` of one group.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.errors import InvalidMeasurement
from cascade.evaluation.grid import EXPERT, LOSSLESS, Setting

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FORMAT = 1

RESAMPLES = 2000

COVERAGE = 0.95

ALL = "all"

_RATIOS = {
    "rejection_rate": ("rejected", "offered"),
    "deferral_rate": ("deferred", "judged"),
    "tokens_per_expert_pass": ("tokens", "expert_passes"),
}

_PER_ANSWER = ("tokens", "expert_passes", "drafter_passes", "bytes")

_MEANS = {"quality": ("quality", 100), "bleu": ("bleu", 100), "wall_s": ("latency_s", 1)} | {
    name: (name, 1) for name in _PER_ANSWER
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A number and its interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A setting and the columns of its records, in the order of the items."""

    setting: Setting
    columns: Mapping[str, Floats]
    corpus_bleu: Mapping[str, float]  # by family, where BLEU is a figure


@dataclass(frozen=True, kw_only=True)
class Results:
    """All of an evaluation. `about` says what was asked, of whom, when and where."""

    about: Mapping[str, Any]
    families: tuple[str, ...]  # of the items, one each
    cells: tuple[Cell, ...]

    @property
    def groups(self) -> tuple[str, ...]:
        """Return the families, and `all` before them if there are several."""
        names = tuple(dict.fromkeys(self.families))
        return names if len(names) == 1 else (ALL, *names)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Return the temperatures, lowest first."""
        return tuple(sorted({cell.setting.temperature for cell in self.cells}))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Return the draft lengths, shortest first."""
        return tuple(sorted({c.setting.draft_tokens for c in self.cells if c.setting.draft_tokens}))

    @cached_property
    def resamples(self) -> Floats:
        """Return how often each resample has each item, [R + 1, N]; first each item once."""
        random = np.random.default_rng(0)
        names = np.array(self.families)
        weights_RN = np.ones((RESAMPLES + 1, len(names)))
        for name in dict.fromkeys(self.families):
            members = np.flatnonzero(names == name)
            share = np.full(len(members), 1 / len(members))
            drawn = random.multinomial(len(members), share, size=RESAMPLES)
            weights_RN[1:, members] = drawn
        return weights_RN

    def resamples_of(self, group: str) -> Floats:
        """Return the resamples of one group's items, [R + 1, N]; others weigh nothing."""
        if group == ALL:
            return self.resamples
        return self.resamples * (np.array(self.families) == group)

    @cached_property
    def draws(self) -> Mapping[str, Draws]:
        """Return the metrics of each group."""
        return {group: Draws(self, group) for group in self.groups}

    def expert(self, setting: Setting) -> Cell:
        """Return the expert alone at a setting's temperature."""
        return self.find(EXPERT, temperature=setting.temperature)

    def lossless(self, setting: Setting) -> Cell:
        """Return lossless speculation at a setting's temperature and draft length."""
        length = setting.draft_tokens or self.lengths[0]
        return self.find(LOSSLESS, temperature=setting.temperature, draft_tokens=length)

    def find(self, curve: str, *, temperature: float, draft_tokens: int | None = None) -> Cell:
        """Return the first cell of a curve.

        Raises:
            InvalidMeasurement: There is none.
        """
        for cell in self.cells:
            which = cell.setting
            if (which.curve, which.temperature, which.draft_tokens) == (
                curve, temperature, draft_tokens,
            ):  # fmt: skip
                return cell
        raise InvalidMeasurement(
            f"the results have no {curve} at temperature {temperature:g}; evaluate again"
        )

    def select(self, *, temperature: float, draft_tokens: int | None = None) -> list[Cell]:
        """Return the cells at a temperature and draft length; those without a length too."""
        return [
            cell
            for cell in self.cells
            if cell.setting.temperature == temperature
            and cell.setting.draft_tokens in (None, draft_tokens)
        ]


class Draws:
    """The metrics of one group of items: arrays over resamples, the first value as measured."""

    def __init__(self, results: Results, group: str, *, weights_RN: Floats | None = None) -> None:
        self._results = results
        weights_RN = results.resamples_of(group) if weights_RN is None else weights_RN
        self._members = np.flatnonzero(weights_RN[0])
        self._weights_RM = np.ascontiguousarray(weights_RN[:, self._members])
        self._sizes_R = self._weights_RM.sum(axis=1)
        self._known: dict[tuple[str, str], Floats] = {}
        self.group = group

    def metric(self, cell: Cell, name: str) -> Floats:
        """Return a metric over resamples, [R + 1].

        Args:
            cell: Of a setting.
            name: `quality` and `bleu` in points; `rejection_rate` and `deferral_rate`, shares;
                `tokens_per_expert_pass`; `latency`, modelled and relative to the expert alone;
                `wall_s`; and `tokens`, `expert_passes`, `drafter_passes`, `bytes` per answer.
        """
        key = cell.setting.key, name
        if key not in self._known:
            self._known[key] = self._metric(cell, name)
        return self._known[key]

    def _metric(self, cell: Cell, name: str) -> Floats:
        if name in _RATIOS:
            return self._ratio(cell, *_RATIOS[name])
        if name == "latency":
            expert = self._results.expert(cell.setting)
            return _quotient(self._sum(cell, "modelled_s"), self._sum(expert, "modelled_s"))
        column, scale = _MEANS[name]
        return scale * self._sum(cell, column) / self._sizes_R

    def figure(self, cell: Cell, name: str) -> Figure:
        """Return a metric as measured, with its interval."""
        return figure(self.metric(cell, name))

    def difference(self, cell: Cell, other: Cell, name: str = "quality") -> Figure:
        """Return how much higher `cell` is than `other`, paired by item."""
        return figure(self.metric(cell, name) - self.metric(other, name))

    def _sum(self, cell: Cell, column: str) -> Floats:
        return self._weights_RM @ cell.columns[column][self._members]

    def _ratio(self, cell: Cell, above: str, below: str) -> Floats:
        return _quotient(self._sum(cell, above), self._sum(cell, below))


def figure(draws_R: Floats) -> Figure:
    """Return the first draw and the interval of the others; NaN where it is undefined."""
    value, others_R = float(draws_R[0]), draws_R[1:][np.isfinite(draws_R[1:])]
    if not np.isfinite(value) or not others_R.size:
        return Figure(value=value, low=np.nan, high=np.nan)
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(others_R, [tail, 100 - tail])
    return Figure(value=value, low=float(low), high=float(high))


def _quotient(above_R: Floats, below_R: Floats) -> Floats:
    with np.errstate(divide="ignore", invalid="ignore"):
        return above_R / below_R


def save(results: Results, path: Path, *, figures: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json`: the columns of every setting, and the figures for readers."""
    document = {
        "format": FORMAT,
        "about": results.about,
        "families": results.families,
        "cells": [
            {
                "key": cell.setting.key,
                "curve": cell.setting.curve,
                "dial": cell.setting.dial,
                "temperature": cell.setting.temperature,
                "draft_tokens": cell.setting.draft_tokens,
                "bonus": cell.setting.bonus,
                "corpus_bleu": dict(cell.corpus_bleu),
                "columns": {name: _plain(values_N) for name, values_N in cell.columns.items()},
            }
            for cell in results.cells
        ],
        "figures": figures,
    }
    path.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(values_N: Floats) -> list[float | None]:
    return [
        None if np.isnan(value) else int(value) if value == int(value) else round(value, 6)
        for value in values_N.tolist()
    ]


def load(path: Path) -> Results:
    """Return the results in a file, or in the folder of an evaluation.

    Raises:
        InvalidMeasurement: The file is none.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise InvalidMeasurement(
                f"{path} has format {document['format']}, this reads {FORMAT}; evaluate again"
            )
        return Results(
            about=document["about"],
            families=tuple(document["families"]),
            cells=tuple(_cell(told) for told in document["cells"]),
        )
    except OSError as error:
        raise InvalidMeasurement(
            f"{path} cannot be read ({error.strerror}); give the folder of `cascade evaluate`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidMeasurement(f"{path} is no results.json of `cascade evaluate`") from error


def _cell(told: Mapping[str, Any]) -> Cell:
    names = ("curve", "dial", "temperature", "draft_tokens", "bonus")
    return Cell(
        setting=Setting(**{name: told[name] for name in names}),
        columns={name: np.array(found, dtype=float) for name, found in told["columns"].items()},
        corpus_bleu=told["corpus_bleu"],
    )
