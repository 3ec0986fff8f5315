"""Where metrics go: Ray's Prometheus endpoint under Serve, a registry of our own without Ray."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cascade.observability.metric_specs import MetricKind

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascade.observability.metric_specs import MetricSpec


class MetricBackend(Protocol):
    """Takes values of metrics; `labels` are in the order of the spec."""

    def add(self, spec: MetricSpec, amount: float, *labels: str) -> None:
        """Add to a counter; `amount` is above 0."""
        ...

    def set(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Set a gauge."""
        ...

    def observe(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        ...


class ServeMetrics:
    """Ray's metrics, with Serve's labels: application, deployment and replica.

    A call takes about 6 microseconds, so callers sum up first.
    """

    def __init__(self, specs: Sequence[MetricSpec]) -> None:
        # Tiers and routers also run without Ray, and then need not import it.
        from ray.serve import metrics  # noqa: PLC0415 - as above

        self._metrics: dict[str, Any] = {spec.name: _serve_metric(metrics, spec) for spec in specs}

    def add(self, spec: MetricSpec, amount: float, *labels: str) -> None:
        """Add to a counter."""
        tags = _tags(spec, labels)
        if amount:  # Ray raises where there is nothing to add
            self._metrics[spec.name].inc(amount, tags)

    def set(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._metrics[spec.name].set(value, _tags(spec, labels))

    def observe(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        self._metrics[spec.name].observe(value, _tags(spec, labels))


class PrometheusMetrics:
    """A Prometheus registry of its own."""

    def __init__(self, specs: Sequence[MetricSpec]) -> None:
        self.registry = CollectorRegistry()
        self._metrics: dict[str, Any] = {
            spec.name: _plain_metric(spec, self.registry) for spec in specs
        }

    def add(self, spec: MetricSpec, amount: float, *labels: str) -> None:
        """Add to a counter."""
        self._child(spec, labels).inc(amount)

    def set(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Set a gauge."""
        self._child(spec, labels).set(value)

    def observe(self, spec: MetricSpec, value: float, *labels: str) -> None:
        """Put a value into a histogram."""
        self._child(spec, labels).observe(value)

    async def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)

    def _child(self, spec: MetricSpec, labels: tuple[str, ...]) -> Any:
        metric = self._metrics[spec.name]
        return metric.labels(*labels) if labels else metric


class BoundedLabel:
    """Passes on the first `limit` values of a label; later ones become `other`."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._known: set[str] = set()

    def __call__(self, value: str) -> str:
        """Return the value, or `other`."""
        if len(self._known) < self._limit:
            self._known.add(value)
        return value if value in self._known else "other"


def name_at_ray(spec: MetricSpec) -> str:
    """Return the name under Ray, which takes letters, digits and underscores only."""
    return spec.name.replace(":", "_")


def _serve_metric(metrics: Any, spec: MetricSpec) -> Any:
    about: dict[str, Any] = {"description": spec.about, "tag_keys": spec.labels or None}
    match spec.kind:
        case MetricKind.COUNTER:
            return metrics.Counter(name_at_ray(spec), **about)
        case MetricKind.GAUGE:
            return metrics.Gauge(name_at_ray(spec), **about)
        case MetricKind.HISTOGRAM:
            return metrics.Histogram(name_at_ray(spec), boundaries=list(spec.buckets), **about)


def _plain_metric(spec: MetricSpec, registry: CollectorRegistry) -> Counter | Gauge | Histogram:
    match spec.kind:
        case MetricKind.COUNTER:
            return Counter(spec.name, spec.about, spec.labels, registry=registry)
        case MetricKind.GAUGE:
            return Gauge(spec.name, spec.about, spec.labels, registry=registry)
        case MetricKind.HISTOGRAM:
            return Histogram(
                spec.name,
                spec.about,
                spec.labels,
                registry=registry,
                buckets=spec.buckets,
            )


def _tags(spec: MetricSpec, labels: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(spec.labels, labels, strict=True))
