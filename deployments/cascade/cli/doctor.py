"""`cascade doctor`: finds what is wrong with this machine or cluster, and says how to fix it."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from http import HTTPStatus
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import httpx
import psutil
import typer
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from cascade.cli.ask import server_url, unreachable
from cascade.cli.check_pair import check_pair
from cascade.cli.check_serve import ServeConfig, check_config
from cascade.cli.evaluate import failed
from cascade.cli.findings import Check, Status, show
from cascade.cli.findings import fail as _fail
from cascade.cli.findings import ok as _ok
from cascade.cli.findings import warn as _warn
from cascade.errors import StartupError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping


def check_versions(distribution: str = "speculative-cascades") -> list[Check]:
    """Compare Python and every installed library with the requirements of `distribution`."""
    try:
        needed = metadata.metadata(distribution)["Requires-Python"]
    except metadata.PackageNotFoundError:
        return [_fail(f"{distribution} is not installed", "pip install . in its folder")]
    version = platform.python_version()
    python = _ok(f"Python {version}")
    if not SpecifierSet(needed).contains(version, prereleases=True):
        fix = "make a virtual environment with a matching Python"
        python = _fail(f"Python {version}, but {needed} is needed", fix)
    requirements = [
        requirement
        for requirement in map(Requirement, metadata.requires(distribution) or ())
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    failures = [check for check in map(check_requirement, requirements) if check is not None]
    return [python, *(failures or [_ok(f"{len(requirements)} libraries are as new as needed")])]


def check_requirement(requirement: Requirement) -> Check | None:
    """Return a failure if the library is missing or too old."""
    fix = f"pip install '{requirement}'"
    try:
        version = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return _fail(f"{requirement.name} is not installed", fix)
    if requirement.specifier.contains(version, prereleases=True):
        return None
    return _fail(f"{requirement.name} is {version}, but {requirement.specifier} is needed", fix)


_GIB = 2**30

_NEEDED_MEMORY_GIB = 4

_LEAST_DISK_SHARE = 0.05  # below this Ray stops writing objects

_CGROUP = Path("/sys/fs/cgroup")


def check_devices() -> list[Check]:
    """Report the cores and GPUs."""
    import torch  # noqa: PLC0415 - takes a second; `cascade ask` must not wait for it

    cores = _ok(f"{_usable_cores()} processor cores")
    devices = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    if devices:
        return [cores, *(_ok(f"GPU {d.name}, {d.total_memory / _GIB:.0f} GiB") for d in devices)]
    if torch.version.cuda:
        fix = "see nvidia-smi; the driver may be too old, or a container may lack --gpus all"
        return [cores, _warn("PyTorch is built for GPUs and finds none", fix)]
    return [cores, _ok("no GPU; models run on the processor")]


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def check_memory(*, free_bytes: int | None = None) -> list[Check]:
    """Compare free memory and disk with what the shipped pair and Ray need."""
    free_gib = (available_bytes() if free_bytes is None else free_bytes) / _GIB
    memory = _ok(f"{free_gib:.1f} GiB of memory free")
    if free_gib < _NEEDED_MEMORY_GIB:
        memory = _warn(
            f"{free_gib:.1f} GiB of memory free; a local server uses up to {_NEEDED_MEMORY_GIB}",
            "end other programs, or give the container more",
        )
    disk = shutil.disk_usage("/tmp")  # noqa: S108 - where Ray keeps its session
    if disk.free >= _LEAST_DISK_SHARE * disk.total:
        return [memory]
    message = f"the disk of /tmp is {1 - disk.free / disk.total:.0%} full; Ray stops at 95%"
    return [memory, _fail(message, "make room, or start Ray with --temp-dir elsewhere")]


def available_bytes() -> int:
    """Return the memory available to a new process, within the container's limit."""
    free = psutil.virtual_memory().available
    limit = _CGROUP / "memory.max"
    if limit.exists() and (text := limit.read_text().strip()) != "max":
        free = min(free, int(text) - int((_CGROUP / "memory.current").read_text()))
    return free


def check_threads(environment: Mapping[str, str] = os.environ) -> list[Check]:
    """Find OpenMP settings that make tiers on one machine compete for its cores."""
    checks: list[Check] = []
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        fix = "unset it; idle threads of one tier would occupy the cores of the other"
        checks.append(_warn("OMP_WAIT_POLICY is active", fix))
    threads, cores = environment.get("OMP_NUM_THREADS", ""), _usable_cores()
    if threads.isdecimal() and int(threads) > cores:
        fix = "unset it; every replica sets its own threads"
        checks.append(_warn(f"OMP_NUM_THREADS is {threads} on {cores} cores", fix))
    return checks or [_ok("OpenMP settings let each tier choose its threads")]


