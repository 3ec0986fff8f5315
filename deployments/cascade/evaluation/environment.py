"""The machine, versions and commit of a measurement, which are reported with its results."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("speculative-cascades", "torch", "transformers", "grpcio", "ray")

_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "CUDA_VISIBLE_DEVICES")

_GIT_TIMEOUT_S = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Machine, versions, commit and command of a run."""

    command: str
    commit: str  # with a `+` if tracked files are modified; empty outside a checkout
    at: str  # UTC, ISO 8601
    cpu: str
    cores: int  # available to this process
    memory_gib: float
    gpus: tuple[str, ...]
    python: str
    versions: dict[str, str]
    environment: dict[str, str]  # variables that change timings
    load: float  # runnable processes over the last minute; other processes add noise


def provenance() -> Provenance:
    """Return the provenance of this process."""
    return Provenance(
        command=command_line(sys.argv),
        commit=commit(Path(__file__).parent),
        at=datetime.now(UTC).isoformat(timespec="seconds"),
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)),
        memory_gib=round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1),
        gpus=_gpus(),
        python=platform.python_version(),
        versions={name: found for name in _PACKAGES if (found := _version(name))},
        environment={name: os.environ[name] for name in _VARIABLES if name in os.environ},
        load=round(os.getloadavg()[0], 2),
    )


def command_line(arguments: list[str]) -> str:
    """Return the shell command that runs the same again."""
    return shlex.join([Path(arguments[0]).name, *arguments[1:]])


def commit(folder: Path) -> str:
    """Return the commit of a folder's checkout, with a `+` if tracked files are modified."""
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = head and _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def _git(folder: Path, *arguments: str) -> str:
    try:
        process = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(folder), *arguments],  # noqa: S607 - git is on the user's path
            capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return process.stdout.strip()


def _cpu() -> str:
    """Return the processor's name with its family and model, or at least its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in pairs}
    model = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({model})"


def _gpus() -> tuple[str, ...]:
    import torch  # noqa: PLC0415 - a router's process has none

    count = torch.cuda.device_count()
    return tuple(torch.cuda.get_device_name(number) for number in range(count))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
