"""`cascade doctor`: what is wrong with this machine or cluster, and what to do about it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections import Counter
from dataclasses import dataclass, field
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import typer
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from pydantic import ValidationError
from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascade.settings import Deployment


class Grade(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARN = "warn"  # runs, but not as it could
    FAIL = "fail"  # does not run


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the doctor's, and what to do unless all is well."""

    grade: Grade
    told: str
    advice: str = ""


def ok(told: str) -> Finding:
    """Return a finding that needs nothing done."""
    return Finding(grade=Grade.OK, told=told)


def warn(told: str, advice: str) -> Finding:
    """Return a finding that costs something."""
    return Finding(grade=Grade.WARN, told=told, advice=advice)


def fail(told: str, advice: str) -> Finding:
    """Return a finding that stops the server."""
    return Finding(grade=Grade.FAIL, told=told, advice=advice)


DISTRIBUTION = "speculative-cascades"


def check_versions(distribution: str = DISTRIBUTION) -> list[Finding]:
    """Hold Python and every installed library against the metadata of `distribution`."""
    try:
        told = metadata.metadata(distribution)
    except metadata.PackageNotFoundError:
        return [fail(f"{distribution} is not installed", "pip install . in its folder")]
    python = _python(told["Requires-Python"])
    requirements = [Requirement(line) for line in metadata.requires(distribution) or ()]
    needed = [
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    findings = [finding for requirement in needed for finding in check_requirement(requirement)]
    return [python, *(findings or [ok(f"{len(needed)} libraries are as new as needed")])]


def _python(wanted: str) -> Finding:
    version = platform.python_version()
    if SpecifierSet(wanted).contains(version, prereleases=True):
        return ok(f"Python {version}")
    return fail(f"Python {version}, but {wanted} is needed", "make a virtual environment with it")


def check_requirement(requirement: Requirement) -> list[Finding]:
    """Return what is wrong with one library: nothing, that it is missing, or that it is too old."""
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return [fail(f"{requirement.name} is not installed", f"pip install '{requirement}'")]
    if requirement.specifier.contains(version, prereleases=True):
        return []
    return [
        fail(
            f"{requirement.name} is {version}, but {requirement.specifier} is needed",
            f"pip install '{requirement}'",
        )
    ]


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


_GIB = 2**30

_LEAST_MEMORY_BYTES = 4 * _GIB

_LEAST_DISK_SHARE = 0.05  # below this Ray stops writing objects

_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")

_CGROUP_USED = Path("/sys/fs/cgroup/memory.current")


def check_devices() -> list[Finding]:
    """Say what there is to compute on."""
    import torch  # noqa: PLC0415 - takes a second; `cascade ask` must not wait for it

    cores = ok(f"{usable_cores()} processor cores")
    count = torch.cuda.device_count()
    if not count and torch.version.cuda:
        advice = "see nvidia-smi; the driver may be too old, or a container lack --gpus all"
        return [cores, warn("no GPU to be seen by a PyTorch that is built for one", advice)]
    names = [torch.cuda.get_device_properties(index) for index in range(count)]
    return [
        cores,
        *(ok(f"GPU {card.name}, {card.total_memory / _GIB:.0f} GiB") for card in names),
        *([] if count else [ok("no GPU; models run on the processor")]),
    ]


def num_gpus() -> int:
    """Return how many GPUs PyTorch can use."""
    import torch  # noqa: PLC0415 - as above

    return torch.cuda.device_count()


def usable_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(*, free_bytes: int | None = None) -> list[Finding]:
    """Hold free memory and disk against what the pair that ships and Ray need."""
    free = available_bytes() if free_bytes is None else free_bytes
    memory = (
        ok(f"{free / _GIB:.1f} GiB of memory free")
        if free >= _LEAST_MEMORY_BYTES
        else warn(
            f"{free / _GIB:.1f} GiB of memory free; a local server takes up to 4",
            "end other programs, or give the container more",
        )
    )
    disk = shutil.disk_usage("/tmp")  # noqa: S108 - where Ray keeps its session
    if disk.free < _LEAST_DISK_SHARE * disk.total:
        told = f"the disk of /tmp is {1 - disk.free / disk.total:.0%} full; Ray stops at 95%"
        return [memory, fail(told, "make room, or start Ray with --temp-dir elsewhere")]
    return [memory]


def available_bytes() -> int:
    """Return the memory a new process can have, in a container that of the container."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        rows = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        free = int(rows["MemAvailable"].split()[0]) * 1024
    if _CGROUP_LIMIT.exists() and (limit := _CGROUP_LIMIT.read_text().strip()) != "max":
        free = min(free, int(limit) - int(_CGROUP_USED.read_text()))
    return free


def check_threads(environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """Look for settings under which tiers on one machine fight for its cores."""
    findings: list[Finding] = []
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        advice = "unset it; waiting threads of one tier would hold the cores of the other"
        findings.append(warn("OMP_WAIT_POLICY is active", advice))
    threads, cores = environment.get("OMP_NUM_THREADS", ""), usable_cores()
    if threads.isdecimal() and int(threads) > cores:
        advice = "unset it; every replica sets its own threads"
        findings.append(warn(f"OMP_NUM_THREADS is {threads} on {cores} cores", advice))
    return findings or [ok("OpenMP settings leave the tiers their threads")]


def check_ports(plan: Plan, *, serving: bool) -> list[Finding]:
    """Say whether the ports are free, or taken by our own server."""
    ports = {"HTTP": plan.http_port, "gRPC": plan.grpc_port}
    return [_port(door, port, serving=serving) for door, port in ports.items()]


def _port(door: str, port: int, *, serving: bool) -> Finding:
    if port_is_free(port):
        return ok(f"port {port} is free for {door}")
    if serving:
        return ok(f"port {port} for {door} is in use, and the server answers")
    return fail(
        f"port {port} for {door} is taken, and no cascade answers",
        f"end what holds it (`lsof -i :{port}`), or set another port in the YAML",
    )


def port_is_free(port: int) -> bool:
    """Say whether a server could listen on `port` of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


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


_STYLES = {Grade.OK: "green", Grade.WARN: "yellow", Grade.FAIL: "bold red"}


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A Serve YAML, such as cluster/local.yaml")
    ] = None,
    *,
    url: Annotated[
        str | None, typer.Option(envvar="CASCADE_URL", help="The server; else as the YAML says")
    ] = None,
    dashboard: Annotated[
        str, typer.Option(envvar="RAY_DASHBOARD_ADDRESS", help="The dashboard of the Ray cluster")
    ] = "http://127.0.0.1:8265",
) -> None:
    """Say what is wrong with this machine or cluster; exit 1 if the server cannot run on it."""
    findings, plan = check_plan(config) if config else ([], DEFAULT_PLAN)
    address = url or f"http://127.0.0.1:{plan.http_port}"
    server = check_server(address)
    serving = any(finding.grade is Grade.OK for finding in server)
    findings += [
        *check_versions(),
        *check_devices(),
        *check_memory(),
        *check_threads(),
        *check_cluster(dashboard, plan=plan),
        *check_ports(plan, serving=serving),
        *server,
    ]
    show(findings)
    if any(finding.grade is Grade.FAIL for finding in findings):
        raise typer.Exit(1)


def show(findings: list[Finding]) -> None:
    """Print one line a finding, and under it what to do."""
    console = Console(highlight=False)
    for finding in findings:
        line = Text.assemble((f"{finding.grade.value:4}  ", _STYLES[finding.grade]), finding.told)
        console.print(line, soft_wrap=True)
        if finding.advice:
            console.print(Text(f"      {finding.advice}", "dim"), soft_wrap=True)
