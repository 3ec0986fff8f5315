"""Answers every item under every setting, many at once, and keeps what is finished.

Settings follow one another without a pause: while the last items of one are answered, those of the
next have begun, so the engines' batches stay full.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any, Self

from cascade.evaluation.client import body
from cascade.evaluation.grid import DRAFTER, EXPERT, LOSSLESS, TOKEN_CASCADE, Setting
from cascade.evaluation.records import Record, counts
from cascade.evaluation.scoring import Scorer, score, sentence_bleu
from cascade.evaluation.tasks import Family

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from cascade.evaluation.client import Answerer
    from cascade.evaluation.records import Store
    from cascade.evaluation.workloads import Item, Workload

_SCORERS_AT_ONCE = 2

_COST_ITEMS = 12

_SLOW = (Scorer.PROGRAM, Scorer.BLEU)


@dataclass(slots=True, kw_only=True)
class _Cell:
    """A setting on its way."""

    setting: Setting
    records: list[Record | None]
    missing: int


async def measure(  # noqa: PLR0913 - what, how, by whom, where to
    workload: Workload,
    settings: Sequence[Setting],
    answerer: Answerer,
    *,
    store: Store,
    seed: int = 0,
    concurrency: int = 32,
    told: Callable[[], object] = lambda: None,
) -> None:
    """Answer and score every item under every setting that the store lacks.

    Args:
        workload: What is asked.
        settings: How.
        answerer: Who answers.
        store: Where a setting's records go as soon as all are there.
        seed: Item `i` is asked with seed + i under every setting.
        concurrency: Answers under way at once.
        told: Called after each answer.

    Raises:
        CascadeError: An item could not be answered; finished settings are kept.
    """
    jobs = _jobs(workload, [setting for setting in settings if not store.finished(setting)])
    with Judge() as judge:

        async def work() -> None:
            for cell, number in jobs:
                item = workload.items[number]
                asked = body(
                    item,
                    seed=seed + number,
                    temperature=cell.setting.temperature,
                    cascade=cell.setting.options(),
                )
                answer = await answerer.answer(asked)
                quality, bleu = await judge.quality(item, answer.text)
                cell.records[number] = Record(
                    item=item.name,
                    text=answer.text,
                    counts=counts(answer, cell.setting, quality=quality, bleu=bleu),
                )
                _finish(cell, store)
                told()

        await _together([work() for _ in range(concurrency)])


def _jobs(workload: Workload, settings: Sequence[Setting]) -> Iterator[tuple[_Cell, int]]:
    """Yield each item of each setting; items of different families take turns."""
    order = alternating(workload.items)
    for setting in settings:
        size = len(workload.items)
        cell = _Cell(setting=setting, records=[None] * size, missing=size)
        for number in order:
            yield cell, number


def alternating(items: Sequence[Item]) -> list[int]:
    """Return the numbers of the items, one of each family after another."""
    place: dict[str, int] = {}
    turns: list[tuple[int, int]] = []
    for number, item in enumerate(items):
        place[item.family] = place.get(item.family, 0) + 1
        turns.append((place[item.family], number))
    return [number for _, number in sorted(turns)]


def _finish(cell: _Cell, store: Store) -> None:
    cell.missing -= 1
    if not cell.missing:
        store.write(cell.setting, [record for record in cell.records if record is not None])


async def _together(work: Sequence[Any]) -> None:
    """Run all; the first error stops the others and is raised itself."""
    tasks = [asyncio.ensure_future(part) for part in work]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Judge:
    """Scores answers beside the event loop; the same answer to an item is scored once."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_SCORERS_AT_ONCE, thread_name_prefix="score")
        self._known: dict[tuple[str, str], tuple[float, float | None]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    async def quality(self, item: Item, text: str) -> tuple[float, float | None]:
        """Return the quality, and the sentence's BLEU where that is a second figure."""
        key = item.name, text
        if key not in self._known:
            work = partial(qualities, item, text)
            if item.scorer in _SLOW:
                loop = asyncio.get_running_loop()
                self._known[key] = await loop.run_in_executor(self._pool, work)
            else:
                self._known[key] = work()
        return self._known[key]


def qualities(item: Item, text: str) -> tuple[float, float | None]:
    """Return an answer's quality, and its BLEU too for translations."""
    quality = score(item.scorer, text, item.references)
    if item.scorer is Scorer.BLEU:
        return quality, quality
    translation = item.family == Family.TRANSLATION
    return quality, sentence_bleu(text, item.references) if translation else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """Seconds of one pass of each tier, by how the tiers are used: `speculative 5`, and so on.

    A modelled latency is passes times these: what an answer alone on the machine would take, were
    nothing overlapped. It does not depend on what else ran while answers were collected.
    """

    drafter_s: dict[str, float] = field(default_factory=dict[str, float])
    expert_s: dict[str, float] = field(default_factory=dict[str, float])

    def latency_s(self, setting: Setting, *, drafter_passes: int, expert_passes: int) -> float:
        """Return the modelled latency of an answer; 0 where a pass was never timed."""
        return drafter_passes * self._of(self.drafter_s, setting, DRAFTER) + (
            expert_passes * self._of(self.expert_s, setting, EXPERT)
        )

    def _of(self, costs: dict[str, float], setting: Setting, otherwise: str) -> float:
        return costs.get(use(setting), costs.get(otherwise, 0.0))


def use(setting: Setting) -> str:
    """Return how a setting uses the tiers, as far as a pass's cost depends on it."""
    if setting.draft_tokens is not None:
        return f"speculative {setting.draft_tokens}"
    return setting.curve


async def measure_costs(
    workload: Workload, settings: Sequence[Setting], answerer: Answerer, *, seed: int = 0
) -> Costs:
    """Return the median cost of a pass, one request at a time, the uses taking turns.

    The waits that the router reports are divided by passes, so a round trip between router and tier
    counts, and what the machine does beside falls on every use alike.
    """
    lengths = sorted({s.draft_tokens for s in settings if s.draft_tokens is not None})
    probes = [
        Setting(curve=EXPERT, temperature=1.0),
        Setting(curve=DRAFTER, temperature=1.0),
        Setting(curve=TOKEN_CASCADE, dial=0.5, temperature=1.0),
        *(Setting(curve=LOSSLESS, temperature=1.0, draft_tokens=length) for length in lengths),
    ]
    times: dict[tuple[str, str], list[float]] = {}
    order = alternating(workload.items)[:_COST_ITEMS]
    for turn, number in enumerate([order[0], *order]):
        for probe in probes:
            item = workload.items[number]
            asked = body(item, seed=seed, temperature=1.0, cascade=probe.options())
            told = (await answerer.answer(asked)).statistics
            for tier in ("drafter", "expert"):
                passes = told.get(f"{tier}_passes", 0)
                if passes and turn:  # the first turn warms up
                    per_pass_s = told.get(f"{tier}_s", 0.0) / passes
                    times.setdefault((tier, use(probe)), []).append(per_pass_s)
    return Costs(
        drafter_s={of: median(found) for (tier, of), found in times.items() if tier == "drafter"},
        expert_s={of: median(found) for (tier, of), found in times.items() if tier == "expert"},
    )
