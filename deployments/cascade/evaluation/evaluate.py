"""An evaluation from beginning to end: measure, gather, draw, report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade.evaluation import report
from cascade.evaluation.environment import provenance
from cascade.evaluation.records import COLUMNS, Record, Store
from cascade.evaluation.results import Cell, Results, save
from cascade.evaluation.run import Costs, measure, measure_costs
from cascade.evaluation.scoring import Scorer, corpus_bleu
from cascade.evaluation.tasks import Family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from cascade.evaluation.client import Answerer
    from cascade.evaluation.grid import Setting
    from cascade.evaluation.workloads import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where an evaluation goes, and how."""

    folder: Path  # keeps each finished setting at once; a run that was cut goes on
    seed: int = 0  # of the answers
    concurrency: int = 32  # answers under way at once

    def store(self, workload: Workload, answerer: Answerer) -> Store:
        """Open the folder.

        Raises:
            InvalidMeasurement: It holds another evaluation, or cannot be written.
        """
        manifest = {
            "workload": workload.digest,
            "answered_by": answerer.name,
            "seed": self.seed,
        }
        return Store(self.folder, manifest=manifest)


async def evaluate(
    workload: Workload,
    settings: Sequence[Setting],
    answerer: Answerer,
    *,
    run: Run,
    told: Callable[[], object] = lambda: None,
) -> Results:
    """Measure every setting that the folder lacks and return the results of all.

    Args:
        workload: What is asked.
        settings: How; those of an earlier run in the folder need not be among them.
        answerer: Who answers.
        run: Where to, and how.
        told: Called after each answer.

    Raises:
        InvalidMeasurement: The folder holds another evaluation, or the server refuses a setting.
        CascadeError: An answer failed.
    """
    store = run.store(workload, answerer)
    costs = store.read_costs()
    if costs is None:
        costs = asdict(await measure_costs(workload, settings, answerer, seed=run.seed))
        store.write_costs(costs)
    await measure(
        workload,
        settings,
        answerer,
        store=store,
        seed=run.seed,
        concurrency=run.concurrency,
        told=told,
    )
    about = {
        "workload": workload.name,
        "digest": workload.digest,
        "items": {name: _count(workload, name) for name in workload.families},
        "answered_by": answerer.name,
        "seed": run.seed,
        "concurrency": run.concurrency,
        "costs": costs,
        "provenance": asdict(provenance()),
    }
    return gather(workload, settings, store=store, costs=Costs(**costs), about=about)


def unfinished(
    workload: Workload, settings: Sequence[Setting], answerer: Answerer, *, run: Run
) -> int:
    """Return how many answers are still to be given; raises as `evaluate` does."""
    store = run.store(workload, answerer)
    return len(workload.items) * sum(not store.finished(setting) for setting in settings)


def gather(
    workload: Workload,
    settings: Sequence[Setting],
    *,
    store: Store,
    costs: Costs,
    about: Mapping[str, Any],
) -> Results:
    """Return the results of finished settings."""
    return Results(
        about=about,
        families=tuple(item.family for item in workload.items),
        cells=tuple(
            _cell(workload, setting, store.read(setting), costs=costs) for setting in settings
        ),
    )


def write(results: Results, folder: Path) -> list[Path]:
    """Write `results.json`, the plots, `tables.md` and `report.html`; return the files."""
    path = folder / "results.json"
    save(results, path, figures=report.figures(results))
    drawn = report.draw(results, folder)
    return [path, *drawn, *report.write(results, folder, plots=drawn)]


def _cell(workload: Workload, setting: Setting, records: Sequence[Record], *, costs: Costs) -> Cell:
    columns = {
        name: np.array([getattr(record.counts, name) for record in records], dtype=float)
        for name in COLUMNS
    }
    columns["modelled_s"] = np.array(
        [
            costs.latency_s(
                setting,
                drafter_passes=record.counts.drafter_passes,
                expert_passes=record.counts.expert_passes,
            )
            for record in records
        ]
    )
    if np.isnan(columns["bleu"]).all():
        del columns["bleu"]
    return Cell(setting=setting, columns=columns, corpus_bleu=_bleu(workload, records))


def _bleu(workload: Workload, records: Sequence[Record]) -> dict[str, float]:
    """Return the BLEU of each family that has one as a corpus."""
    found: dict[str, float] = {}
    for family in workload.families:
        pairs = [
            (record.text, item.references)
            for record, item in zip(records, workload.items, strict=True)
            if item.family == family
            and (family == Family.TRANSLATION or item.scorer is Scorer.BLEU)
        ]
        if pairs:
            texts, references = zip(*pairs, strict=True)
            found[family] = corpus_bleu(texts, references)
    return found


def _count(workload: Workload, family: str) -> int:
    return sum(item.family == family for item in workload.items)
