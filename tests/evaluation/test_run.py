from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest

from cascade.errors import InvalidMeasurement, Unavailable
from cascade.evaluation.client import Answer
from cascade.evaluation.grid import Block, Setting, joined
from cascade.evaluation.records import Record, Store, counts
from cascade.evaluation.run import Costs, alternating, measure, measure_costs, use
from cascade.evaluation.workloads import Workload, load
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascade.evaluation.client import InProcess

ANSWER = Answer(
    text="", finish="stop", prompt_tokens=3, completion_tokens=10, latency_s=1, ttft_s=0.5,
    statistics={
        "drafted": 12, "judged": 8, "accepted": 6, "deferred": 3, "expert_tokens": 4,
        "drafter_passes": 12, "expert_passes": 3, "rounds": 3, "kept_tokens": 1,
        "sent_bytes": 100, "received_bytes": 50,
    },
)  # fmt: skip

SETTINGS = joined([Block(temperatures=[1.0], curves={"chow": [0.3], "sequence_cascade": [-0.1]})])


def setting(mode: Mode) -> Setting:
    curve = {Mode.CASCADE: "chow", Mode.SPECULATIVE: "lossless"}.get(mode, mode.value)
    return Setting(curve=curve, dial=0.5, temperature=0)


@pytest.mark.parametrize(
    ("mode", "offered", "rejected"),
    [
        (Mode.CASCADE, 8, 2),
        (Mode.SPECULATIVE, 8, 2),
        (Mode.TOKEN_CASCADE, 10, 4),
        (Mode.SEQUENCE_CASCADE, 12, 12),
        (Mode.DRAFTER_ONLY, 10, 0),
        (Mode.EXPERT_ONLY, 10, 10),
    ],
)
def test_what_counts_as_offered_and_rejected_in_each_mode(
    mode: Mode, offered: int, rejected: int
) -> None:
    found = counts(ANSWER, setting(mode), quality=1)
    assert (found.offered, found.rejected) == (offered, rejected)
    assert (found.bytes, found.tokens, found.expert_passes) == (150, 10, 3)


def test_a_sequence_cascade_that_keeps_its_draft_rejects_nothing() -> None:
    kept = replace(ANSWER, statistics=ANSWER.statistics | {"expert_tokens": 0})
    assert counts(kept, setting(Mode.SEQUENCE_CASCADE), quality=1).rejected == 0


def test_a_server_that_tells_no_statistics_counts_as_none() -> None:
    silent = replace(ANSWER, statistics={})
    assert counts(silent, setting(Mode.CASCADE), quality=0).offered == 0


def test_families_take_turns() -> None:
    workload = load("families", count=2)
    order = [workload.items[number].family for number in alternating(workload.items)]
    assert order == [*workload.families, *workload.families]


class Counting:
    """Answers with what it is told to and notes what it was asked."""

    name = "counting"

    def __init__(self, *, failing: int | None = None) -> None:
        self.asked: list[Mapping[str, Any]] = []
        self.failing = failing

    async def answer(self, body: Mapping[str, Any]) -> Answer:
        self.asked.append(body)
        if len(self.asked) == self.failing:
            raise Unavailable("gone")
        return ANSWER


def workload(count: int) -> Workload:
    return load("facts", count=count)


async def test_each_item_meets_each_setting_with_a_seed_of_its_own(tmp_path: Path) -> None:
    answerer, store = Counting(), Store(tmp_path, manifest={})
    await measure(workload(4), SETTINGS, answerer, store=store, seed=7, concurrency=3)
    assert len(answerer.asked) == 4 * len(SETTINGS)
    assert {asked["seed"] for asked in answerer.asked} == {7, 8, 9, 10}
    assert all(store.finished(one) for one in SETTINGS)
    assert [record.item for record in store.read(SETTINGS[0])] == [
        item.name for item in workload(4).items
    ]


async def test_a_run_that_was_cut_goes_on_where_it_was(tmp_path: Path) -> None:
    store = Store(tmp_path, manifest={"seed": 1})
    with pytest.raises(Unavailable, match="gone"):
        await measure(workload(4), SETTINGS, Counting(failing=9), store=store, concurrency=1)
    finished = [one for one in SETTINGS if store.finished(one)]
    assert finished == SETTINGS[:2]
    again = Counting()
    await measure(workload(4), SETTINGS, again, store=Store(tmp_path, manifest={"seed": 1}))
    assert len(again.asked) == 4 * (len(SETTINGS) - 2)


def test_a_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, manifest={"workload": "one"})
    with pytest.raises(InvalidMeasurement, match=r"workload was 'one', is 'two'.*--out"):
        Store(tmp_path, manifest={"workload": "two"})


def test_records_survive_the_store(tmp_path: Path) -> None:
    store = Store(tmp_path, manifest={})
    records = [Record(item="a/1", text="né", counts=counts(ANSWER, SETTINGS[0], quality=0.5))]
    store.write(SETTINGS[0], records)
    assert store.read(SETTINGS[0]) == records


def test_modelled_latency_is_passes_times_their_cost() -> None:
    costs = Costs(
        drafter_s={"drafter_only": 0.1, "speculative 5": 0.2},
        expert_s={"expert_only": 1.0, "speculative 5": 2.0},
    )
    block = Setting(curve="chow", dial=0.1, temperature=0, draft_tokens=5)
    assert use(block) == "speculative 5"
    assert costs.latency_s(block, drafter_passes=5, expert_passes=2) == pytest.approx(5.0)
    whole = Setting(curve="sequence_cascade", dial=-1, temperature=0)
    assert costs.latency_s(whole, drafter_passes=5, expert_passes=2) == pytest.approx(2.5)


async def test_costs_of_passes_are_measured_for_every_use(shipped: InProcess) -> None:
    costs = await measure_costs(workload(1), SETTINGS, shipped)
    assert {"expert_only", "speculative 5"} <= set(costs.expert_s)
    assert set(costs.drafter_s) == {"drafter_only", "token_cascade", "speculative 5"}
    assert all(cost > 0 for found in asdict(costs).values() for cost in found.values())
