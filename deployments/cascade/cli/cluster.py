"""The Ray cluster, asked through its dashboard, and the server, asked through its door."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx

from cascade.cli.findings import Finding, fail, ok, warn
from cascade.cli.machine import num_gpus, usable_cores

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascade.cli.plan import Plan

_TIMEOUT_S = 5.0
_RUNNING = "RUNNING"


def check_server(url: str) -> list[Finding]:
    """Ask the server how it is."""
    try:
        response = httpx.get(f"{url}/health", timeout=_TIMEOUT_S)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return [warn(f"no server answers at {url} ({error})", "serve run cluster/local.yaml")]
    if response.is_success:
        return [ok(f"the server at {url} is well")]
    told = f"the server at {url} says {response.status_code}: {response.text[:200]}"
    return [fail(told, "serve status; the log of the Router says why")]


def check_cluster(dashboard: str, *, plan: Plan) -> list[Finding]:
    """Hold the plan against the cluster's resources, or against this machine if there is none."""
    try:
        told = _get(dashboard, "/api/cluster_status")
    except httpx.HTTPStatusError as error:
        refused = f"the Ray cluster at {dashboard} answers {error.response.status_code}"
        return [warn(refused, "it may want its token; put it in RAY_AUTH_TOKEN")]
    except (httpx.HTTPError, httpx.InvalidURL, ValueError):
        advice = "`serve run` starts one here; name another with --dashboard"
        here = {"CPU": float(usable_cores()), "GPU": float(num_gpus())}
        return [
            warn(f"no Ray cluster answers at {dashboard}", advice),
            *check_resources(plan.resources, have=here, where="this machine"),
        ]
    total = resources_of(told)
    listed = ", ".join(f"{amount:g} {name}" for name, amount in sorted(total.items()))
    return [
        ok(f"Ray cluster at {dashboard}: {listed}"),
        *check_resources(plan.resources, have=total, where="the cluster"),
        *_applications(dashboard),
    ]


def check_resources(
    asked: Mapping[str, float], *, have: Mapping[str, float], where: str
) -> list[Finding]:
    """Return one failure a resource that is asked for beyond what there is."""
    lacking = [
        fail(
            f"the YAML asks for {amount:g} {name}, {where} has {have.get(name, 0):g}",
            "add nodes, or lower num_replicas or ray_actor_options",
        )
        for name, amount in sorted(asked.items())
        if amount > have.get(name, 0)
    ]
    return lacking or ([ok(f"{where} has what the YAML asks for")] if asked else [])


def resources_of(told: dict[str, Any]) -> dict[str, float]:
    """Return the totals of CPU, GPU and custom resources from a dashboard's cluster status."""
    usage = told["data"]["clusterStatus"]["loadMetricsReport"]["usage"]
    return {
        name: float(total)
        for name, (_, total) in usage.items()
        if "memory" not in name and not name.startswith("node:")
    }


def ray_token() -> str | None:
    """Return the token that guards a Ray cluster, from where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    default = Path.home() / ".ray" / "auth_token"
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default)
    try:
        return path.read_text().strip() or None
    except OSError:
        return None


def _applications(dashboard: str) -> list[Finding]:
    try:
        told = _get(dashboard, "/api/serve/applications/")
    except (httpx.HTTPError, ValueError):
        return [warn("Serve does not run on the cluster", "serve deploy cluster/cluster.yaml")]
    return [
        _application(name, application)
        for name, application in (told.get("applications") or {}).items()
    ]


def _application(name: str, told: dict[str, Any]) -> Finding:
    deployments = told.get("deployments") or {}
    counts = ", ".join(
        f"{deployment} {len(inside.get('replicas') or ())}"
        for deployment, inside in deployments.items()
    )
    status = told.get("status")
    if status == _RUNNING:
        return ok(f"application {name} runs: {counts}")
    reasons = [told.get("message"), *(inside.get("message") for inside in deployments.values())]
    because = " ".join(" ".join(reason.split()) for reason in reasons if reason)[:400]
    return fail(f"application {name} is {status}: {because}", "serve status; see the logs")


def _get(dashboard: str, path: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {token}"} if (token := ray_token()) else {}
    response = httpx.get(dashboard + path, timeout=_TIMEOUT_S, headers=headers).raise_for_status()
    return response.json()