def check_ports(config: ServeConfig, *, serving: bool) -> list[Check]:
    """Return whether the ports are free.

    Args:
        config: Whose ports.
        serving: Whether a cascade answers on the HTTP port, which then is what uses both.
    """
    checks: list[Check] = []
    for protocol, port in (("HTTP", config.http_port), ("gRPC", config.grpc_port)):
        if _is_free(port):
            checks.append(_ok(f"port {port} is free for {protocol}"))
        elif serving or (protocol == "gRPC" and _is_healthy_grpc(port)):
            checks.append(_ok(f"port {port} for {protocol} is in use, and the server answers"))
        else:
            fix = f"set another port in the YAML, or see what uses it with `lsof -i :{port}`"
            checks.append(
                _fail(f"port {port} for {protocol} is taken, and no cascade answers", fix)
            )
    return checks


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _is_healthy_grpc(port: int) -> bool:
    import grpc  # noqa: PLC0415 - rarely needed
    from grpc_health.v1 import health_pb2, health_pb2_grpc  # noqa: PLC0415 - as above

    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)  # its stubs lack the methods
        try:
            asked = health_pb2.HealthCheckRequest()
            found = stub.Check(asked, timeout=_TIMEOUT_S)
        except grpc.RpcError:
            return False
    return found.status == health_pb2.HealthCheckResponse.SERVING


_TIMEOUT_S = 5.0


def check_server(url: str) -> Check:
    """Return whether the server answers and is healthy."""
    try:
        response = httpx.get(f"{url}/health", timeout=_TIMEOUT_S)
    except httpx.HTTPError as error:
        return _warn(unreachable(url, error), "serve run cluster/local.yaml")
    if response.is_success:
        return _ok(f"the server at {url} is healthy")
    message = f"the server at {url} answers {response.status_code}: {response.text[:200]}"
    if response.status_code == HTTPStatus.NOT_FOUND:
        return _fail(message, "it is starting, or not a cascade: `serve status`, or another --url")
    return _fail(message, "serve status; the log of the Router has the reason")


def check_drafts(url: str) -> list[Check]:
    """Return what a healthy server warns of."""
    try:
        warnings = httpx.get(f"{url}/health", timeout=_TIMEOUT_S).json().get("warnings", ())
    except (httpx.HTTPError, ValueError, AttributeError):
        return []
    fix = "the log of the Router names the drafter; check that the two models are a pair"
    return [_warn(str(warning), fix) for warning in warnings]


def check_cluster(dashboard: str, *, config: ServeConfig) -> list[Check]:
    """Compare the config with the cluster's resources, or with this machine if there is none.

    Args:
        dashboard: URL of the Ray dashboard.
        config: What is to be deployed.
    """
    try:
        status = _get(dashboard, "/api/cluster_status")
    except httpx.HTTPStatusError as error:
        message = f"the Ray cluster at {dashboard} answers {error.response.status_code}"
        return [_warn(message, "it may need its token; put it in RAY_AUTH_TOKEN")]
    except (httpx.HTTPError, ValueError):
        import torch  # noqa: PLC0415 - as above

        here = {"CPU": float(_usable_cores()), "GPU": float(torch.cuda.device_count())}
        return [
            _warn(
                f"no Ray cluster answers at {dashboard}",
                "`serve run` starts one here; name another with --dashboard",
            ),
            *check_resources(config.resources, available=here, where="this machine"),
        ]
    total = resources_of(status)
    listed = ", ".join(f"{amount:g} {name}" for name, amount in sorted(total.items()))
    return [
        _ok(f"Ray cluster at {dashboard}: {listed}"),
        check_authentication(dashboard),
        *check_resources(config.resources, available=total, where="the cluster"),
        *_check_applications(dashboard),
    ]


def check_authentication(dashboard: str) -> Check:
    """Return whether a Ray cluster asks its callers for a token."""
    try:
        found = _get(dashboard, "/api/authentication_mode").get("authentication_mode")
    except (httpx.HTTPError, ValueError):
        found = None
    if found == "token":
        return _ok("the Ray cluster asks its callers for a token")
    return _fail(
        "whoever reaches a node of the Ray cluster can run programs on it: it asks for no token",
        "start it with RAY_AUTH_MODE=token on every node; cluster/README.md says how",
    )


