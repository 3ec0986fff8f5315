"""Where and with what a measurement was made: what a figure needs beside it to mean anything."""

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
    commit: str  # with a `+` where files differ from it; empty outside a checkout
    at: str  # UTC, ISO 8601
    cpu: str
    cores: int  # that this process may use
    memory_gib: float
    gpus: tuple[str, ...]
    python: str
    versions: dict[str, str]
    environment: dict[str, str]  # variables that change timings
    load: float  # processes that wanted a core in the minute before; more than ours is noise


def provenance() -> Provenance:
    """Return where this process runs, and what it is."""
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
    """Return what to type to run the same again."""
    return shlex.join([Path(arguments[0]).name, *arguments[1:]])


def commit(folder: Path) -> str:
    """Return the commit that a folder's checkout is at, with a `+` if tracked files differ."""
    head = _git(folder, "rev-parse", "--short=12", "HEAD")
    changed = head and _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+" if changed else head


def _git(folder: Path, *words: str) -> str:
    try:
        ended = subprocess.run(  # noqa: S603 - fixed words
            ["git", "-C", str(folder), *words],  # noqa: S607 - git is where the user has it
            capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ""
    return ended.stdout.strip()


def _cpu() -> str:
    """Return the processor's name, or at least its kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    told = dict(line.split(":", 1) for line in lines if ":" in line)
    fields = {key.strip(): value.strip() for key, value in told.items()}
    kind = f"family {fields.get('cpu family', '?')} model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({kind})"


def _gpus() -> tuple[str, ...]:
    import torch  # noqa: PLC0415 - a router's process has none

    count = torch.cuda.device_count()
    return tuple(torch.cuda.get_device_name(number) for number in range(count))


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
