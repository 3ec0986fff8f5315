"""Builds evaluation results from columns of numbers, without running an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascade.evaluation.grid import Setting
from cascade.evaluation.records import COLUMNS, OPTIONAL
from cascade.evaluation.results import Cell, Results

if TYPE_CHECKING:
    from collections.abc import Sequence

BLOCKS = ("lossless", "lossy", "chow", "opt", "token_v3")


def cell(
    curve: str, *, dial: float | None = None, temperature: float = 0, **columns: Sequence[float]
) -> Cell:
    """Return a setting with some of its columns; `make_results` fills in the others.

    Args:
        curve: Of the setting.
        dial: Of the setting.
        temperature: Of the setting.
        columns: A value for each item, by the column's name.
    """
    setting = Setting(
        curve=curve,
        dial=dial,
        temperature=temperature,
        draft_tokens=5 if curve in BLOCKS else None,
    )
    return Cell(
        setting=setting,
        columns={name: np.array(column, dtype=float) for name, column in columns.items()},
        corpus_bleu={},
    )


def with_all_columns(one: Cell, *, count: int) -> Cell:
    """Return the cell with every column: 10 tokens per answer, all offered and judged."""
    expert_only = one.setting.curve == "expert_only"
    passes = {"expert_only": 10, "drafter_only": 0}.get(one.setting.curve, 4)
    defaults = dict.fromkeys(COLUMNS, 0.0) | {
        "quality": 1.0,
        "tokens": 10.0,
        "offered": 10.0,
        "judged": 10.0,
        "rejected": 10.0 if expert_only else 0.0,
        "expert_passes": float(passes),
        "modelled_s": float(passes),
    }
    for name in OPTIONAL:
        del defaults[name]
    columns = {name: np.full(count, value) for name, value in defaults.items()}
    return Cell(setting=one.setting, columns=columns | dict(one.columns), corpus_bleu={})


def make_results(
    *, cells: Sequence[Cell] = (), families: str = "aaabbb", temperature: float = 0
) -> Results:
    """Return results with the baselines before `cells`.

    Args:
        cells: Their settings may be baselines, which replace the default ones.
        families: One letter for each item: its family.
        temperature: Of the default baselines.
    """
    baselines = [
        cell(name, temperature=temperature) for name in ("expert_only", "drafter_only", "lossless")
    ]
    known = {one.setting for one in cells}
    everything = [one for one in baselines if one.setting not in known] + list(cells)
    return Results(
        about={"workload": "made up"},
        families=tuple(families),
        cells=tuple(with_all_columns(one, count=len(families)) for one in everything),
    )
