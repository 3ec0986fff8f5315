"""How many replicas a tier needs, from what its replicas tell of their own load.

Each tier follows its own demand: a drafter's queue wait, an expert's backlog of tokens and its
cache, and of both the sessions they hold. A busy engine alone asks for no second one, because
batches are what engines are for: it only keeps a tier from shrinking. Serve applies the bounds, the
delays and the cold start from zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from cascade.replica.metrics import Load

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray.serve.config import AutoscalingContext

TOLERANCE = 0.15  # share of a target by which a replica may exceed it

FASTEST = 2.0  # growth in one decision: a queue's length says little of how much is too much


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The load that one replica should have; a zero means that it does not matter.

    `wait_s` is in seconds, `backlog` in passes, `busy` and `cache` are shares, `sessions` a number.
    """

    wait_s: float = 0.0
    backlog: float = 0.0
    cache: float = 0.0
    busy: float = 0.0
    sessions: float = 0.0


def wanted(loads: Sequence[Load], *, replicas: int, sessions: float, targets: Targets) -> int:
    """Return the least number of replicas that exceed no target by more than the tolerance.

    Args:
        loads: Of the replicas that have reported.
        replicas: How many there are to be now; one that has not reported is starting.
        sessions: Held by them, or waiting for one of them.
        targets: What each should bear.

    Returns:
        0 without sessions, else at least 1; never fewer while some start, for whoever asked for
        them may be asking again.
    """
    count = _count(loads, sessions=sessions, targets=targets) if sessions > 0 else 0
    return count if len(loads) >= replicas else max(count, replicas)


def _count(loads: Sequence[Load], *, sessions: float, targets: Targets) -> int:
    busy = _over([load.busy for load in loads], targets.busy)
    spread = max(min(_pressure(loads, targets), FASTEST), min(busy, 1 + TOLERANCE))
    need = max(len(loads) * spread, _over([sessions], targets.sessions))
    return max(1, math.ceil(need / (1 + TOLERANCE) - 1e-9))


def _pressure(loads: Sequence[Load], targets: Targets) -> float:
    """Return the largest of the mean loads that more replicas relieve, by its target."""
    return max(
        _over([load.wait_s for load in loads], targets.wait_s),
        _over([load.backlog for load in loads], targets.backlog),
        _over([load.cache for load in loads], targets.cache),
    )


def _over(values: Sequence[float], target: float) -> float:
    """Return the mean of the values by their target; 0 without either."""
    return math.fsum(values) / len(values) / target if values and target else 0.0


class TierPolicy:
    """The policy of one tier, as Serve's `AutoscalingConfig` names it; runs in Serve's controller.

    Raises:
        TypeError: A keyword is no target.
    """

    def __init__(self, **targets: float) -> None:
        self._targets = Targets(**targets)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return how many replicas are wanted, and no state."""
        count = wanted(
            loads_of(ctx.aggregated_metrics or {}),
            replicas=ctx.target_num_replicas,
            sessions=ctx.total_num_requests,
            targets=self._targets,
        )
        return count, {}


def loads_of(metrics: Mapping[str, Mapping[Any, float]]) -> list[Load]:
    """Return the load of each replica that reported all of it; `metrics` is by name and replica."""
    names = [field.name for field in fields(Load)]
    reported = [set(metrics.get(name, {})) for name in names]
    return [
        Load(**{name: metrics[name][replica] for name in names})
        for replica in set[Any].intersection(*reported)
    ]
