"""The path of `TierPolicy` in 0.1: a controller may import it during a rolling update."""

from cascade.replica.autoscaling import TierPolicy

__all__ = ["TierPolicy"]
