"""Metrics add up to what answers say of themselves."""

from __future__ import annotations

import re
from collections import Counter

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from cascade.observability import metric_specs
from cascade.observability.metric_specs import ENGINE, ROUTER, MetricKind, MetricSpec
from cascade.observability.metrics import BoundedLabel, PrometheusMetrics, ServeMetrics, name_at_ray


def exposed(registry: CollectorRegistry) -> dict[str, float]:
    """Return the samples as Prometheus would read them: `name{label=value}`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found[key(sample.name, **sample.labels)] = sample.value
    return found


def key(name: str, **labels: str) -> str:
    """Return how `exposed` calls a sample."""
    return name + str(sorted(labels.items()))


def test_every_family_can_be_made_with_both_libraries() -> None:
    PrometheusMetrics((*ROUTER, *ENGINE))
    ServeMetrics((*ROUTER, *ENGINE))


def test_names_are_those_that_prometheus_and_ray_take() -> None:
    """A base unit at the end, no `_total` of our own, no name twice."""
    names = Counter(name_at_ray(family) for family in (*ROUTER, *ENGINE))
    assert set(names.values()) == {1}
    for name in names:
        assert re.fullmatch(r"[a-z_]+", name)
        assert not name.endswith(("_total", "_ms", "_count", "_sum", "_bucket"))


def test_a_histogram_has_bounds_and_nothing_else_has() -> None:
    for family in (*ROUTER, *ENGINE):
        assert bool(family.buckets) == (family.kind is MetricKind.HISTOGRAM)
        assert list(family.buckets) == sorted(family.buckets)


def test_a_plain_sink_counts_sets_and_observes() -> None:
    sink = PrometheusMetrics(ROUTER)
    sink.add(metric_specs.PASSES, 2, "expert")
    sink.add(metric_specs.PASSES, 3, "expert")
    sink.set(metric_specs.RUNNING, 4)
    sink.observe(metric_specs.ANSWER_S, 0.3, "cascade")
    samples = exposed(sink.registry)
    assert samples[key("cascade_passes_total", tier="expert")] == 5
    assert samples[key("cascade_running_answers")] == 4
    assert samples[key("cascade_answer_seconds_sum", mode="cascade")] == 0.3


def test_a_serve_sink_records_through_rays_library() -> None:
    """What it shows is for `tests/serve`; here, that every kind takes its labels."""
    sink = ServeMetrics(ROUTER)
    sink.add(metric_specs.PASSES, 2, "expert")
    sink.set(metric_specs.RUNNING, 4)
    sink.observe(metric_specs.ANSWER_S, 0.3, "cascade")


@pytest.mark.parametrize(
    "sink", [PrometheusMetrics(ROUTER), ServeMetrics(ROUTER)], ids=["plain", "serve"]
)
def test_nothing_may_be_added_to_a_counter(sink: PrometheusMetrics | ServeMetrics) -> None:
    """An answer that ends without a token adds 0 tokens."""
    sink.add(metric_specs.CALLER_TOKENS, 0, "one", "completion")


@pytest.mark.parametrize(
    "sink", [PrometheusMetrics(ROUTER), ServeMetrics(ROUTER)], ids=["plain", "serve"]
)
def test_a_label_too_few_is_a_defect(sink: PrometheusMetrics | ServeMetrics) -> None:
    with pytest.raises(ValueError, match=r"label|argument|tag"):
        sink.add(metric_specs.ANSWERS, 1, "cascade")


def test_a_label_cannot_grow_without_bound() -> None:
    bounded = BoundedLabel(2)
    assert [bounded(value) for value in ("a", "b", "c", "a", "d")] == [
        *("a", "b", "other", "a", "other")
    ]


def test_only_names_with_a_colon_change_for_ray() -> None:
    changed = [family for family in ROUTER if name_at_ray(family) != family.name]
    assert changed
    assert all(family.name.startswith("vllm:spec_decode_") for family in changed)
    assert name_at_ray(MetricSpec(name="vllm:x", about="")) == "vllm_x"
