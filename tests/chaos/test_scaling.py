"""Each tier grows and shrinks with its own load alone; draws the replicas over time."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from matplotlib.figure import Figure
from tests.chaos.checks import wait_until_free
from tests.chaos.cluster import config, wait_until
from tests.chaos.faults import lower_priority
from tests.chaos.load import greedy, streams

from cascade.evaluation.tasks import TaskFamily, held_out

if TYPE_CHECKING:
    from collections.abc import Sequence

    from tests.chaos.cluster import ChaosCluster
    from tests.chaos.load import Body, Clients
    from tests.chaos.report import Report

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(2400)]

MOST = 3  # replicas of a tier
GROWTH_TIMEOUT_S = 600.0
SCALING: dict[str, Any] = {
    "min_replicas": 1,
    "max_replicas": MOST,
    "upscale_delay_s": 3,
    "downscale_delay_s": 10,
    "look_back_period_s": 6,
    "metrics_interval_s": 1,
}
# A drafter holds few sessions, as on a small GPU; an expert prefills in small passes. Queue waits
# are not used: on shared cores the work of one tier makes the other wait.
DRAFTER = {
    "scaling": SCALING | {"wait_s": 0, "sessions": 0.75},
    "deployment": {"max_ongoing_requests": 12},
}
EXPERT = {
    "scaling": SCALING | {"wait_s": 0, "backlog": 1.0},
    "engine": {"max_step_tokens": 256, "deterministic": False},
}
COLOURS = {"Drafter": "tab:orange", "Expert": "tab:blue"}


@dataclass(frozen=True, kw_only=True)
class Load:
    """Streams of one kind of request, and the tier that they should make grow."""

    name: str
    grows: str
    streams: int
    bodies: Sequence[Body]


@dataclass(kw_only=True)
class Watch:
    """The replicas of both tiers over time, and the load meanwhile."""

    cluster: ChaosCluster
    began_s: float = field(default_factory=time.monotonic)
    times_s: list[float] = field(default_factory=list[float])
    counts: dict[str, list[int]] = field(default_factory=lambda: {"Drafter": [], "Expert": []})
    loads: list[tuple[str, float, float]] = field(default_factory=list[tuple[str, float, float]])

    @property
    def now_s(self) -> float:
        return time.monotonic() - self.began_s

    async def run(self) -> None:
        """Count every second until cancelled."""
        while True:
            for name, counts in self.counts.items():
                counts.append(len(await self.cluster.replicas(name)))
            self.times_s.append(self.now_s)
            await asyncio.sleep(1)

    def most_during(self, load: str) -> dict[str, int]:
        """Return the most replicas of each tier during a load."""
        (begin_s, end_s) = next((begin, end) for name, begin, end in self.loads if name == load)
        return {
            name: max(
                count
                for at_s, count in zip(self.times_s, counts, strict=True)
                if begin_s <= at_s <= end_s
            )
            for name, counts in self.counts.items()
        }

    def draw(self, path: Path) -> None:
        """Write the plot; creates its folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        axes = figure.subplots()
        for name, counts in self.counts.items():
            offset = 0.03 if name == "Expert" else -0.03  # keeps both lines visible
            shifted = [count + offset for count in counts]
            axes.step(self.times_s, shifted, where="post", label=name, color=COLOURS[name])
        for load, begin_s, end_s in self.loads:
            axes.axvspan(begin_s, end_s, color="0.93")
            axes.text((begin_s + end_s) / 2, MOST + 0.3, load, ha="center", fontsize=9)
        axes.set(xlabel="seconds", ylabel="running replicas", ylim=(0, MOST + 0.6))
        axes.set_yticks(range(MOST + 1))
        axes.legend(loc="lower right", ncols=2)
        figure.savefig(path, dpi=120)


def long_drafts() -> Load:
    """Return requests that are drafted in long blocks."""
    prompts = [item.prompt for item in held_out(TaskFamily.FACTS, count=12)]
    cascade = {"mode": "speculative", "draft_tokens": 16}
    bodies = [greedy(prompt, tokens=128, cascade=cascade) for prompt in prompts]
    return Load(name="long drafts", grows="Drafter", streams=24, bodies=bodies)


def long_prompts() -> Load:
    """Return long prompts with one-token answers; no two share a prefix."""
    passages = " ".join(item.prompt for item in held_out(TaskFamily.PASSAGES, count=12))
    cascade = {"mode": "speculative"}
    bodies = [
        greedy(f"{number}. {passages}"[:1800], tokens=1, cascade=cascade) for number in range(5000)
    ]
    return Load(name="long prompts", grows="Expert", streams=6, bodies=bodies)


async def while_loaded(watch: Watch, clients: Clients, load: Load) -> None:
    """Keep up a load until its tier has grown to the maximum, and a while longer."""

    async def grown() -> bool:
        return len(await watch.cluster.replicas(load.grows)) == MOST

    lower_priority(await watch.cluster.replicas())
    begin_s = watch.now_s
    async with streams(clients, load.bodies, count=load.streams) as answers:
        await wait_until(
            grown, f"the {load.grows} tier to grow", timeout_s=GROWTH_TIMEOUT_S, every_s=1
        )
        await asyncio.sleep(10)
        end_s = watch.now_s
    watch.loads.append((load.name, begin_s, end_s))
    assert all(one.done for one in answers), [one.error for one in answers if not one.done]


async def shrunk(cluster: ChaosCluster) -> None:
    async def one_each() -> bool:
        counts = [len(await cluster.replicas(name)) for name in ("Drafter", "Expert")]
        return counts == [1, 1]

    await wait_until(one_each, "both tiers to shrink", timeout_s=GROWTH_TIMEOUT_S, every_s=1)


async def test_each_tier_scales_with_its_own_load(
    cluster: ChaosCluster, clients: Clients, report: Report, tmp_path: Path
) -> None:
    args = {"drafter": DRAFTER, "expert": EXPERT}
    await cluster.deploy(config(http=cluster.http, counts={"Router": 1}, args=args))
    watch = Watch(cluster=cluster)
    watching = asyncio.create_task(watch.run())
    try:
        await asyncio.sleep(5)
        for load in (long_drafts(), long_prompts()):
            await while_loaded(watch, clients, load)
            await shrunk(cluster)
    finally:
        watching.cancel()
    watch.draw(Path(os.environ.get("CHAOS_REPORT", tmp_path)) / "scaling.png")
    for load in ("long drafts", "long prompts"):
        for name, most in watch.most_during(load).items():
            report.add("scaling", f"most {name} replicas under {load}", most)
    assert watch.most_during("long drafts") == {"Drafter": MOST, "Expert": 1}
    assert watch.most_during("long prompts") == {"Drafter": 1, "Expert": MOST}
    await wait_until_free(cluster)
