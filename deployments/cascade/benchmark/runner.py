"""Compares systems: interleaved rounds, medians and paired ratios.

The speed of a machine drifts, so systems take turns: every round runs each of them once over the
same requests, in an order that rotates. A metric is the median over rounds. A ratio is the median
of the ratios within rounds, so what slows down a whole round cancels. A warm-up is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from statistics import median
from typing import TYPE_CHECKING, Any, TypeAlias

from cascade.benchmark.load import ClosedLoop, run_load
from cascade.benchmark.metrics import RunMetrics, summarize
from cascade.benchmark.systems import Role
from cascade.errors import InvalidMeasurement
from cascade.evaluation.client import CompletionResult

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cascade.benchmark.load import Load
    from cascade.benchmark.metrics import Slo
    from cascade.benchmark.systems import System

Json: TypeAlias = dict[str, Any]

RoundProbe: TypeAlias = "Callable[[Mapping[str, RunMetrics]], float]"


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemResult:
    """The rounds of one system, and its texts in the last round."""

    rounds: tuple[RunMetrics, ...]
    texts: tuple[str | None, ...]  # None where a request failed
    role: Role = Role.OTHER

    @property
    def median(self) -> RunMetrics:
        """Return the median of each metric over rounds; counts are those of the last round."""
        columns = {
            field.name: [getattr(one, field.name) for one in self.rounds]
            for field in fields(RunMetrics)
        }
        return RunMetrics(**{name: _median(values) for name, values in columns.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """Tokens per second of one system over another's, paired by round."""

    median: float
    least: float
    most: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """The results of all systems by name; texts are compared with those of the first."""

    systems: Mapping[str, SystemResult]
    probed: tuple[float, ...] = ()  # what the probe returned after each round
    notes: tuple[str, ...] = ()  # of the systems

    @property
    def baseline(self) -> str:
        """Return the fastest system that runs the expert alone, or the first if none does."""
        return self.fastest(Role.EXPERT_ALONE) or next(iter(self.systems))

    def fastest(self, role: Role) -> str | None:
        """Return the fastest system of a role, if there is one."""
        speeds = {
            name: system.median.tokens_per_s
            for name, system in self.systems.items()
            if system.role is role
        }
        return max(speeds, key=speeds.__getitem__) if speeds else None

    def ratio(self, name: str, over: str) -> Ratio:
        """Return the tokens per second of system `name` over those of system `over`."""
        pairs = zip(self.systems[name].rounds, self.systems[over].rounds, strict=True)
        ratios = [one.tokens_per_s / other.tokens_per_s for one, other in pairs]
        return Ratio(median=median(ratios), least=min(ratios), most=max(ratios))

    def differences(self, name: str, other: str) -> list[int]:
        """Return the numbers of the requests to which two systems gave different texts."""
        pairs = zip(self.systems[name].texts, self.systems[other].texts, strict=True)
        return [number for number, (one, two) in enumerate(pairs) if one != two]


async def compare(  # noqa: PLR0913 - each is one part of a comparison
    systems: Sequence[System],
    bodies: Sequence[Json],
    load: Load,
    *,
    rounds: int,
    slo: Slo | None = None,
    probe: RoundProbe | None = None,
    progress: Callable[[str], object] = lambda _: None,
) -> Comparison:
    """Let all systems answer all requests in every round.

    Args:
        systems: What to compare; names must differ.
        bodies: Request bodies.
        load: When requests start.
        rounds: Number of rounds after the warm-up.
        slo: Which answers count as good.
        probe: Measures something else at the end of every round, from that round's metrics by
            system, so that the two can be paired.
        progress: Called with a line after each run.

    Raises:
        InvalidMeasurement: Every request to a system failed, or one was refused.
    """
    if len({system.name for system in systems}) < len(systems):
        raise InvalidMeasurement("two systems have the same name; give each its own")
    warm_up = load if isinstance(load, ClosedLoop) else ClosedLoop()
    for system in systems:
        progress(f"{system.name}: warming up")
        await run_load(system.client, _requests(system, bodies[: 2 * warm_up.concurrency]), warm_up)
    metrics: dict[str, list[RunMetrics]] = {system.name: [] for system in systems}
    texts: dict[str, tuple[str | None, ...]] = {}
    probed: list[float] = []
    for number in range(rounds):
        first = number % len(systems)
        for system in (*systems[first:], *systems[:first]):
            before_s = system.busy_s()
            run = await run_load(system.client, _requests(system, bodies), load)
            busy_s = {tier: spent_s - before_s[tier] for tier, spent_s in system.busy_s().items()}
            found = summarize(run, slo=slo, busy_s=busy_s)
            metrics[system.name].append(found)
            texts[system.name] = tuple(
                result.text if isinstance(result, CompletionResult) else None
                for result in run.results
            )
            progress(f"{system.name}: round {number + 1}, {found.tokens_per_s:.1f} tokens/s")
        if probe is not None:
            probed.append(probe({name: done[-1] for name, done in metrics.items()}))
    results = {
        system.name: SystemResult(
            rounds=tuple(metrics[system.name]), texts=texts[system.name], role=system.role
        )
        for system in systems
    }
    notes = tuple(dict.fromkeys(system.note for system in systems if system.note))
    return Comparison(systems=results, probed=tuple(probed), notes=notes)


def _requests(system: System, bodies: Sequence[Json]) -> list[Json]:
    bodies = [{**body, **system.fields} for body in bodies]
    if not system.options:
        return bodies
    return [{**body, "cascade": body.get("cascade", {}) | system.options} for body in bodies]


def _median(values: Sequence[Any]) -> Any:
    match values[-1]:
        case dict() as last:
            return {key: _median([value[key] for value in values if key in value]) for key in last}
        case float():
            return median(value for value in values if value is not None)
        case last:
            return last
