"""Where metrics go: to Ray's Prometheus endpoint under Serve, to one of our own without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from cascade.observability.metric_specs import Kind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.observability.metric_specs import MetricSpec


class MetricBackend(Protocol):
    """Takes values of families; `labels` are in the order of the family's own."""

    def add(self, family: MetricSpec, amount: float, *labels: str) -> None:
        """Add to a counter; `amount` is above 0."""
        ...

    def set(self, family: MetricSpec, value: float, *labels: str) -> None:
        """Set a gauge."""
        ...

    def observe(self, family: MetricSpec, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        ...


class ServeMetrics:
    """Ray's metrics, with Serve's labels: application, deployment and replica.

    A record costs some 6 microseconds, so callers sum up first.
    """

    def __init__(self, families: Sequence[MetricSpec]) -> None:
        # Tiers and routers run without Ray, and need not wait for it then.
        from ray.serve import metrics  # noqa: PLC0415 - as said

        self._metrics: dict[str, Any] = {
            family.name: _serve_metric(metrics, family) for family in families
        }

    def add(self, family: MetricSpec, amount: float, *labels: str) -> None:
        """Add to a counter."""
        self._metrics[family.name].inc(amount, _tags(family, labels))

    def set(self, family: MetricSpec, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._metrics[family.name].set(value, _tags(family, labels))

    def observe(self, family: MetricSpec, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        self._metrics[family.name].observe(value, _tags(family, labels))


class PrometheusMetrics:
    """A registry of its own, for `prometheus_client` to show."""

    def __init__(self, families: Sequence[MetricSpec]) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {
            family.name: _plain_metric(family, self.registry) for family in families
        }

    def add(self, family: MetricSpec, amount: float, *labels: str) -> None:
        """Add to a counter."""
        self._child(family, labels).inc(amount)

    def set(self, family: MetricSpec, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._child(family, labels).set(value)

    def observe(self, family: MetricSpec, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        self._child(family, labels).observe(value)

    def _child(self, family: MetricSpec, labels: tuple[str, ...]) -> Any:
        metric = self._metrics[family.name]
        return metric.labels(*labels) if labels else metric


class BoundedLabel:
    """Lets the first `most` values of a label through; what comes later is `other`."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the value, or `other`."""
        if len(self._known) < self._most:
            self._known.add(value)
        return value if value in self._known else "other"


def name_at_ray(family: MetricSpec) -> str:
    """Return the name that Ray is given: it takes letters, digits and underscores."""
    return family.name.replace(":", "_")


def _serve_metric(metrics: Any, family: MetricSpec) -> Any:
    about: dict[str, Any] = {"description": family.about, "tag_keys": family.labels or None}
    match family.kind:
        case Kind.COUNTER:
            return metrics.Counter(name_at_ray(family), **about)
        case Kind.GAUGE:
            return metrics.Gauge(name_at_ray(family), **about)
        case Kind.HISTOGRAM:
            return metrics.Histogram(name_at_ray(family), boundaries=list(family.buckets), **about)


def _plain_metric(family: MetricSpec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    match family.kind:
        case Kind.COUNTER:
            return Counter(family.name, family.about, family.labels, registry=registry)
        case Kind.GAUGE:
            return Gauge(family.name, family.about, family.labels, registry=registry)
        case Kind.HISTOGRAM:
            return Histogram(
                family.name,
                family.about,
                family.labels,
                registry=registry,
                buckets=family.buckets,
            )


def _tags(family: MetricSpec, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(family.labels, labels, strict=True))
