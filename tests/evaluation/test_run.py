from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cascade.errors import InvalidMeasurement, Unavailable
from cascade.evaluation.client import CompletionResult
from cascade.evaluation.grid import GridBlock, Setting, merge_blocks
from cascade.evaluation.records import Record, Store, count
from cascade.evaluation.run import (
    ANSWERS,
    Costs,
    Run,
    interleave_families,
    pass_kind,
    run_settings,
)
from cascade.evaluation.scoring import Score
from cascade.evaluation.structured import ToolCall
from cascade.evaluation.workloads import Workload, load
from cascade.types import Mode

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ANSWER = CompletionResult(
    text="", finish_reason="stop", prompt_tokens=3, completion_tokens=10, latency_s=1, ttft_s=0.5,
    statistics={
        "drafted": 12, "judged": 8, "accepted": 6, "deferred": 3, "expert_tokens": 4,
        "drafter_passes": 12, "expert_passes": 3, "rounds": 3, "kept_tokens": 1,
        "sent_bytes": 100, "received_bytes": 50,
    },
)  # fmt: skip

SETTINGS = merge_blocks(
    [GridBlock(temperatures=[1.0], curves={"chow": [0.3], "sequence_cascade": [-0.1]})]
)


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
def test_each_mode_has_its_own_count_of_offered_and_rejected(
    mode: Mode, offered: int, rejected: int
) -> None:
    found = count(ANSWER, setting(mode), Score(quality=1))
    assert (found.offered, found.rejected) == (offered, rejected)
    assert (found.bytes, found.tokens, found.expert_passes) == (150, 10, 3)


def test_a_sequence_cascade_that_keeps_its_draft_rejects_no_token() -> None:
    kept = replace(ANSWER, statistics=ANSWER.statistics | {"expert_tokens": 0})
    assert count(kept, setting(Mode.SEQUENCE_CASCADE), Score(quality=1)).rejected == 0


def test_without_statistics_all_counts_are_zero() -> None:
    silent = replace(ANSWER, statistics={})
    assert count(silent, setting(Mode.CASCADE), Score(quality=0)).offered == 0


def test_families_take_turns() -> None:
    workload = load("families", count=2)
    order = [workload.items[number].family for number in interleave_families(workload.items)]
    assert order == [*workload.families, *workload.families]


class RecordingClient:
    """Returns one answer to every request and records the requests."""

    name = "recording"

    def __init__(self, *, failing: int | None = None) -> None:
        self.bodies: list[Mapping[str, Any]] = []
        self.failing = failing

    async def complete(self, body: Mapping[str, Any]) -> CompletionResult:
        self.bodies.append(body)
        if len(self.bodies) == self.failing:
            raise Unavailable("gone")
        return ANSWER


def workload(count: int) -> Workload:
    return load("facts", count=count)


async def test_each_item_is_asked_under_each_setting_with_its_own_seed(tmp_path: Path) -> None:
    client, store = RecordingClient(), Store(tmp_path, manifest={})
    run = Run(folder=tmp_path, seed=7, concurrency=3)
    await run_settings(workload(4), SETTINGS, client, store=store, run=run)
    assert len(client.bodies) == 4 * len(SETTINGS)
    assert {body["seed"] for body in client.bodies} == {7, 8, 9, 10}
    assert all(store.is_finished(one) for one in SETTINGS)
    assert [record.item for record in store.read(SETTINGS[0])] == [
        item.name for item in workload(4).items
    ]


async def test_a_failed_run_resumes_after_its_finished_settings(tmp_path: Path) -> None:
    store, run = Store(tmp_path, manifest={"seed": 1}), Run(folder=tmp_path, concurrency=1)
    with pytest.raises(Unavailable, match="gone"):
        await run_settings(workload(4), SETTINGS, RecordingClient(failing=9), store=store, run=run)
    finished = [one for one in SETTINGS if store.is_finished(one)]
    assert finished == SETTINGS[:2]
    again = RecordingClient()
    store = Store(tmp_path, manifest={"seed": 1})
    progress: list[tuple[str, int, int]] = []
    await run_settings(
        workload(4), SETTINGS, again, store=store, run=run,
        on_progress=lambda stage, done, total: progress.append((stage, done, total)),
    )  # fmt: skip
    left = 4 * (len(SETTINGS) - 2)
    assert progress == [(ANSWERS, done, left) for done in range(left + 1)]
    assert len(again.bodies) == 4 * (len(SETTINGS) - 2)


def test_a_folder_of_another_evaluation_is_refused(tmp_path: Path) -> None:
    Store(tmp_path, manifest={"workload": "one"})
    with pytest.raises(InvalidMeasurement, match=r"workload was 'one', is 'two'.*--out"):
        Store(tmp_path, manifest={"workload": "two"})


def test_records_are_the_same_after_storing_and_reading(tmp_path: Path) -> None:
    store = Store(tmp_path, manifest={})
    calls = (ToolCall("add", "{}"),)
    records = [
        Record(
            item="a/1",
            text="né",
            calls=calls,
            counts=count(ANSWER, SETTINGS[0], Score(quality=0.5)),
        )
    ]
    store.write(SETTINGS[0], records)
    assert store.read(SETTINGS[0]) == records


def test_modelled_latency_is_passes_times_their_cost() -> None:
    costs = Costs(
        drafter_s={"drafter_only": 0.1, "speculative 5": 0.2},
        expert_s={"expert_only": 1.0, "speculative 5": 2.0},
    )
    block = Setting(curve="chow", dial=0.1, temperature=0, draft_tokens=5)
    assert pass_kind(block) == "speculative 5"
    assert costs.latency_s(block, drafter_passes=5, expert_passes=2) == pytest.approx(5.0)
    whole = Setting(curve="sequence_cascade", dial=-1, temperature=0)
    assert costs.latency_s(whole, drafter_passes=5, expert_passes=2) == pytest.approx(2.5)
