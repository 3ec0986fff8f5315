"""This machine: devices, memory, threads and ports."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import TYPE_CHECKING

from cascade.cli.findings import Finding, fail, ok, warn

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascade.cli.plan import Plan

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
