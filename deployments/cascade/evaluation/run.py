"""Runs an evaluation: answers every item under every setting, scores, gathers and reports.

Settings run without a pause between them: the first items of the next setting start while the last
of the previous one are still being answered, so the engines' batches stay full.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np

from cascade.evaluation import plots, report
from cascade.evaluation.client import request_body
from cascade.evaluation.compare import MARGIN
from cascade.evaluation.environment import provenance
from cascade.evaluation.grid import DRAFTER, EXPERT, LOSSLESS, TOKEN_CASCADE, Setting
from cascade.evaluation.records import COLUMNS, OPTIONAL, Record, Store, count
from cascade.evaluation.results import Cell, Results, save
from cascade.evaluation.scoring import Score, corpus_bleu, score, sentence_bleu
from cascade.evaluation.structured import score_calls, score_json
from cascade.evaluation.tasks import Scorer, TaskFamily
from cascade.types import FinishReason

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from cascade.evaluation.client import Client, CompletionResult
    from cascade.evaluation.workloads import Item, Workload

_CONCURRENT_SCORERS = 2

_COST_ITEMS = 12

COSTS = "measuring the cost of a forward pass"
ANSWERS = "answering"
"""What a run does, one after the other."""

OnProgress: TypeAlias = "Callable[[str, int, int], object]"

_SLOW = (Scorer.PROGRAM, Scorer.BLEU)

T = TypeVar("T", float, "NDArray[np.float64]")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """Where an evaluation's files go, and how its requests are sent."""

    folder: Path  # each finished setting is stored at once, so that a run can be resumed
    seed: int = 0  # item `i` is asked with seed + i under every setting
    concurrency: int = 32  # requests in flight

    def open_store(self, workload: Workload, client: Client) -> Store:
        """Open the folder; raises InvalidMeasurement if it holds another evaluation."""
        manifest = {"workload": workload.digest, "answered_by": client.name, "seed": self.seed}
        return Store(self.folder, manifest=manifest)


async def evaluate(
    workload: Workload,
    settings: Sequence[Setting],
    client: Client,
    *,
    run: Run,
    on_progress: OnProgress = lambda _stage, _done, _total: None,
) -> Results:
    """Run every setting that the folder lacks and return the results of all.

    Args:
        workload: What is asked.
        settings: How; settings of an earlier run in the folder need not be among them.
        client: Who answers.
        run: Where to, and how.
        on_progress: Called with what is done, and how much of it so far and in total.

    Raises:
        InvalidMeasurement: The folder holds another evaluation, or the server refuses a setting.
        CascadeError: An answer failed.
    """
    store = run.open_store(workload, client)
    costs = store.read_costs()
    if costs is None:
        costs = asdict(
            await measure_costs(workload, settings, client, seed=run.seed, on_progress=on_progress)
        )
        store.write_costs(costs)
    await run_settings(workload, settings, client, store=store, run=run, on_progress=on_progress)
    return Results(
        about={
            "workload": workload.name,
            "digest": workload.digest,
            "items": dict(Counter(item.family for item in workload.items)),
            "answered_by": client.name,
            "seed": run.seed,
            "concurrency": run.concurrency,
            "costs": costs,
            "provenance": asdict(provenance()),
        },
        families=tuple(item.family for item in workload.items),
        cells=tuple(
            _cell(workload, setting, store.read(setting), costs=Costs(**costs))
            for setting in settings
        ),
    )


def write(results: Results, folder: Path, *, margin: float = MARGIN) -> list[Path]:
    """Write `results.json`, the plots, `tables.md` and `report.html`; return the files."""
    path = folder / "results.json"
    save(results, path, figures=report.estimates(results))
    return [
        path,
        *plots.plot(results, folder),
        *report.write(results, folder, margin=margin),
    ]


