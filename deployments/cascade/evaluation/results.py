"""The results of an evaluation: `results.json`, and the metrics with their confidence intervals.

The intervals are 95 % percentile bootstraps over items (Efron, 1979), resampled within families.
One set of resamples serves every setting, so a difference of two settings is paired by item.

Shapes: `N` items, `M` items of a group, `R` resamples; the first is always the items as they are.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.errors import InvalidMeasurement
from cascade.evaluation.grid import EXPERT, Setting
from cascade.evaluation.records import OPTIONAL

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Floats = NDArray[np.float64]

FORMAT = 2

RESAMPLES = 2000

COVERAGE = 0.95

ALL = "all"

_RATIOS = {
    "rejection_rate": ("rejected", "offered"),
    "deferral_rate": ("deferred", "judged"),
    "tokens_per_expert_pass": ("tokens", "expert_passes"),
}

_PER_ANSWER = ("tokens", "expert_passes", "drafter_passes", "bytes")

_POINTS = ("quality", *OPTIONAL)

_MEANS = {"wall_s": ("latency_s", 1)} | {
    **{name: (name, 100) for name in _POINTS},
    **{name: (name, 1) for name in _PER_ANSWER},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A value and its confidence interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.3g}, {self.high:.3g}]"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A setting and the columns of its records: a value for each item, in order."""

    setting: Setting
    columns: Mapping[str, Floats]
    corpus_bleu: Mapping[str, float]  # by family, where BLEU is reported


@dataclass(frozen=True, kw_only=True)
class Results:
    """All results of an evaluation. `about` says what was asked, who answered, when and where."""

    about: Mapping[str, Any]
    families: tuple[str, ...]  # of each item
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
        """Return how often each resample has each item, [R + 1, N]; the first has each once."""
        random = np.random.default_rng(0)
        names = np.array(self.families)
        weights_RN = np.ones((RESAMPLES + 1, len(names)))
        for name in dict.fromkeys(self.families):
            members_M = np.flatnonzero(names == name)
            size = len(members_M)
            drawn_RM = random.multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
            weights_RN[1:, members_M] = drawn_RM
        return weights_RN

    def resamples_of(self, group: str) -> Floats:
        """Return the resamples of one group, [R + 1, N]; items of other groups weigh nothing."""
        if group == ALL:
            return self.resamples
        return self.resamples * (np.array(self.families) == group)

    @cached_property
    def metrics(self) -> Mapping[str, GroupMetrics]:
        """Return the metrics of each group."""
        return {group: GroupMetrics(self, group) for group in self.groups}

    def find(self, curve: str, *, temperature: float, draft_tokens: int | None = None) -> Cell:
        """Return the first cell of a curve.

        Args:
            curve: Its name.
            temperature: Of the setting.
            draft_tokens: Of the setting; ignored in modes without blocks.

        Raises:
            InvalidMeasurement: There is none.
        """
        for cell in self.select(temperature=temperature, draft_tokens=draft_tokens):
            if cell.setting.curve == curve:
                return cell
        raise InvalidMeasurement(
            f"the results have no {curve} at temperature {temperature:g}; evaluate again"
        )

    def select(self, *, temperature: float, draft_tokens: int | None = None) -> list[Cell]:
        """Return the cells at a temperature, of one draft length or in modes without blocks."""
        return [
            cell
            for cell in self.cells
            if cell.setting.temperature == temperature
            and cell.setting.draft_tokens in (None, draft_tokens)
        ]


