"""From the words of the command line to a comparison of systems."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from tests.support.benchmarks import PATIENT

from cascade.benchmark.load import ClosedLoop
from cascade.benchmark.plan import Plan, held_out_requests, parse_variant, run_plan
from cascade.benchmark.systems import one_process, separate_processes
from cascade.benchmark.transformers_baselines import Assistance
from cascade.errors import InvalidMeasurement
from cascade.evaluation.tasks import Level, TaskFamily

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.settings import Application


def plan(**changes: Any) -> Plan:
    plain: dict[str, Any] = {
        "settings": PATIENT,
        "bodies": held_out_requests(count=1, levels=[Level.EASY])[:2],
        "load": ClosedLoop(concurrency=2),
        "rounds": 1,
    }
    return Plan(**(plain | changes))


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("expert_only", {"mode": "expert_only"}),
        ("lossless", {"mode": "speculative", "rule": {"kind": "lossless"}, "draft_tokens": "auto"}),
        ("lossless@0", {"mode": "speculative", "rule": {"kind": "lossless"}, "draft_tokens": 0}),
        (
            "token_v3:0.9@4",
            {"mode": "cascade", "rule": {"kind": "token_v3", "alpha": 0.9}, "draft_tokens": 4},
        ),
        ("token_cascade:0.6", {"mode": "token_cascade", "rule": {"kind": "chow", "alpha": 0.6}}),
    ],
)
def test_a_variant_is_parsed(text: str, options: dict[str, Any]) -> None:
    assert parse_variant(text) == {"coupling": "maximal", **options}


@pytest.mark.parametrize("text", ["warp", "token_v3:high", "lossless@many", "token_v3:7", ""])
def test_an_invalid_variant_is_refused(text: str) -> None:
    with pytest.raises(InvalidMeasurement):
        parse_variant(text)


def test_held_out_requests_alternate_between_families() -> None:
    requests = held_out_requests(count=2, levels=[Level.HARD])
    assert len(requests) == 8
    assert all(body["temperature"] == 0 for body in requests)
    assert len({body["messages"][0]["content"] for body in requests}) == 8


def test_more_items_than_a_family_has_are_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="too small"):
        held_out_requests(count=10**6, levels=[Level.EASY], families=[TaskFamily.FACTS])


async def test_variants_and_baselines_give_the_same_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the assisted schedules, the fastest is compared. No system keeps earlier prompts."""
    started: list[Application] = []

    def start(settings: Application, rtts_ms: Sequence[float]) -> Any:
        started.append(settings)
        return one_process(settings, rtts_ms)

    schedules = (Assistance(tokens=2), Assistance(tokens=8, confidence=0.4))
    monkeypatch.setattr("cascade.benchmark.transformers_baselines.ASSISTANCE", schedules)
    planned = plan(
        variants=("expert_only", "lossless@3"),
        deployments=(start,),
        rtts_ms=(4.0,),
        baselines=("assisted", "batched"),
    )
    comparison = await run_plan(planned)
    names = list(comparison.systems)
    assisted = names.pop(2)
    assert names == ["expert_only, 4 ms", "lossless@3, 4 ms", "transformers batched"]
    assert assisted in {f"transformers assisted ({schedule})" for schedule in schedules}
    assert not any(comparison.differences(name, names[0]) for name in (*names, assisted))
    found = comparison.systems["lossless@3, 4 ms"].median
    assert found.busy.keys() == {"drafter", "expert"}
    assert found.acceptance is not None
    assert comparison.baseline in {"expert_only, 4 ms", "transformers batched"}
    (settings,) = started
    assert not any(tier.engine.prefix_reuse for tier in (settings.drafter, settings.expert))
    assert "KV cache of an earlier request" in comparison.notes[0]


@pytest.mark.slow
async def test_deployments_and_all_baselines_give_the_same_texts() -> None:
    """Slow: it starts two processes and each baseline, which other tests check one by one."""
    comparison = await run_plan(
        plan(
            variants=("expert_only", "lossless@3"),
            deployments=(one_process, separate_processes),
            rtts_ms=(4.0,),
            baselines=("batched", "continuous"),
        )
    )
    names = list(comparison.systems)
    assert names == [
        "expert_only, 4 ms", "lossless@3, 4 ms", "expert_only, apart, 4 ms",
        "lossless@3, apart, 4 ms", "transformers batched", "transformers continuous batching",
    ]  # fmt: skip
    assert not any(comparison.differences(name, names[0]) for name in names)
    assert comparison.systems["lossless@3, apart, 4 ms"].median.busy["expert"] > 0


async def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(InvalidMeasurement, match="no peer 'telepathy'"):
        await run_plan(plan(variants=(), baselines=("telepathy",)))
