"""How many replicas a tier needs, from the load that its replicas report.

Each tier follows its own demand: drafters their queue wait, experts their backlog of tokens and
their KV cache, and both the number of sessions. A busy engine alone never adds a replica, because
engines batch; it only keeps a tier from shrinking. Serve applies the bounds, the delays and the
cold start from zero.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from cascade.replica.metrics import ReplicaLoad

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ray.serve.config import AutoscalingContext

TOLERANCE = 0.15  # share of a target by which a replica may exceed it
MAX_GROWTH = 2.0  # in one decision: the length of a queue does not say how many replicas it needs


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """The load that one replica should have; zero disables a target.

    `wait_s` is in seconds, `backlog` in passes, `busy` and `cache` are shares, `sessions` a number.
    """

    wait_s: float = 0.0
    backlog: float = 0.0
    cache: float = 0.0
    busy: float = 0.0
    sessions: float = 0.0


def desired_replicas(
    loads: Sequence[ReplicaLoad], *, replicas: int, sessions: float, targets: Targets
) -> int:
    """Return the least number of replicas that exceed no target by more than the tolerance.

    Args:
        loads: Of the replicas that have reported.
        replicas: The present target; those that have not reported are starting.
        sessions: Open or queued, of the whole tier.
        targets: Of one replica.

    Returns:
        0 without sessions, else at least 1. Never fewer than `replicas` while some are starting,
        because the callers they were started for may be retrying.
    """
    count = _required(loads, sessions=sessions, targets=targets) if sessions > 0 else 0
    return count if len(loads) >= replicas else max(count, replicas)


def _required(loads: Sequence[ReplicaLoad], *, sessions: float, targets: Targets) -> int:
    growth = max(
        _ratio([load.wait_s for load in loads], targets.wait_s),
        _ratio([load.backlog for load in loads], targets.backlog),
        _ratio([load.cache for load in loads], targets.cache),
    )
    busy = _ratio([load.busy for load in loads], targets.busy)
    factor = max(min(growth, MAX_GROWTH), min(busy, 1 + TOLERANCE))
    required = max(len(loads) * factor, _ratio([sessions], targets.sessions))
    return max(1, math.ceil(required / (1 + TOLERANCE) - 1e-9))


def _ratio(values: Sequence[float], target: float) -> float:
    """Return the mean of the values divided by their target; 0 if either is missing."""
    return math.fsum(values) / len(values) / target if values and target else 0.0


class TierPolicy:
    """The policy of one tier, as Serve's `AutoscalingConfig` names it; runs in Serve's controller.

    Raises:
        TypeError: A keyword is no target.
    """

    def __init__(self, **targets: float) -> None:
        self._targets = Targets(**targets)

    def __call__(self, ctx: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """Return the desired number of replicas, and no state."""
        count = desired_replicas(
            reported_loads(ctx.aggregated_metrics or {}),
            replicas=ctx.target_num_replicas,
            sessions=ctx.total_num_requests,
            targets=self._targets,
        )
        return count, {}


def reported_loads(metrics: Mapping[str, Mapping[Any, float]]) -> list[ReplicaLoad]:
    """Return the load of each replica that reported all of it; `metrics` is by name and replica."""
    names = [field.name for field in fields(ReplicaLoad)]
    complete = set[Any].intersection(*(set(metrics.get(name, {})) for name in names))
    return [ReplicaLoad(**{name: metrics[name][replica] for name in names}) for replica in complete]