class GroupMetrics:
    """The metrics of one group of items, over all resamples."""

    def __init__(self, results: Results, group: str, *, weights_RN: Floats | None = None) -> None:
        self._results = results
        weights_RN = results.resamples_of(group) if weights_RN is None else weights_RN
        self._members_M = np.flatnonzero(weights_RN[0])
        self._weights_RM = np.ascontiguousarray(weights_RN[:, self._members_M])
        self._sizes_R = self._weights_RM.sum(axis=1)
        self._known: dict[tuple[str, str], Floats] = {}

    @property
    def items(self) -> int:
        """Return how many items the group has."""
        return len(self._members_M)

    def resampled(self, cell: Cell, name: str) -> Floats:
        """Return a metric in every resample, [R + 1].

        Args:
            cell: Of a setting.
            name: `quality`, `bleu`, `valid`, `fields` and `tool` in points; `rejection_rate` and
                `deferral_rate`, shares;
                `tokens_per_expert_pass`; `latency`, modelled and relative to the expert alone;
                `wall_s`; and `tokens`, `expert_passes`, `drafter_passes`, `bytes` per answer.
        """
        key = cell.setting.key, name
        if key not in self._known:
            self._known[key] = self._compute(cell, name)
        return self._known[key]

    def _compute(self, cell: Cell, name: str) -> Floats:
        if name in _RATIOS:
            above, below = (self._sum(cell, column) for column in _RATIOS[name])
        elif name == "latency":
            expert = self._results.find(EXPERT, temperature=cell.setting.temperature)
            above, below = (self._sum(one, "modelled_s") for one in (cell, expert))
        else:
            column, scale = _MEANS[name]
            return scale * self._mean(cell, column)
        with np.errstate(divide="ignore", invalid="ignore"):
            return above / below

    def has(self, cells: Sequence[Cell], name: str) -> bool:
        """Return whether any item of the group has a value of a metric under any of the cells."""
        return name not in OPTIONAL or any(
            np.isfinite(cell.columns[name][self._members_M]).any()
            for cell in cells
            if name in cell.columns
        )

    def estimate(self, cell: Cell, name: str) -> Estimate:
        """Return a metric's value and interval."""
        return estimate(self.resampled(cell, name))

    def difference(self, cell: Cell, other: Cell) -> Estimate:
        """Return how much higher the quality of `cell` is than that of `other`."""
        return estimate(self.resampled(cell, "quality") - self.resampled(other, "quality"))

    def _mean(self, cell: Cell, column: str) -> Floats:
        """Return the mean over the items that have a value, NaN if none has."""
        if column not in cell.columns:
            raise InvalidMeasurement(
                f"the results have no `{column}`, which items with a schema or tools have"
            )
        values_M = cell.columns[column][self._members_M]
        known_M = np.isfinite(values_M)
        if known_M.all():
            return self._weights_RM @ values_M / self._sizes_R
        weights_RM = self._weights_RM[:, known_M]
        with np.errstate(divide="ignore", invalid="ignore"):
            return weights_RM @ values_M[known_M] / weights_RM.sum(axis=1)

    def _sum(self, cell: Cell, column: str) -> Floats:
        return self._weights_RM @ cell.columns[column][self._members_M]


def estimate(values_R: Floats) -> Estimate:
    """Return the first value and the interval of the others; NaN where it is undefined."""
    value, others_R = float(values_R[0]), values_R[1:][np.isfinite(values_R[1:])]
    if not np.isfinite(value) or not others_R.size:
        return Estimate(value=value, low=np.nan, high=np.nan)
    tail = 50 * (1 - COVERAGE)
    low, high = np.percentile(others_R, [tail, 100 - tail])
    return Estimate(value=value, low=float(low), high=float(high))


def save(results: Results, path: Path, *, figures: Sequence[Mapping[str, Any]]) -> None:
    """Write `results.json`.

    Args:
        results: Whose columns are written.
        path: The file.
        figures: The metrics of every setting, for readers.
    """
    document = {
        "format": FORMAT,
        "about": results.about,
        "families": results.families,
        "cells": [
            {
                "key": cell.setting.key,
                **asdict(cell.setting),
                "corpus_bleu": dict(cell.corpus_bleu),
                "columns": {name: _to_json(values_N) for name, values_N in cell.columns.items()},
            }
            for cell in results.cells
        ],
        "figures": figures,
    }
    path.write_text(json.dumps(document, ensure_ascii=False) + "\n", encoding="utf-8")


def _to_json(values_N: Floats) -> list[float | None]:
    return [
        None if np.isnan(value) else int(value) if value == int(value) else round(value, 6)
        for value in values_N.tolist()
    ]


def load(path: Path) -> Results:
    """Return the results in a file, or in the folder of an evaluation.

    Raises:
        InvalidMeasurement: The file cannot be read, or is no `results.json` of this version.
    """
    path = path / "results.json" if path.is_dir() else path
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if document["format"] != FORMAT:
            raise InvalidMeasurement(
                f"{path} has format {document['format']}, not {FORMAT}; evaluate again"
            )
        return Results(
            about=document["about"],
            families=tuple(document["families"]),
            cells=tuple(_cell(entry) for entry in document["cells"]),
        )
    except OSError as error:
        raise InvalidMeasurement(
            f"{path} cannot be read ({error.strerror}); give the folder of `cascade evaluate`"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidMeasurement(f"{path} is not a results.json of `cascade evaluate`") from error


def _cell(entry: Mapping[str, Any]) -> Cell:
    setting = Setting(**{field.name: entry[field.name] for field in fields(Setting)})
    return Cell(
        setting=replace(setting, phases=tuple((phase, rule) for phase, rule in setting.phases)),
        columns={name: np.array(values, dtype=float) for name, values in entry["columns"].items()},
        corpus_bleu=entry["corpus_bleu"],
    )