async def run_settings(  # noqa: PLR0913 - what, how, by whom, where to
    workload: Workload,
    settings: Sequence[Setting],
    client: Client,
    *,
    store: Store,
    run: Run,
    on_progress: OnProgress = lambda _stage, _done, _total: None,
) -> None:
    """Answer and score every item under every setting that the store lacks.

    Args:
        workload: What is asked.
        settings: How.
        client: Who answers.
        store: Where a setting's records go as soon as all are there.
        run: Seed and concurrency.
        on_progress: As in `evaluate`.

    Raises:
        CascadeError: An item could not be answered; finished settings are kept.
    """
    unfinished = [setting for setting in settings if not store.is_finished(setting)]
    jobs, scores, done = _jobs(workload, unfinished), _Scores(), itertools.count(1)
    total = len(unfinished) * len(workload.items)
    on_progress(ANSWERS, 0, total)

    async def work() -> None:
        for setting, records, number in jobs:
            item = workload.items[number]
            body = request_body(
                item,
                seed=run.seed + number,
                temperature=setting.temperature,
                cascade=setting.options(),
            )
            answer = await client.complete(body)
            counts = count(answer, setting, await scores.of(item, answer))
            records[number] = Record(
                item=item.name, text=answer.text, calls=answer.calls, counts=counts
            )
            if len(records) == len(workload.items):
                store.write(setting, [records[number] for number in range(len(records))])
            on_progress(ANSWERS, next(done), total)

    tasks = [asyncio.ensure_future(work()) for _ in range(run.concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _jobs(
    workload: Workload, settings: Sequence[Setting]
) -> Iterator[tuple[Setting, dict[int, Record], int]]:
    """Yield each item's number under each setting, with the dictionary for its record."""
    order = interleave_families(workload.items)
    for setting in settings:
        records: dict[int, Record] = {}
        for number in order:
            yield setting, records, number


def interleave_families(items: Sequence[Item]) -> list[int]:
    """Return the numbers of the items, one of each family after another."""
    seen: Counter[str] = Counter()
    turns: list[tuple[int, int]] = []
    for number, item in enumerate(items):
        turns.append((seen[item.family], number))
        seen[item.family] += 1
    return [number for _, number in sorted(turns)]


class _Scores:
    """Scores of answers. Slow scorers run in threads, and no answer is scored twice."""

    def __init__(self) -> None:
        self._slots = asyncio.Semaphore(_CONCURRENT_SCORERS)
        self._known: dict[Any, Score] = {}

    async def of(self, item: Item, answer: CompletionResult) -> Score:
        key = item.name, answer.text, answer.calls, answer.finish_reason
        if key not in self._known:
            if item.scorer in _SLOW:
                async with self._slots:
                    self._known[key] = await asyncio.to_thread(_score, item, answer)
            else:
                self._known[key] = _score(item, answer)
        return self._known[key]


def _score(item: Item, answer: CompletionResult) -> Score:
    """Return the score of an answer, for translations with its BLEU too."""
    ended = answer.finish_reason != FinishReason.LENGTH
    if item.schema is not None:
        return score_json(answer.text, item.references, schema=item.schema, ended=ended)
    if item.tools:
        return score_calls(answer.calls, item.references, tools=item.tools, ended=ended)
    quality = score(item.scorer, answer.text, item.references)
    if item.scorer is Scorer.BLEU:
        return Score(quality=quality, bleu=quality)
    bleu = sentence_bleu(answer.text, item.references) if _has_bleu(item) else None
    return Score(quality=quality, bleu=bleu)


def _has_bleu(item: Item) -> bool:
    return item.family == TaskFamily.TRANSLATION or item.scorer is Scorer.BLEU


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one forward pass of each tier, by the kind of pass: `speculative 5`, and so on.

    The modelled latency is passes times these costs: what an answer would take alone on the machine
    if nothing overlapped. It does not depend on what else ran while answers were collected.
    """

    drafter_s: dict[str, float] = field(default_factory=dict[str, float])
    expert_s: dict[str, float] = field(default_factory=dict[str, float])

    def latency_s(self, setting: Setting, *, drafter_passes: T, expert_passes: T) -> T:
        """Return the modelled latency of answers; 0 where a pass was never timed.

        Args:
            setting: How they were asked.
            drafter_passes: Forward passes of the drafter, one number or an array.
            expert_passes: Forward passes of the expert, likewise.
        """
        kind = pass_kind(setting)
        drafter_s = self.drafter_s.get(kind, self.drafter_s.get(DRAFTER, 0.0))
        expert_s = self.expert_s.get(kind, self.expert_s.get(EXPERT, 0.0))
        return drafter_passes * drafter_s + expert_passes * expert_s


def pass_kind(setting: Setting) -> str:
    """Return what the cost of a forward pass depends on."""
    if setting.draft_tokens is not None:
        return f"speculative {setting.draft_tokens}"
    return setting.curve


async def measure_costs(
    workload: Workload,
    settings: Sequence[Setting],
    client: Client,
    *,
    seed: int = 0,
    on_progress: OnProgress = lambda _stage, _done, _total: None,
) -> Costs:
    """Return the median cost of a pass, one request at a time, the kinds of pass taking turns.

    The waits that the router reports are divided by passes: the network between router and tier
    counts, and other load on the machine affects all kinds alike.

    Args:
        workload: What is asked.
        settings: Whose kinds of pass are timed.
        client: Who answers.
        seed: Of each request.
        on_progress: As in `evaluate`.
    """
    lengths = sorted({s.draft_tokens for s in settings if s.draft_tokens is not None})
    probes = [
        Setting(curve=EXPERT, temperature=1.0),
        Setting(curve=DRAFTER, temperature=1.0),
        Setting(curve=TOKEN_CASCADE, dial=0.5, temperature=1.0),
        *(Setting(curve=LOSSLESS, temperature=1.0, draft_tokens=length) for length in lengths),
    ]
    times_s = {tier: defaultdict[str, list[float]](list) for tier in ("drafter", "expert")}
    order = interleave_families(workload.items)[:_COST_ITEMS]
    for turn, number in enumerate([order[0], *order]):
        on_progress(COSTS, turn, len(order) + 1)
        for probe in probes:
            options = probe.options()
            body = request_body(workload.items[number], seed=seed, temperature=1.0, cascade=options)
            statistics = (await client.complete(body)).statistics
            for tier, by_kind in times_s.items():
                passes = statistics.get(f"{tier}_passes", 0)
                if passes and turn:  # the first turn is warm-up
                    by_kind[pass_kind(probe)].append(statistics.get(f"{tier}_s", 0.0) / passes)
    drafter_s, expert_s = (
        {kind: median(times) for kind, times in by_kind.items()} for by_kind in times_s.values()
    )
    return Costs(drafter_s=drafter_s, expert_s=expert_s)


def _cell(workload: Workload, setting: Setting, records: Sequence[Record], *, costs: Costs) -> Cell:
    columns = {
        name: np.array([getattr(record.counts, name) for record in records], dtype=float)
        for name in COLUMNS
    }
    columns["modelled_s"] = costs.latency_s(
        setting,
        drafter_passes=columns["drafter_passes"],
        expert_passes=columns["expert_passes"],
    )
    for name in OPTIONAL:
        if np.isnan(columns[name]).all():
            del columns[name]
    pairs: defaultdict[str, list[tuple[str, tuple[str, ...]]]] = defaultdict(list)
    for record, item in zip(records, workload.items, strict=True):
        if _has_bleu(item):
            pairs[item.family].append((record.text, item.references))
    bleu = {family: corpus_bleu(*zip(*found, strict=True)) for family, found in pairs.items()}
    return Cell(setting=setting, columns=columns, corpus_bleu=bleu)
