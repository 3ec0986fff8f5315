"""Dashboard and alerts ask for metrics and labels that exist, and all that exists is shown."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from tests.cluster.test_yaml import FOLDER

from cascade.observability.metric_specs import ENGINE, ROUTER, MetricKind
from cascade.observability.metrics import name_at_ray

SERVES = {"application", "deployment", "replica"}
ENDINGS = {
    MetricKind.COUNTER: ("_total",),
    MetricKind.GAUGE: ("",),
    MetricKind.HISTOGRAM: ("_bucket", "_sum"),
}
LABELS = {
    f"ray_{name_at_ray(family)}{ending}": SERVES | {"le"} | set(family.labels)
    for family in (*ROUTER, *ENGINE)
    for ending in ENDINGS[family.kind]
} | {"ray_serve_deployment_replica_healthy": SERVES, "ray_node_cpu_count": {"ip"}}  # Ray's own
DASHBOARD: dict[str, Any] = json.loads((FOLDER / "grafana" / "cascade.json").read_text())
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "prometheus-rules.yaml").read_text())[
    "groups"
][0]["rules"]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
SHOWN = [target["expr"] for panel in PANELS for target in panel["targets"]]
EXPRESSIONS = [*SHOWN, *(rule["expr"] for rule in RULES)]


def names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_asks_for_what_exists(expression: str) -> None:
    assert names(expression) <= set(LABELS), names(expression) - set(LABELS)
    for name, selector in re.findall(r"\b(ray_\w+)\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]~?", selector)) <= LABELS[name]
    grouped = re.findall(r"\b(?:by|on|ignoring) \(([^)]+)\)", expression)
    asked = {label.strip() for group in grouped for label in group.split(",")}
    assert asked <= set.union(*(LABELS[name] for name in names(expression)))
    assert expression.count("(") == expression.count(")")


def test_the_dashboard_shows_every_metric_of_ours() -> None:
    shown = {re.sub(r"_(total|bucket|sum)$", "", name) for one in SHOWN for name in names(one)}
    ours = {f"ray_{name_at_ray(family)}" for family in (*ROUTER, *ENGINE)}
    hidden = {name for name in ours - shown if not name.startswith("ray_vllm_")}
    assert hidden == {
        "ray_cascade_predicted_tokens",
        "ray_cascade_engine_prefix_hits",
        "ray_cascade_engine_prefix_tokens",
    }


def test_panels_have_places_of_their_own() -> None:
    numbers = [panel["id"] for panel in DASHBOARD["panels"]]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in DASHBOARD["panels"]]
    assert len(set(numbers)) == len(set(places)) == len(numbers)


def test_its_variables_are_defined() -> None:
    known = {one["name"] for one in DASHBOARD["templating"]["list"]} | {"__rate_interval"}
    assert set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD["panels"]))) <= known


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_says_how_bad_it_is_and_what_it_means(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in {"warning", "critical"}
    assert rule["annotations"]["summary"]
    told = " ".join(rule["annotations"].values())
    used = set(re.findall(r"\$labels\.(\w+)", told))
    grouped = re.findall(r"sum by \(([^)]+)\)", rule["expr"])
    kept = {label.strip() for group in grouped for label in group.split(",")}
    assert used <= kept


def test_each_alert_has_its_section_in_the_runbook_and_each_section_an_alert() -> None:
    text = (FOLDER.parent / "docs" / "operations.md").read_text().partition("## Alerts")[2]
    sections = dict(re.findall(r"^### (\w+)\n\n(.+?)(?=\n#|\Z)", text, re.DOTALL | re.MULTILINE))
    assert set(sections) == {rule["alert"] for rule in RULES}
    assert all(len(section.split()) > 10 for section in sections.values())