def check_resources(
    needed: Mapping[str, float], *, available: Mapping[str, float], where: str
) -> list[Check]:
    """Return a failure for each resource that is not sufficient.

    Args:
        needed: Amounts by name.
        available: Amounts by name.
        where: What has them, for the message.
    """
    failures = [
        _fail(
            f"the YAML asks for {amount:g} {name}, {where} has {available.get(name, 0):g}",
            "add nodes, or lower num_replicas or ray_actor_options",
        )
        for name, amount in sorted(needed.items())
        if amount > available.get(name, 0)
    ]
    return failures or ([_ok(f"{where} has what the YAML asks for")] if needed else [])


def resources_of(status: dict[str, Any]) -> dict[str, float]:
    """Return the totals of CPU, GPU and custom resources from a dashboard's cluster status."""
    usage = status["data"]["clusterStatus"]["loadMetricsReport"]["usage"]
    return {
        name: float(total)
        for name, (_, total) in usage.items()
        if "memory" not in name.lower() and not name.startswith("node:")
    }


def _check_applications(dashboard: str) -> list[Check]:
    try:
        status = _get(dashboard, "/api/serve/applications/")
    except (httpx.HTTPError, ValueError):
        return [_warn("Serve does not run on the cluster", "serve deploy cluster/cluster.yaml")]
    checks: list[Check] = []
    for name, application in (status.get("applications") or {}).items():
        deployments = application.get("deployments") or {}
        if application.get("status") == "RUNNING":
            counts = ", ".join(
                f"{deployment} {len(details.get('replicas') or ())}"
                for deployment, details in deployments.items()
            )
            checks.append(_ok(f"application {name} runs: {counts}"))
            continue
        messages = [part.get("message") or "" for part in (application, *deployments.values())]
        reason = " ".join(" ".join(messages).split())[:400]
        message = f"application {name} is {application.get('status')}: {reason}"
        checks.append(_fail(message, "serve status; see the logs"))
    return checks


def _get(dashboard: str, path: str) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {token}"} if (token := _ray_token()) else {}
    response = httpx.get(dashboard + path, timeout=_TIMEOUT_S, headers=headers).raise_for_status()
    return response.json()


def _ray_token() -> str | None:
    """Return the token of a Ray cluster from where Ray itself looks for it."""
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    default = Path.home() / ".ray" / "auth_token"
    try:
        return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or default).read_text().strip() or None
    except OSError:
        return None


def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="A Serve YAML, such as cluster/local.yaml")
    ] = None,
    *,
    url: Annotated[
        str | None,
        typer.Option(envvar="CASCADE_URL", help="The server; if absent, as the YAML says"),
    ] = None,
    dashboard: Annotated[
        str, typer.Option(envvar="RAY_DASHBOARD_ADDRESS", help="The dashboard of the Ray cluster")
    ] = "http://127.0.0.1:8265",
    pair: Annotated[
        tuple[str, str] | None,
        typer.Option(help="A drafter and an expert: only say what their vocabularies share"),
    ] = None,
) -> None:
    """Find what is wrong with this machine or cluster; exit 1 if the server cannot run on it."""
    if pair is not None:
        drafter, expert = pair
        if not show(check_pair(drafter, expert, free_bytes=available_bytes())):
            raise typer.Exit(1)
        return
    try:
        url, dashboard = url and server_url(url), server_url(dashboard)
    except StartupError as error:
        raise failed(error) from error
    if not show(_checks(config, url, dashboard)):
        raise typer.Exit(1)


def _checks(config: Path | None, url: str | None, dashboard: str) -> Iterator[Check]:
    """Yield what is found as it is found.

    Args:
        config: A Serve YAML.
        url: Of the server; None: as the YAML says.
        dashboard: Of the Ray cluster.
    """
    checks, serve = check_config(config) if config else ([], ServeConfig())
    yield from checks
    yield from check_versions()
    yield from check_devices()
    yield from check_memory()
    yield from check_threads()
    yield from check_cluster(dashboard, config=serve)
    here = f"http://127.0.0.1:{serve.http_port}"
    server = on_port = check_server(here)
    if url is not None and url != here:
        server = check_server(url)
        if (server.status, on_port.status) == (Status.WARN, Status.OK):
            server = server._replace(fix=f"the server at {here} is healthy; leave out --url")
    yield from check_ports(serve, serving=on_port.status is not Status.WARN)
    yield from serve.open_doors
    yield server
    yield from check_drafts(url or here)
