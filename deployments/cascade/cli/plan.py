"""What a Serve YAML asks of a cluster."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from cascade.cli.findings import Finding, fail, ok

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascade.settings import Deployment

_IMPORT_PATH = "cascade.app:build"


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Ports, and the sum of what all replicas reserve, by Ray's names of resources."""

    http_port: int = 8000
    grpc_port: int = 9000
    resources: Mapping[str, float] = field(default_factory=dict[str, float])


DEFAULT_PLAN = Plan()


def check_plan(path: Path) -> tuple[list[Finding], Plan]:
    """Read a Serve YAML; return what is wrong with it, and what it asks for."""
    try:
        told = yaml.safe_load(path.read_text())
        return [ok(f"{path} is well formed")], read_plan(told)
    except OSError as error:
        return [fail(f"{path} cannot be read: {error.strerror}", "give a Serve YAML")], DEFAULT_PLAN
    except yaml.YAMLError as error:
        line = " ".join(str(error).split())
        return [fail(f"{path} is no YAML: {line}", "mend it")], DEFAULT_PLAN
    except ValidationError as error:
        return [_misfit(path, problem) for problem in error.errors()], DEFAULT_PLAN
    except (KeyError, TypeError, AttributeError) as error:
        advice = f"it needs `applications:` with one of import_path {_IMPORT_PATH}"
        return [fail(f"{path} is no Serve YAML ({error!r})", advice)], DEFAULT_PLAN


def read_plan(told: dict[str, Any]) -> Plan:
    """Return what a parsed Serve YAML asks for.

    Raises:
        ValidationError: `args:` are not settings of `cascade.settings`.
        KeyError: There is no `applications:`.
    """
    from cascade.settings import Application  # noqa: PLC0415 - brings torch along

    resources: Counter[str] = Counter()
    for application in told["applications"]:
        if application["import_path"] == _IMPORT_PATH:
            settings = Application.model_validate(application.get("args") or {})
            for tier in (settings.router, settings.drafter, settings.expert):
                resources.update(reserved(tier.deployment))
    return Plan(
        http_port=(told.get("http_options") or {}).get("port", DEFAULT_PLAN.http_port),
        grpc_port=(told.get("grpc_options") or {}).get("port", DEFAULT_PLAN.grpc_port),
        resources=dict(resources),
    )


def reserved(deployment: Deployment) -> dict[str, float]:
    """Return what the replicas that a deployment starts with reserve together."""
    count = deployment.num_replicas
    if scaling := deployment.autoscaling_config:
        count = scaling.get("initial_replicas") or scaling.get("min_replicas", 1)
    one: Counter[str] = Counter()
    if bundles := deployment.placement_group_bundles:
        for bundle in bundles:
            one.update(bundle)
    else:
        options = deployment.ray_actor_options
        one.update({"CPU": options.get("num_cpus", 1), "GPU": options.get("num_gpus", 0)})
        one.update(options.get("resources", {}))
    return {name: count * amount for name, amount in one.items() if amount}


def _misfit(path: Path, problem: Any) -> Finding:
    place = ".".join(str(part) for part in problem["loc"])
    return fail(f"{path}: args.{place}: {problem['msg']}", "see cascade/settings.py")
