"""`cascade check`: finds what is wrong with YAML files before they are deployed."""

from __future__ import annotations

import re
from pathlib import Path  # noqa: TC003 - typer reads the annotations
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cascade.cli.check_cluster import (
    NodeType,
    check_fit,
    check_launcher,
    check_ray_service,
    node_types,
)
from cascade.cli.check_serve import WRONG_SHAPE, check_serve, misshapen, read
from cascade.cli.findings import Check, fail, ok, show

if TYPE_CHECKING:
    from collections.abc import Iterator


def check(
    files: Annotated[
        list[Path], typer.Argument(help="YAML of Serve, KubeRay, `ray up` or Prometheus' rules")
    ],
    *,
    nodes: Annotated[
        Path | None, typer.Option(help="YAML of `ray up` whose node types must hold the replicas")
    ] = None,
) -> None:
    """Find what is wrong with YAML files before they are deployed; exit 1 if something is.

    Reads settings only: it starts nothing, connects to nothing and loads no model.
    """
    if not show(finding for path in files for finding in check_file(path, nodes=nodes)):
        raise typer.Exit(1)


def check_file(path: Path, *, nodes: Path | None = None) -> list[Check]:
    """Return what is wrong with a file of any kind that `cluster/` has.

    Args:
        path: The file.
        nodes: YAML of `ray up` whose node types must hold the replicas of a Serve YAML.
    """
    documents, checks = read(path)
    if checks:
        return checks
    launchers, checks = read(nodes) if nodes is not None else ([], [])
    types = [one for launcher in launchers for one in node_types(launcher)]
    if launchers and not types:
        checks.append(fail(f"{nodes} has no available_node_types", "give a YAML of `ray up`"))
    for document in documents:
        try:
            checks += _check_document(document, types)
        except WRONG_SHAPE as error:
            checks.append(misshapen(error))
    named = [one._replace(message=f"{path}: {one.message}") for one in checks]
    return named or [ok(f"{path} is valid")]


def _check_document(document: Any, types: list[NodeType]) -> Iterator[Check]:
    match document:
        case {"applications": _}:
            found, config = check_serve(document)
            yield from found
            yield from check_fit(config, types) if types else ()
        case {"kind": "RayService"}:
            yield from check_ray_service(document)
        case {"kind": "Secret"}:
            yield fail("it holds a Secret", "create it with kubectl, not from a file")
        case {"apiVersion": _, "kind": _}:
            pass  # another resource of Kubernetes, which its API server checks
        case {"cluster_name": _, "provider": _}:
            yield from check_launcher(document)
        case {"groups": groups}:
            for group in groups:
                yield from _check_alerts(group)
        case _:
            kinds = "`applications`, `kind: RayService`, `cluster_name` or `groups`"
            yield fail(f"it has none of {kinds}", "give a file like those in cluster/")


def _check_alerts(group: dict[str, Any]) -> Iterator[Check]:
    """Check that alerts ask for metrics of ours that exist."""
    from cascade.observability.metric_specs import ENGINE, ROUTER  # noqa: PLC0415 - rarely needed
    from cascade.observability.metrics import name_at_ray  # noqa: PLC0415 - as above

    known = {f"ray_{name_at_ray(metric)}" for metric in (*ROUTER, *ENGINE)}
    for rule in group["rules"]:
        asked = set(re.findall(r"\bray_cascade_\w+", str(rule.get("expr"))))
        for name in sorted({re.sub(r"_(total|bucket|sum|count)$", "", one) for one in asked}):
            if name not in known:
                message = f"alert {rule.get('alert')} asks for {name}, which no part exports"
                yield fail(message, "see docs/reference.md")
