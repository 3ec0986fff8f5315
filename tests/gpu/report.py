"""Runs the sections of the GPU report, each in a process of its own, and prints one JSON object.

A section that fails, crashes the device or takes too long is reported with what it had found by
then, and the others go on. `tests/gpu/run.sh` runs this where little is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

LIMIT_S = 300.0

# Each section, with its arguments, and its longest time in seconds, of those.
SECTIONS = {
    "device": 30,
    "paths": 90,
    "graphs": 40,
    "blocks": 30,
    "steps medium": 50,
    "steps large": 60,
    "pair medium": 80,
    "pair large": 80,
}


def report(*, device: str, limit_s: float = LIMIT_S) -> dict[str, Any]:
    """Return what every section found, the errors of those that failed, and whether all is well.

    Args:
        device: A torch device.
        limit_s: Time for all sections.
    """
    began_s = time.monotonic()
    sections: dict[str, Any] = {}
    for name, most_s in SECTIONS.items():
        left_s = limit_s - (time.monotonic() - began_s)
        most_s = min(left_s, most_s * limit_s / LIMIT_S)  # noqa: PLW2901 - in this time
        sections[name] = run(name, device=device, limit_s=most_s)
    checks = [finding.get("ok", True) for one in sections.values() for finding in one["findings"]]
    return {
        "ok": all(checks) and not any(one["error"] for one in sections.values()),
        "seconds": round(time.monotonic() - began_s, 1),
        "sections": sections,
    }


def run(name: str, *, device: str, limit_s: float) -> dict[str, Any]:
    """Run one section and return what it found, and its error if it failed.

    Args:
        name: Of the section, with its arguments.
        device: A torch device.
        limit_s: Its longest time.
    """
    if limit_s <= 0:
        return {"seconds": 0.0, "findings": [], "error": "the time for all sections was over"}
    began_s, error = time.monotonic(), None
    command = [sys.executable, "-m", "tests.gpu.sections", *name.split(), "--device", device]
    with TemporaryDirectory() as folder:
        found, log = Path(folder) / "found.jsonl", Path(folder) / "log"
        with (
            log.open("wb") as output,
            subprocess.Popen(  # noqa: S603 - our own module
                [*command, "--limit-s", str(0.8 * limit_s), "--out", str(found)],
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            ) as process,
        ):
            try:
                if process.wait(limit_s):
                    last = log.read_text(errors="replace").strip().splitlines()[-5:]
                    error = f"it ended with {process.returncode}: {' | '.join(last)}"
            except subprocess.TimeoutExpired:
                error = f"it was not done after {limit_s:.0f} s"
            finally:  # also what the section has started
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        lines = found.read_text().splitlines() if found.exists() else []
    seconds = round(time.monotonic() - began_s, 1)
    return {"seconds": seconds, "findings": [json.loads(line) for line in lines], "error": error}


def main() -> None:
    """Print the report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="a torch device; cpu runs tiny sizes")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S)
    options = parser.parse_args()
    found = report(device=options.device, limit_s=options.limit_s)
    sys.stdout.write(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
